import asyncio
import copy
import fcntl
import os
import pickle
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from dcp_storage import (
    AsyncStorageReader,
    AsyncStorageWriter,
    Codec,
    ShardedLoadPlanner,
    ShardedSavePlanner,
    Transfer,
    open_checkpoint,
)
from dcp_storage.errors import CheckpointReplaced, UnsupportedTensor
from tests import fake_ranks
from tests.states import assert_same, blank_like, every_dtype

CODECS = {
    "zstd": Codec(),
    "none": Codec("none"),
    "no_planes": Codec(byte_planes=False),
    "level_9": Codec(level=9),
    "small_blocks": Codec(block_bytes=4096),
}


def round_trip(state, path, codec=Codec(), sharded=True, **options):
    writer = AsyncStorageWriter(path, codec=codec, **options)
    dcp.save(state, storage_writer=writer, planner=ShardedSavePlanner() if sharded else None)
    loaded = blank_like(state)
    planner = ShardedLoadPlanner() if sharded else None
    dcp.load(loaded, storage_reader=AsyncStorageReader(path, **options), planner=planner)
    return loaded


@pytest.mark.parametrize("sharded", [True, False], ids=["our_planners", "default_planners"])
@pytest.mark.parametrize("codec", CODECS)
def test_every_dtype_shape_and_stride_comes_back_bit_for_bit(tmp_path, codec, sharded):
    state = every_dtype()
    assert_same(round_trip(state, tmp_path / "step-1", CODECS[codec], sharded), state)


def test_s3(moto_s3):
    state = every_dtype()
    assert_same(round_trip(state, moto_s3.url, storage_options=moto_s3.storage_options), state)


def test_memory():
    state = every_dtype()
    assert_same(round_trip(state, "memory://test_memory/step-1"), state)


def test_file_url(tmp_path):
    state = {"weight": torch.randn(10)}
    assert_same(round_trip(state, f"file://{tmp_path}/step-1"), state)
    assert (tmp_path / "step-1" / ".metadata").is_file()


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_items_that_span_objects_and_objects_that_hold_many_items(tmp_path, codec):
    state = {"large": torch.randn(3 << 20), **{f"small.{n}": torch.randn(n + 1) for n in range(50)}}
    codec = Codec(codec, block_bytes=65_536)
    transfer = Transfer(object_bytes=1 << 20, concurrency=3, threads=2)
    writer = AsyncStorageWriter(tmp_path, codec=codec, transfer=transfer)
    dcp.save(state, storage_writer=writer, planner=ShardedSavePlanner())
    assert len(list(tmp_path.iterdir())) == 14  # 12 MiB in objects of 1 MiB, the small ones, the manifest
    loaded = blank_like(state)
    dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path, transfer=transfer), planner=ShardedLoadPlanner())
    assert_same(loaded, state)


def test_only_a_view_is_stored_and_not_its_storage(tmp_path):
    round_trip({"view": torch.randn(1000, 1000)[0]}, tmp_path, Codec("none"))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 10_000


def test_an_empty_state_dict(tmp_path):
    assert round_trip({}, tmp_path) == {}
    assert [file.name for file in tmp_path.iterdir()] == [".metadata"]


def test_stateful_objects_are_asked_for_their_state(tmp_path):
    model, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    dcp.save({"model": model}, storage_writer=AsyncStorageWriter(tmp_path))
    dcp.load({"model": other}, storage_reader=AsyncStorageReader(tmp_path))
    assert_same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("writer", "reader"),
    [(dcp.FileSystemWriter, dcp.FileSystemReader), (AsyncStorageWriter, AsyncStorageReader)],
    ids=["stock", "ours"],
)
def test_metadata_says_what_stock_s_says(tmp_path, writer, reader):
    planned = []

    class Planner(dcp.DefaultSavePlanner):
        def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False):
            planned.append(storage_meta)
            super().set_up_planner(state_dict, storage_meta, is_coordinator)

    saved = dcp.save({"w": torch.ones(2)}, storage_writer=writer(tmp_path), planner=Planner())
    read = reader(tmp_path).read_metadata()
    if saved.version is None and writer is dcp.FileSystemWriter:
        saved = read  # before torch 2.12 what `dcp.save` returned lacked it
    assert saved.version == read.version == "1.0.0"
    assert planned[0].save_id == saved.storage_meta.save_id == read.storage_meta.save_id is not None
    assert os.fspath(saved.storage_meta.checkpoint_id) == os.fspath(read.storage_meta.checkpoint_id) == str(tmp_path)
    assert read.storage_meta.load_id
    assert reader(tmp_path).read_metadata().storage_meta.load_id != read.storage_meta.load_id


