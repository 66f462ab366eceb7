"""Readers and writers at one path at the same time: every load is of one save, whole, or says that it is not."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, Transfer
from dcp_storage.checkpoint.manifests import read_manifest
from dcp_storage.checkpoint.place import Location
from dcp_storage.errors import CheckpointReplaced, ObjectNotFound
from tests import fake_ranks
from tests.hooks import On, hooked

SMALL = Transfer(object_bytes=1 << 20, concurrency=4)
MANY_OBJECTS = 3


def state_of(value, rows=1 << 18):
    return {"parts": [torch.full((rows,), float(value)) for _ in range(MANY_OBJECTS)], "object": {"step": value}}


def save(path, value, **shape):
    dcp.save(state_of(value, **shape), storage_writer=AsyncStorageWriter(path, transfer=SMALL, sync_files=False))


def values_of(state):
    return {*torch.cat(state["parts"]).unique().tolist(), state["object"]["step"]}


def load(path):
    state = state_of(-1)
    dcp.load(state, storage_reader=AsyncStorageReader(path, transfer=SMALL), planner=ShardedLoadPlanner())
    values = values_of(state)
    assert len(values) == 1, f"a mix of saves: {values}"
    return values.pop()


def load_or_replaced(path):
    """Load once; `None` where the load said that it was overtaken."""
    try:
        return load(path)
    except CheckpointException as error:
        assert {type(cause) for cause, _ in error.failures.values()} == {CheckpointReplaced}
        return None


def assert_whole(path):
    """Every object that the standing manifest names is there, and loads."""
    load(path)
    manifest = Location(path).run(read_manifest)
    assert {stored.name for stored in manifest.objects} <= {file.name for file in path.iterdir()}


@pytest.mark.parametrize("read", range(1, MANY_OBJECTS + 1))
def test_a_load_that_is_overtaken_begins_anew(tmp_path, read):
    save(tmp_path, 0)
    overtaking = On("get_range", lambda _: save(tmp_path, 1), read)
    assert load(hooked(tmp_path, before=overtaking)) == 1


def test_a_stock_checkpoint_that_is_overtaken(tmp_path):
    dcp.save(state_of(0), storage_writer=dcp.FileSystemWriter(tmp_path))
    overtaking = On("get_range", lambda _: save(tmp_path, 1), 1)
    assert load(hooked(tmp_path, before=overtaking)) == 1


def test_a_load_that_is_overtaken_again_and_again_gives_up(tmp_path):
    save(tmp_path, 0)
    overtaking = On("get_range", lambda _: save(tmp_path, overtaking.seen))
    assert load_or_replaced(hooked(tmp_path, before=overtaking)) is None
    assert 5 <= overtaking.seen <= 5 * (MANY_OBJECTS + 1)


def test_a_save_of_another_layout_cannot_be_followed(tmp_path):
    save(tmp_path, 0)
    overtaking = On("get_range", lambda _: save(tmp_path, 1, rows=77), 1)
    with pytest.raises(CheckpointException) as raised:
        load(hooked(tmp_path, before=overtaking))
    [(error, _)] = raised.value.failures.values()
    assert isinstance(error, CheckpointReplaced)
    assert str(tmp_path) in str(error)
    assert "load again" in str(error)
    assert error.url == str(tmp_path)


def test_an_object_that_is_missing_without_another_save_is_read_once(tmp_path):
    save(tmp_path, 0)
    objects = list(tmp_path.glob("*.zst"))
    losing = On("get_range", lambda _: [file.unlink(missing_ok=True) for file in objects])
    with pytest.raises(CheckpointException) as raised:
        load(hooked(tmp_path, before=losing))
    assert isinstance(raised.value.failures[0][0], ObjectNotFound)
    assert losing.seen <= MANY_OBJECTS + 1


@pytest.mark.parametrize("moment", [("plan", 1), ("read", 0), ("read", 1)])
def test_ranks_never_load_different_saves(tmp_path, moment):
    save(tmp_path, 0)
    states = [state_of(-1) for _ in range(2)]

    def meanwhile(step, rank):
        if (step, rank) == moment:
            save(tmp_path, 1)

    with pytest.raises(CheckpointReplaced):
        fake_ranks.load(states, lambda: AsyncStorageReader(tmp_path), meanwhile=meanwhile)
    fake_ranks.load(states, lambda: AsyncStorageReader(tmp_path))
    assert [values_of(state) for state in states] == [{1}, {1}]


def test_a_reader_beside_rank_manifests_that_a_commit_replaces(tmp_path):
    dcp.save(state_of(0), storage_writer=AsyncStorageWriter(tmp_path), use_collectives=False)
    overtaking = On("list", lambda _: save(tmp_path, 1), 1)
    assert load(hooked(tmp_path, after=overtaking)) == 1


def test_readers_while_a_writer_overwrites(tmp_path):
    save(tmp_path, 0)
    stop = threading.Event()

    def read():
        seen = []
        while not stop.is_set():
            seen.append(load_or_replaced(tmp_path))
        return [value for value in seen if value is not None]

    with ThreadPoolExecutor(2) as threads:
        reading = [threads.submit(read) for _ in range(2)]
        for value in range(1, 11):
            save(tmp_path, value)
        stop.set()
        for future in reading:
            seen = future.result()
            assert seen == sorted(seen)
    assert load(tmp_path) == 10
    assert len({file.name.split("-")[0] for file in tmp_path.iterdir()}) == 2  # .metadata, and one save's token


def test_writers_at_one_path_one_wins_whole(tmp_path):
    barrier = threading.Barrier(3)

    def write(value):
        for _ in range(4):
            barrier.wait(30)
            save(tmp_path, value)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(write, range(3)))
    assert load(tmp_path) in range(3)
    assert_whole(tmp_path)


@pytest.mark.parametrize("collectives", [True, False], ids=["one manifest", "parts"])
def test_ranks_that_find_different_stock_saves(tmp_path, collectives):
    """Some of torch's versions give their saves no identity; what their manifests hold is one."""

    def save_stock(value):
        for file in tmp_path.iterdir():
            file.unlink()
        writer = dcp.FileSystemWriter(tmp_path)
        dcp.save({"w": torch.full((9 + value,), 1.0)[:9], "step": value}, storage_writer=writer, no_dist=True)
        if not collectives:
            (tmp_path / ".metadata").rename(tmp_path / "__0.metadata")

    def replace_it(step, rank):
        if (step, rank) == ("plan", 1):
            save_stock(22)

    def blank():
        return [{"w": torch.zeros(9), "step": 0} for _ in range(2)]

    save_stock(1)
    fake_ranks.load(blank(), lambda: AsyncStorageReader(tmp_path))
    with pytest.raises(CheckpointReplaced, match="different saves"):
        fake_ranks.load(blank(), lambda: AsyncStorageReader(tmp_path), meanwhile=replace_it)
