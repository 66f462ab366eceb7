"""The README's program, as it stands there: trained on two ranks, killed, resumed on three."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dcp_storage import Checkpoints
from dcp_storage.verify import verify

README = Path(__file__).parent.parent / "README.md"
LIMIT_S = 100


def program():
    [code] = [
        code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "fully_shard" in code
    ]
    return code


@pytest.fixture
def torchrun(tmp_path):
    """Begins ranks of the program, all in one session, which ends with the test."""
    (tmp_path / "train.py").write_text(program())
    begun = []

    def begin(ranks, steps):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        begun.append(
            subprocess.Popen(
                [*command, str(tmp_path / "train.py"), str(tmp_path / "checkpoint"), str(steps)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"PYTHONPATH": str(README.parent)},
            )
        )
        return begun[-1]

    yield begin
    for process in begun:
        kill(process)


def kill(process):
    """Kill every process of a run: torchrun puts its ranks into sessions of their own."""
    for pid in [process.pid, *descendants(process.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def descendants(pid):
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return [*children, *(below for child in children for below in descendants(child))]


def wait_for_steps(process, root, count):
    deadline = time.monotonic() + LIMIT_S
    while len(list(root.glob("step-*/.metadata"))) < count:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.timeout(2 * LIMIT_S)
def test_a_sigterm_to_one_rank_ends_all_with_a_save(torchrun, tmp_path):
    root = tmp_path / "checkpoint"
    process = torchrun(2, 1_000_000)
    wait_for_steps(process, root, 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    out, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, out
    assert not descendants(process.pid)
    steps = [step.step for step in Checkpoints(root).steps()]
    assert 1 <= len(steps) <= 3
    out, _ = torchrun(2, 0).communicate(timeout=LIMIT_S)
    assert re.findall(r"rank \d of 2 begins at step (\d+)", out) == [str(steps[-1])] * 2


@pytest.mark.timeout(2 * LIMIT_S)
def test_killed_on_two_ranks_and_resumed_on_three(torchrun, tmp_path):
    process = torchrun(2, 1_000_000)
    wait_for_steps(process, tmp_path / "checkpoint", 1)
    time.sleep(random.uniform(0.2, 1))
    kill(process)
    newest = Checkpoints(tmp_path / "checkpoint").latest()
    assert verify(tmp_path / "checkpoint" / f"step-{newest}").sound
    out, _ = torchrun(3, 10).communicate(timeout=LIMIT_S)
    steps = [int(step) for step in re.findall(r"rank \d of 3 begins at step (\d+)", out)]
    assert len(steps) == 3, out
    assert steps[0] >= 10
    assert steps[0] % 10 == 0
    assert len(set(steps)) == 1
    finished = torchrun(3, steps[0] + 20)
    out, _ = finished.communicate(timeout=LIMIT_S)
    assert finished.returncode == 0, out
    out, _ = torchrun(1, 0).communicate(timeout=LIMIT_S)
    assert f"rank 0 of 1 begins at step {steps[0] + 20}" in out