@pytest.mark.parametrize(
    ("writer", "reader"),
    [(dcp.FileSystemWriter, dcp.FileSystemReader), (AsyncStorageWriter, AsyncStorageReader)],
    ids=["stock", "ours"],
)
def test_messages_that_people_match(tmp_path, writer, reader):
    dcp.save({"w": torch.ones(2)}, storage_writer=writer(tmp_path))
    with pytest.raises(CheckpointException, match="Checkpoint already exists"):
        dcp.save({"w": torch.ones(2)}, storage_writer=writer(tmp_path, overwrite=False))
    planners = [None] if writer is dcp.FileSystemWriter else [None, ShardedLoadPlanner()]
    for planner in planners:
        with pytest.raises(CheckpointException, match="Missing key in checkpoint state_dict: v"):
            dcp.load({"v": torch.ones(2)}, storage_reader=reader(tmp_path), planner=planner)
        with pytest.raises(CheckpointException, match="Size mismatch between saved .*2.* and current.* for w"):
            dcp.load({"w": torch.ones(3)}, storage_reader=reader(tmp_path), planner=planner)


def test_checkpoint_id_chooses_the_place_of_each_save(tmp_path):
    writer, reader = AsyncStorageWriter(tmp_path / "unused"), AsyncStorageReader(tmp_path / "unused")
    for step in (1, 2):
        dcp.save({"step": torch.tensor(step)}, storage_writer=writer, checkpoint_id=tmp_path / str(step))
    for step in (1, 2):
        state = {"step": torch.tensor(0)}
        dcp.load(state, storage_reader=reader, checkpoint_id=str(tmp_path / str(step)))
        assert state["step"] == step
    assert not (tmp_path / "unused").exists()


def test_the_place_of_a_save_that_failed_early_is_not_that_of_the_next(tmp_path):
    writer = AsyncStorageWriter(tmp_path / "own")
    planning = {"storage_writer": writer, "planner": ShardedSavePlanner()}
    with pytest.raises(CheckpointException):
        dcp.save({"x.y": 1, "x": {"y": 2}}, checkpoint_id=tmp_path / "other", **planning)
    dcp.save({"x": 1}, **planning)
    assert not (tmp_path / "other").exists()
    assert open_checkpoint(tmp_path / "own")["x"] == 1


def test_a_reader_that_loaded_alone_does_not_follow_by_itself_later(tmp_path):
    def save(value):
        dcp.save({"x": torch.full((9,), value)}, storage_writer=AsyncStorageWriter(tmp_path), no_dist=True)

    save(1.0)
    reader = AsyncStorageReader(tmp_path)
    dcp.load({"x": torch.zeros(9)}, storage_reader=reader, no_dist=True)

    def replaced(step, rank):
        if (step, rank) == ("read", 1):
            save(2.0)

    with pytest.raises(CheckpointReplaced):
        fake_ranks.load([{"x": torch.zeros(9)} for _ in range(2)], lambda: copy.copy(reader), meanwhile=replaced)


def test_inside_a_running_event_loop(tmp_path):
    async def notebook():
        return round_trip({"weight": torch.arange(5)}, tmp_path)

    assert torch.equal(asyncio.run(notebook())["weight"], torch.arange(5))


@pytest.mark.parametrize("make", [AsyncStorageWriter, AsyncStorageReader])
def test_writers_and_readers_pickle_after_use_too(tmp_path, make):
    state = {"weight": torch.arange(5)}
    writer, reader = AsyncStorageWriter(tmp_path, codec=Codec(level=3)), AsyncStorageReader(tmp_path)
    dcp.save(state, storage_writer=writer)
    dcp.load(blank_like(state), storage_reader=reader)
    dcp.save(state, storage_writer=pickle.loads(pickle.dumps(writer)))
    loaded = blank_like(state)
    dcp.load(loaded, storage_reader=pickle.loads(pickle.dumps(reader)))
    assert_same(loaded, state)


