"""A save that is the program's last act: it ends before the program does, or the exit code tells."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_storage import AsyncStorageReader
from dcp_storage.dcp.undocumented import call_before_executors_end

LIMIT_S = 60
STARTS_NO_THREADS = (3, 12, 0) <= sys.version_info[:3] <= (3, 12, 1)
"""Pythons that start no thread any more once a program is ending."""

ends = pytest.mark.skipif(STARTS_NO_THREADS, reason="this Python starts no thread at its end")

PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without
import torch
import torch.distributed.checkpoint as dcp
from dcp_storage import AsyncStorageWriter, ShardedSavePlanner

state = {{"w": torch.arange({count}.0), "step": 5}}
place = {path!r}
{before}
future = dcp.async_save(state, storage_writer=AsyncStorageWriter(place), planner=ShardedSavePlanner(), no_dist=True)
{after}
"""


def before_commit(act):
    """Return what makes the program act before it commits."""
    return f"from tests.hooks import On, fail, hooked; place = hooked(place, before=On('commit', {act}))"


def program(path, after="", *, before="", count=1000):
    code = PROGRAM.format(path=str(path), before=before, after=textwrap.dedent(after), count=count)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def ended(path, *args, **options):
    with program(path, *args, **options) as process:
        try:
            out, error = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
    return process.returncode, out, error


def assert_saved(path, count=1000):
    state = {"w": torch.zeros(count), "step": 0}
    dcp.load(state, storage_reader=AsyncStorageReader(path), no_dist=True)
    assert torch.equal(state["w"], torch.arange(float(count)))
    assert state["step"] == 5


@ends
@pytest.mark.parametrize(
    ("after", "count"),
    [("", 1), ("", 20_000_000), ("sys.exit(0)", 1000), ("sys.exit(3)", 20_000_000), ("del future", 5)],
)
def test_it_is_not_lost(tmp_path, after, count):
    code, out, error = ended(tmp_path / "x", after, count=count)
    assert (code, out, error) == (3 if "3" in after else 0, "", "")
    assert_saved(tmp_path / "x", count)
    assert not encoders_of(tmp_path)


def encoders_of(path):
    """Encoder processes that are left."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = process.read_bytes()
        except OSError:
            continue
        ours = line.startswith(sys.executable.encode()) and b"encoder_process" in line  # others may run the tests, too
        if ours and process.parent.stat().st_mtime >= path.stat().st_mtime:
            found.append(line)
    return found


@ends
def test_several_of_them_end_in_their_order(tmp_path):
    more = f"""
    for step in range(3):
        writer = AsyncStorageWriter({str(tmp_path)!r} + f"/{{step}}")
        dcp.async_save(state, storage_writer=writer, no_dist=True)
    """
    assert ended(tmp_path / "x", more) == (0, "", "")
    for name in ("x", "0", "1", "2"):
        assert_saved(tmp_path / name)


@ends
def test_an_error_of_the_program_keeps_its_traceback_and_code(tmp_path):
    held_back = before_commit("lambda _: time.sleep(0.3)")
    code, _, error = ended(tmp_path / "x", "raise ValueError('of training')", before=held_back)
    assert code == 1
    assert error.endswith("ValueError: of training\n")
    assert error.count("Traceback") == 1
    assert_saved(tmp_path / "x")


@ends
def test_ctrl_c_while_it_is_waited_for_ends_the_program_and_says_what_is_lost(tmp_path):
    held_back = before_commit("lambda _: (print('committing', flush=True), time.sleep(20))")
    with program(tmp_path / "x", before=held_back) as process:
        assert process.stdout.readline() == "committing\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 128 + signal.SIGINT
    assert f"the save to {tmp_path}/x, in the background, is lost: the program was interrupted" in error
    assert "Traceback" not in error
    assert not (tmp_path / "x" / ".metadata").exists()


def test_one_that_fails_makes_the_exit_code_tell(tmp_path):
    code, _, error = ended(tmp_path / "x", before=before_commit("fail"))
    assert code == 1
    assert f"the save to {tmp_path}/x, in the background, failed: " in error


@pytest.mark.skipif(not STARTS_NO_THREADS, reason="this Python starts threads at its end")
def test_where_python_starts_no_thread_any_more_the_exit_code_tells(tmp_path):
    code, _, error = ended(tmp_path / "x")
    if "in the background, failed: " in error:
        assert code == 1
    else:
        assert code == 0
        assert_saved(tmp_path / "x")


def test_a_python_without_that_call_waits_at_exit(monkeypatch):
    called = []
    monkeypatch.delattr(threading, "_register_atexit")
    monkeypatch.setattr("atexit.register", called.append)
    call_before_executors_end(print)
    assert called == [print]
