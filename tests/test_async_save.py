"""`dcp.async_save` in a thread: what overlaps, fails or is given up, and what is left behind."""

import gc
import itertools
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner, Transfer
from dcp_storage.errors import StoreError
from dcp_storage.format.codecs.blocks import ItemEncoder
from dcp_storage.transfer import encoder_process
from tests.hooks import LIMIT_S, Gate, On, fail, hooked

SMALL = Transfer(object_bytes=1 << 20, concurrency=4)
async_save = partial(dcp.async_save, no_dist=True)


def state_of(value):
    return {"large": torch.full((1 << 18,), float(value)), "strided": torch.full((64, 64), value).t(), "step": value}


def loaded_value(path):
    state = state_of(-1)
    dcp.load(state, storage_reader=AsyncStorageReader(path), planner=ShardedLoadPlanner())
    values = {*state["large"].unique().tolist(), *state["strided"].unique().tolist(), state["step"]}
    assert len(values) == 1, f"a mix of saves: {values}"
    return values.pop()


@pytest.mark.parametrize("planner", [ShardedSavePlanner(), None], ids=["one-planner", "a-planner-each"])
@pytest.mark.parametrize("order", list(itertools.product("sa", repeat=3)), ids="".join)
def test_saves_to_one_place_take_effect_in_the_order_of_the_calls(tmp_path, order, planner):
    """Synchronous (s) and asynchronous (a), each with a writer of its own, the first commits held back."""
    place = hooked(tmp_path / "one", before=On("commit", lambda _: time.sleep(0.3), *range(1, len(order))))
    futures = []
    for step, how in enumerate(order):
        save = async_save if how == "a" else partial(dcp.save, no_dist=True)
        future = save(state_of(step), storage_writer=AsyncStorageWriter(place), planner=planner)
        futures += [future] if how == "a" else []
        if how == "s":
            assert loaded_value(tmp_path / "one") == step
    for future in futures:
        future.result(LIMIT_S)
    assert loaded_value(tmp_path / "one") == len(order) - 1