def test_a_load_casts_and_reaches_strided_destinations(tmp_path):
    state = {"a": torch.randn(64, 64), "b": torch.randn(64, 64)}
    dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path, codec=Codec(block_bytes=4096)))
    loaded = {"a": torch.zeros(64, 64, dtype=torch.float64), "b": torch.zeros(64, 64).t()}
    planner = ShardedLoadPlanner(dtype_policy="cast")
    dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path), planner=planner)
    assert torch.equal(loaded["a"], state["a"].double())
    assert torch.equal(loaded["b"], state["b"])


def test_an_observer_sees_every_byte_of_a_save_and_a_load(tmp_path):
    calls = []

    @contextmanager
    def log(operation, url, raw_bytes):
        steps = []
        calls.append((operation, url, raw_bytes))
        yield lambda raw_bytes, stored_bytes: steps.append((raw_bytes, stored_bytes))
        calls.append(tuple(map(sum, zip(*steps, strict=True))))

    state = {"weight": torch.randn(1 << 20)}
    dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path, observer=log))
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.zst"))
    dcp.load(state, storage_reader=AsyncStorageReader(tmp_path, observer=log))
    moved = (4 << 20, stored)
    assert calls == [("save", str(tmp_path), 4 << 20), moved, ("load", str(tmp_path), 4 << 20), moved]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: torch.empty(3, device="meta"), "meta"),
        (lambda: torch.empty(4, dtype=torch.uint4), "uint4"),
        (lambda: torch.empty(4, dtype=torch.bits8), "bits8"),
    ],
)
@pytest.mark.parametrize("sharded", [True, False], ids=["our_planners", "default_planners"])
def test_tensors_that_cannot_be_stored_are_refused_by_name(tmp_path, make, says, sharded):
    planner = ShardedSavePlanner() if sharded else None
    with pytest.raises(CheckpointException) as raised:
        dcp.save({"odd": {"one": make()}}, storage_writer=AsyncStorageWriter(tmp_path / "x"), planner=planner)
    error = raised.value.failures[0][0]
    assert isinstance(error, UnsupportedTensor)
    assert "odd.one" in str(error)
    assert says in str(error)
    assert not (tmp_path / "x" / ".metadata").exists()


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no such writes here")
@pytest.mark.parametrize("codec", [Codec(), Codec("none")], ids=["zstd", "none"])
def test_all_but_the_ends_of_files_go_past_the_page_cache(tmp_path, monkeypatch, codec):
    real, direct, cached = os.write, [], []

    def write(descriptor, data):
        size = real(descriptor, data)
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        (direct if flags & os.O_DIRECT else cached).append(size)
        return size

    monkeypatch.setattr(os, "write", write)
    state = {"large": torch.rand(9 << 20), "odd": torch.rand(12_345)}
    round_trip(state, tmp_path, codec=codec)
    if not direct:
        pytest.skip("this file system takes no O_DIRECT")
    files = list(tmp_path.glob("*-*"))
    assert sum(cached) <= 4096 * len(files) + (tmp_path / ".metadata").stat().st_size
    assert sum(direct) > sum(file.stat().st_size for file in files) * 0.99


@pytest.mark.parametrize("form", [str, Path, "file://{}".format], ids=["str", "Path", "URL"])
def test_a_relative_path_stays_what_it_was_when_it_was_given(tmp_path, monkeypatch, form):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    path = form("run/step-1")
    writer, reader, planner = AsyncStorageWriter(path), AsyncStorageReader(path), Roaming(tmp_path / "elsewhere")
    state = {"w": torch.arange(5), "v": [1, {"x": torch.ones(2)}]}
    dcp.save(state, storage_writer=writer, planner=planner)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["elsewhere", "run"]
    assert not list((tmp_path / "elsewhere").iterdir())
    loaded = blank_like(state)
    dcp.load(loaded, storage_reader=reader)
    assert_same(loaded, state)


class Roaming(ShardedSavePlanner):
    """Changes the working directory in the middle of a save."""

    def __init__(self, directory):
        super().__init__()
        self._directory = directory

    def resolve_data(self, item):
        os.chdir(self._directory)
        return super().resolve_data(item)
