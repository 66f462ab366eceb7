"""`dcp.async_save` by several ranks, by a process of its own, across a fork, and cut short."""

import os
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.errors import StoreError
from integration.demo.ranks import Ranks
from tests.hooks import On, fail, hooked
from tests.test_async_save import loaded_value

LIMIT_S = 100
STEPS = 6


def sharded_state(value):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {"sharded": distribute_tensor(torch.full((64, 33), float(value)), mesh, [Shard(0)]), "step": value}


def assert_value(path, value):
    state = {"sharded": torch.zeros(64, 33), "step": None}
    dcp.load(state, storage_reader=AsyncStorageReader(path), planner=ShardedLoadPlanner())
    assert {*state["sharded"].unique().tolist(), state["step"]} == {value}


def save_overlapping(rank, place):
    writer, planner = AsyncStorageWriter(place["path"], sync_files=False), ShardedSavePlanner(enable_plan_caching=True)
    states = [sharded_state(step) for step in range(STEPS)]  # by collectives, which must not meet those of the saves
    futures = []
    for step, state in enumerate(states):
        path = Path(place["path"]) / str(step)
        futures.append(dcp.async_save(state, storage_writer=writer, planner=planner, checkpoint_id=path))
    for future in futures:
        future.result(LIMIT_S)
    rank.report("saved")


def test_overlapping_saves_of_two_ranks_do_not_mix(tmp_path):
    with Ranks(2, save_overlapping, {"path": str(tmp_path)}, limit_s=LIMIT_S) as ranks:
        assert [event.name for event in ranks.events()] == ["saved"] * 2
    for step in range(STEPS):
        assert_value(tmp_path / str(step), step)


def save_failing(rank, place):
    full = On("put", fail)
    full.active = rank.rank == place["rank"]
    writer = AsyncStorageWriter(hooked(place["path"], before=full))
    states = [sharded_state(value) for value in (1, 2)]
    error = dcp.async_save(states[0], storage_writer=writer, planner=ShardedSavePlanner()).exception(LIMIT_S)
    causes = [cause.__cause__ for cause, _ in error.failures.values()]
    assert [type(cause) for cause in causes] == [OSError], "it reaches all ranks"
    rank.report("failed", [type(cause) for cause, _ in error.failures.values()])
    full.active = False
    dcp.async_save(states[1], storage_writer=writer, planner=ShardedSavePlanner()).result(LIMIT_S)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_in_the_background_of_one_rank_is_raised_on_all(tmp_path, failing):
    with Ranks(2, save_failing, {"path": str(tmp_path), "rank": failing}, limit_s=LIMIT_S) as ranks:
        assert [event.data for event in ranks.events()] == [[StoreError]] * 2
    assert_value(tmp_path, 2)


class Niceness:
    """Leaves a file that tells how nice the thread is that saves."""

    def __init__(self, path):
        self._path = path

    @contextmanager
    def __call__(self, operation, url, raw_bytes):
        (self._path / f"nice-{os.getpriority(os.PRIO_PROCESS, threading.get_native_id())}").touch()
        yield lambda raw_bytes, stored_bytes: None


def save_in_a_process(rank, place):
    writer = AsyncStorageWriter(place["path"], overwrite=False, observer=Niceness(Path(place["path"])))
    kind = AsyncCheckpointerType.PROCESS
    for step in (1, 2, 3):
        state, path = sharded_state(step), Path(place["path"]) / ("1" if step == 2 else str(step))
        future = dcp.async_save(state, storage_writer=writer, checkpoint_id=path, async_checkpointer_type=kind)
        state["sharded"].to_local().fill_(9)  # what training does next must not reach the checkpoint
        try:
            future.result(LIMIT_S)
            rank.report("saved", step)
        except CheckpointException as error:
            rank.report("failed", [type(cause).__name__ for cause, _ in error.failures.values()])
    rank.report("nice", os.getpriority(os.PRIO_PROCESS, 0))


def test_a_failure_in_a_process_of_its_own_is_raised_and_the_next_save_works(tmp_path):
    with Ranks(2, save_in_a_process, {"path": str(tmp_path)}, limit_s=LIMIT_S) as ranks:
        events = [(event.rank, event.name, event.data) for event in ranks.events()]
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    assert [path.name for path in tmp_path.glob("nice-*")] == [f"nice-{max(10, nice)}"], "that process alone steps back"
    for rank in range(2):
        expected = [("saved", 1), ("failed", ["CheckpointExists"]), ("saved", 3), ("nice", nice)]
        assert [event[1:] for event in events if event[0] == rank] == expected
    assert_value(tmp_path / "1", 1)
    assert_value(tmp_path / "3", 3)


def test_a_child_of_fork_saves_and_loads(tmp_path):
    """In a process of its own: what pytest and other tests did before must not matter."""
    run_script(
        """
        import os
        writer = AsyncStorageWriter(path / "before")
        async_save(state_of(1), storage_writer=writer).result()
        child = os.fork()
        if not child:
            torch.set_num_threads(1)  # OpenMP does not survive a fork
            signal.alarm(50)
            assert loaded_value(path / "before") == 1
            dcp.save(state_of(2), storage_writer=writer, checkpoint_id=path / "child", no_dist=True)
            async_save(state_of(3), storage_writer=writer, checkpoint_id=path / "child").result()
            os._exit(loaded_value(path / "child") != 3)
        async_save(state_of(4), storage_writer=writer, checkpoint_id=path / "parent").result()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """,
        tmp_path,
    )
    assert loaded_value(tmp_path / "parent") == 4


PRELUDE = """
import asyncio, signal, sys, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
import torch.distributed.checkpoint as dcp
from dcp_storage import AsyncStorageReader, AsyncStorageWriter
from tests.hooks import hooked
from tests.test_async_save import async_save, loaded_value, state_of
path = Path(sys.argv[1])

def slow(method, seconds):
    async def sleep(operation):
        if operation.method == method:
            print(method, flush=True)
            await asyncio.sleep(seconds)
    return hooked(path, before=sleep)
"""


@contextmanager
def start_script(script, path):
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def run_script(script, path, code=0):
    with start_script(script, path) as process:
        out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == code, out + err
    return err


@pytest.mark.parametrize("method", ["put", "commit"])
def test_an_interpreter_that_exits_during_a_save_ends_and_leaves_a_whole_checkpoint(tmp_path, method):
    script = f"""
        dcp.save(state_of(1), storage_writer=AsyncStorageWriter(path), no_dist=True)
        async_save(state_of(2), storage_writer=AsyncStorageWriter(slow("{method}", 0.5)))
    """
    errors = run_script(script, tmp_path)
    value = loaded_value(tmp_path)
    assert value == 2 or (value == 1 and "in the background, failed" in errors)


@pytest.mark.parametrize("method", ["put", "commit"])
def test_ctrl_c_during_a_save_stops_it_and_leaves_the_old_checkpoint(tmp_path, method):
    script = f"""
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without
        dcp.save(state_of(1), storage_writer=AsyncStorageWriter(path), no_dist=True)
        dcp.save(state_of(2), storage_writer=AsyncStorageWriter(slow("{method}", 3600)), no_dist=True)
    """
    with start_script(script, tmp_path) as process:
        assert process.stdout.readline() == f"{method}\n"
        process.send_signal(2)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode
    assert "KeyboardInterrupt" in errors
    assert loaded_value(tmp_path) == 1