@pytest.mark.parametrize("how", ["save", "async_save", "both"])
def test_a_callback_may_save_again_and_wait_for_it(tmp_path, how):
    ended = threading.Event()

    def again(_):
        state = state_of(2)
        if how != "async_save":
            dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path / "2"), no_dist=True)
        if how != "save":
            async_save(state, storage_writer=AsyncStorageWriter(tmp_path / "2")).result(LIMIT_S)
        ended.set()

    async_save(state_of(1), storage_writer=AsyncStorageWriter(tmp_path / "1")).add_done_callback(again)
    assert ended.wait(LIMIT_S)
    async_save(state_of(3), storage_writer=AsyncStorageWriter(tmp_path / "3")).result(LIMIT_S)
    assert [loaded_value(tmp_path / str(step)) for step in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize("planner", [ShardedSavePlanner(), None], ids=["one-planner", "a-planner-each"])
def test_overlapping_saves_of_one_writer_follow_one_another(tmp_path, planner):
    gate = Gate()
    writer = AsyncStorageWriter(hooked(tmp_path / "unused", before=gate), transfer=SMALL)
    futures = []
    for step in (1, 2, 3):
        state = state_of(step)
        futures.append(async_save(state, storage_writer=writer, checkpoint_id=tmp_path / str(step), planner=planner))
        assert gate.reached.wait(LIMIT_S)
    assert [future.running() for future in futures] == [True] * 3
    assert not (tmp_path / "2").exists()
    gate.opened.set()
    for future in futures:
        future.result(LIMIT_S)
    assert [loaded_value(tmp_path / str(step)) for step in (1, 2, 3)] == [1, 2, 3]


def test_the_last_of_overlapping_saves_to_one_path_stands(tmp_path):
    path = tmp_path / "path"
    gate = Gate()
    writer = AsyncStorageWriter(hooked(path, before=gate), transfer=SMALL)
    futures = [async_save(state_of(step), storage_writer=writer) for step in (1, 2)]
    assert gate.reached.wait(LIMIT_S)
    gate.opened.set()
    for future in futures:
        future.result(LIMIT_S)
    assert loaded_value(path) == 2
    assert len({file.name.split("-")[0] for file in path.iterdir()}) == 2  # .metadata, and one save's token


def test_a_sync_save_by_the_thread_that_saved_before_waits_for_nobody(tmp_path):
    writer = AsyncStorageWriter(tmp_path)
    for step in range(3):
        dcp.save(state_of(step), storage_writer=writer, no_dist=True)
        async_save(state_of(step), storage_writer=writer).result(LIMIT_S)
    assert loaded_value(tmp_path) == 2


def test_what_training_does_next_does_not_reach_the_checkpoint(tmp_path):
    gate = Gate()
    model = torch.nn.Linear(300, 300)
    state = {"model": model.state_dict(), "strided": torch.arange(5000.0).view(50, 100).t(), "list": [1, torch.ones(3)]}
    expected = {name: value.clone() for name, value in state["model"].items()}
    writer = AsyncStorageWriter(hooked(tmp_path, before=gate))
    future = async_save(state, storage_writer=writer, planner=ShardedSavePlanner())
    with torch.no_grad():
        for value in (*model.parameters(), state["strided"], state["list"][1]):
            value.zero_()
    state["list"][0] = 9
    gate.opened.set()
    future.result(LIMIT_S)
    found = {
        "model": torch.nn.Linear(300, 300).state_dict(),
        "strided": torch.zeros(100, 50),
        "list": [0, torch.ones(3)],
    }
    dcp.load(found, storage_reader=AsyncStorageReader(tmp_path), planner=ShardedLoadPlanner())
    assert all(torch.equal(found["model"][name], value) for name, value in expected.items())
    assert torch.equal(found["strided"], torch.arange(5000.0).view(50, 100).t())
    assert found["list"][0] == 1
    assert found["list"][1].eq(1).all()


@pytest.mark.parametrize("method", ["put", "commit"])
def test_a_failure_is_raised_by_result_and_logged_though_nobody_asks(tmp_path, caplog, method):
    full = On(method, fail)
    writer = AsyncStorageWriter(hooked(tmp_path, before=full))
    error = async_save(state_of(1), storage_writer=writer).exception(LIMIT_S)
    full.active = False
    assert isinstance(error, CheckpointException)
    assert isinstance(error.failures[0][0], StoreError)
    assert f"the save to {tmp_path}, in the background, failed: {tmp_path}: no space left" in caplog.text
    caplog.clear()
    dcp.save(state_of(2), storage_writer=writer, no_dist=True)
    assert f"the save to {tmp_path} before this one, in the background, failed" in caplog.text
    caplog.clear()
    async_save(state_of(3), storage_writer=writer).result(LIMIT_S)
    assert not [record for record in caplog.records if record.name.startswith("dcp_storage")]
    assert loaded_value(tmp_path) == 3


def test_a_failure_outside_of_the_writer_is_told_at_the_next_save(tmp_path, caplog):
    class BrokenPlanner(ShardedSavePlanner):
        def create_local_plan(self):
            raise RuntimeError("no plan")

    writer = AsyncStorageWriter(tmp_path)
    async_save(state_of(1), storage_writer=writer, planner=BrokenPlanner()).exception(LIMIT_S)
    dcp.save(state_of(2), storage_writer=writer, no_dist=True)
    assert f"the save to {tmp_path} before this one, in the background, failed" in caplog.text


def open_files():
    return {os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if _is_open(number)}


def _is_open(number):
    return os.path.lexists(f"/proc/self/fd/{number}")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux to list open files")
@pytest.mark.parametrize("hooks", [{}, {"before": On("commit", fail)}], ids=["saved", "failed"])
@pytest.mark.parametrize("store", ["local", "s3"])
def test_a_future_that_is_dropped_leaves_nothing_behind(tmp_path, moto_s3, store, hooks):
    path, options = (tmp_path, None) if store == "local" else (moto_s3.url, moto_s3.storage_options)
    threads, files = set(threading.enumerate()), open_files()
    future = async_save(state_of(1), storage_writer=AsyncStorageWriter(hooked(path, options, **hooks)))
    future.cancel()  # too late for a save that runs, and nothing is left of one that does not
    del future
    deadline = time.monotonic() + LIMIT_S
    while any("AsyncCheckpoint" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    gc.collect()
    served = {thread for thread in threading.enumerate() if "process_request" in thread.name}  # moto's own
    assert set(threading.enumerate()) - served <= threads
    if store == "local":
        assert open_files() <= files


class Encoders:
    """What encodes: threads of this process, and processes."""

    def __init__(self, monkeypatch):
        self.threads, self.processes = set(), []
        real = ItemEncoder.encode

        def encode(encoder, *args):
            self.threads.add(threading.get_native_id())
            return real(encoder, *args)

        monkeypatch.setattr(ItemEncoder, "encode", encode)
        start = encoder_process._start

        def noted(*args):
            self.processes.append(start(*args))
            return self.processes[-1]

        monkeypatch.setattr(encoder_process, "_start", noted)


@pytest.fixture
def encoders(monkeypatch):
    """Apart from training, from the first byte."""
    monkeypatch.setattr("dcp_storage.transfer.encoders._LEAST_BYTES", 0)
    return Encoders(monkeypatch)


@pytest.mark.parametrize("cores", [1, 2, 4])
def test_saves_beside_training_leave_a_core_to_it(tmp_path, monkeypatch, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    encoders = Encoders(monkeypatch)
    state = {"large": torch.rand(12 << 20)}
    async_save(state, storage_writer=AsyncStorageWriter(tmp_path)).result()
    assert 1 <= len(encoders.threads) <= max(1, cores - 1)
    assert not encoders.processes, "so little is encoded before a process has started"


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="processes share memory there only")


@LINUX
@pytest.mark.parametrize("cores", [1, 2, 4])
def test_saves_beside_training_leave_it_the_lock(tmp_path, monkeypatch, encoders, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    state = {"large": torch.rand(12 << 20), "odd": torch.rand(7, 5).t(), "step": 3}
    async_save(state, storage_writer=AsyncStorageWriter(tmp_path)).result()
    assert 1 <= len(encoders.processes) <= max(1, cores - 1)
    assert all(process.returncode is not None for process in encoders.processes), "none outlives the save"
    assert not encoders.threads
    loaded = {"large": torch.zeros(12 << 20), "odd": torch.zeros(5, 7), "step": 0}
    dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path), planner=ShardedLoadPlanner())
    assert all(torch.equal(loaded[name], state[name]) for name in ("large", "odd"))
    assert loaded["step"] == 3


def test_a_save_that_training_waits_for_encodes_in_its_threads(tmp_path, encoders):
    dcp.save({"large": torch.rand(1 << 20)}, storage_writer=AsyncStorageWriter(tmp_path), no_dist=True)
    assert encoders.threads
    assert not encoders.processes


@LINUX
def test_a_save_that_fails_leaves_no_process(tmp_path, encoders):
    writer = AsyncStorageWriter(hooked(tmp_path, after=On("put", fail)), transfer=SMALL)
    future = async_save({"large": torch.rand(12 << 20)}, storage_writer=writer)
    with pytest.raises(CheckpointException, match="no space left"):
        future.result(LIMIT_S)
    assert encoders.processes
    assert all(process.returncode is not None for process in encoders.processes)


def test_few_local_files_are_in_flight_beside_training(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    in_flight, most = [], []

    def note(put):
        in_flight.append(put.name)
        most.append(len(in_flight))

    place = hooked(tmp_path / "a", before=On("put", note), after=On("put", lambda put: in_flight.remove(put.name)))
    writer = AsyncStorageWriter(place, transfer=SMALL)
    async_save({"large": torch.rand(12 << 20)}, storage_writer=writer).result()
    assert max(most) == 3, "one thread encodes, two files are ahead"
    most.clear()
    dcp.save({"large": torch.rand(12 << 20)}, storage_writer=writer, checkpoint_id=tmp_path / "b")
    assert max(most) == SMALL.concurrency


@LINUX
def test_processes_that_were_asked_for_encode_beside_training(tmp_path, encoders):
    writer = AsyncStorageWriter(tmp_path, transfer=Transfer(threads=3, object_bytes=1 << 20))
    async_save({"large": torch.rand(12 << 20)}, storage_writer=writer).result()
    assert len(encoders.processes) == 3


def test_saves_that_succeed_are_not_told(tmp_path, caplog):
    writer = AsyncStorageWriter(tmp_path, transfer=SMALL)
    for step in (1, 2, 3):
        async_save(state_of(step), storage_writer=writer).result()
    assert not [record for record in caplog.records if record.name.startswith("dcp_storage")]
