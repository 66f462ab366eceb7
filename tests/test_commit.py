import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, Codec, ShardedLoadPlanner, ShardedSavePlanner, Transfer
from dcp_storage.errors import CheckpointExists, StoreError
from tests import documents, fake_ranks
from tests.hooks import On, fail, hooked
from tests.states import blank_like

SMALL = Transfer(object_bytes=1 << 20, concurrency=4)


def state_of(value):
    return {"large": torch.full((1 << 20,), float(value)), "small": {"a": torch.tensor(value), "b": [value]}}


def save(path, value, **options):
    dcp.save(state_of(value), storage_writer=AsyncStorageWriter(path, transfer=SMALL, **options))


def loaded_value(path):
    state = blank_like(state_of(0))
    dcp.load(state, storage_reader=AsyncStorageReader(path), planner=ShardedLoadPlanner())
    values = {*state["large"].unique().tolist(), state["small"]["a"].item(), state["small"]["b"][0]}
    assert len(values) == 1, f"a mix of saves: {values}"
    return values.pop()


def failure(raised):
    return next(iter(raised.value.failures.values()))[0]


def test_an_overwrite_replaces_the_checkpoint_and_leaves_nothing_of_the_old(tmp_path):
    save(tmp_path, 1)
    before = {file.name for file in tmp_path.iterdir()}
    save(tmp_path, 2)
    after = {file.name for file in tmp_path.iterdir()}
    assert loaded_value(tmp_path) == 2
    assert before & after == {".metadata"}
    assert len(after) == len(before)


def test_overwrite_of_another_codec_and_of_a_stock_checkpoint(tmp_path):
    dcp.save(state_of(1), storage_writer=dcp.FileSystemWriter(tmp_path))
    save(tmp_path, 2, codec=Codec("none"))
    assert not list(tmp_path.glob("__0_*"))
    save(tmp_path, 3)
    assert not list(tmp_path.glob("*.distcp"))
    assert loaded_value(tmp_path) == 3


def test_overwrite_of_a_stock_checkpoint_without_collectives(tmp_path):
    dcp.save(state_of(1), storage_writer=dcp.FileSystemWriter(tmp_path), use_collectives=False)
    assert loaded_value(tmp_path) == 1
    save(tmp_path, 2)
    assert not list(tmp_path.glob("__*"))
    assert loaded_value(tmp_path) == 2


def test_parts_of_stock_s_and_of_ours_do_not_merge(tmp_path):
    dcp.save(state_of(1), storage_writer=dcp.FileSystemWriter(tmp_path), use_collectives=False)
    dcp.save(state_of(2), storage_writer=AsyncStorageWriter(tmp_path / "x", transfer=SMALL), use_collectives=False)
    [part] = (tmp_path / "x").glob("__0-*.metadata")
    part.rename(tmp_path / part.name)
    with pytest.raises(CheckpointException, match="mixes parts of DCP's own writers and of this package"):
        loaded_value(tmp_path)


def test_files_that_no_manifest_names_are_never_deleted(tmp_path):
    save(tmp_path, 1)
    other_save_in_flight = tmp_path / "0123456789abcdef-0-0.distcp.zst"
    other_save_in_flight.write_bytes(b"half of it")
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, 2)
    assert other_save_in_flight.exists()
    assert (tmp_path / "notes.txt").exists()


FOREIGN = ["train_config.json", ".metadata", "0123456789abcdef-0-0.distcp.bak", "__0_0.distcp.zst", "model.safetensors"]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("stock", [True, False], ids=["stock", "ours"])
def test_a_manifest_is_no_reason_to_delete_a_file_of_somebody_else_s(tmp_path, stock, name):
    manifest = tmp_path / ".metadata"
    if stock:
        dcp.save(state_of(1), storage_writer=dcp.FileSystemWriter(tmp_path))
        metadata = pickle.loads(manifest.read_bytes())
        for info in metadata.storage_data.values():
            info.relative_path = name
        manifest.write_bytes(pickle.dumps(metadata))
    else:
        save(tmp_path, 1)
        document = documents.unpack(manifest.read_bytes())
        document["objects"]["names"][0] = name
        manifest.write_bytes(documents.pack(document))
    if name != ".metadata":
        (tmp_path / name).write_bytes(b"mine")
    save(tmp_path, 2)
    assert loaded_value(tmp_path) == 2
    assert name == ".metadata" or (tmp_path / name).read_bytes() == b"mine"


@pytest.mark.parametrize("collectives", [True, False])
def test_overwrite_false_does_not_replace_what_was_committed_meanwhile(tmp_path, collectives):
    """Also without collectives, which never replace a checkpoint."""
    name = ".metadata" if collectives else "__0.metadata"
    overtaken = hooked(tmp_path, after=On("put", lambda _: (tmp_path / name).write_bytes(b"of another job")))
    with pytest.raises((CheckpointException, CheckpointExists), match="Checkpoint already exists") as raised:
        dcp.save(
            state_of(1),
            storage_writer=AsyncStorageWriter(overtaken, transfer=SMALL, overwrite=False),
            use_collectives=collectives,
        )
    assert isinstance(failure(raised) if collectives else raised.value, CheckpointExists)
    [manifest] = tmp_path.glob("*metadata")
    assert manifest.read_bytes() == b"of another job"
    assert not list(tmp_path.glob("*.tmp-*"))


def test_overwrite_false_refuses_before_a_byte_is_written(tmp_path):
    save(tmp_path, 1, overwrite=False)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointException) as raised:
        save(tmp_path, 2, overwrite=False)
    assert isinstance(failure(raised), CheckpointExists)
    assert str(tmp_path) in str(failure(raised))
    assert sorted(tmp_path.iterdir()) == before
    assert loaded_value(tmp_path) == 1


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("method", "call"), [("put", 1), ("put", 3), ("get", 1), ("commit", 1)])
def test_a_failed_save_raises_and_leaves_the_previous_checkpoint(tmp_path, method, call, when):
    save(tmp_path, 1)
    with pytest.raises(CheckpointException) as raised:
        save(hooked(tmp_path, **{when: On(method, fail, call)}), 2)
    assert isinstance(failure(raised), StoreError)
    # Only a commit that had its effect before its error has replaced the checkpoint.
    assert loaded_value(tmp_path) == (2 if (method, when) == ("commit", "after") else 1)
    save(tmp_path, 3)
    assert loaded_value(tmp_path) == 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failed_cleaning_up_does_not_fail_a_save_that_stands(tmp_path, caplog, when):
    save(tmp_path, 1)
    save(hooked(tmp_path, **{when: On("delete", fail, 1)}), 2)
    assert "not all objects of the replaced checkpoint were deleted" in caplog.text
    assert loaded_value(tmp_path) == 2


def test_a_save_over_a_damaged_manifest_warns_and_stands(tmp_path, caplog):
    (tmp_path / ".metadata").write_bytes(b"\x28\xb5\x2f\xfdnothing of sense")
    save(tmp_path, 2)
    assert "cannot read the manifest" in caplog.text
    assert loaded_value(tmp_path) == 2


def test_one_writer_serves_saves_in_several_threads_at_once(tmp_path):
    writer = AsyncStorageWriter(tmp_path / "unused", transfer=SMALL)

    def save_step(step):
        dcp.save(state_of(step), storage_writer=writer, checkpoint_id=tmp_path / str(step), no_dist=True)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(save_step, range(8)))
    assert [loaded_value(tmp_path / str(step)) for step in range(8)] == list(range(8))


def test_a_checkpoint_id_is_the_place_of_one_save(tmp_path):
    """Of that alone, also in the thread that named it, and of `async_save`."""
    writer = AsyncStorageWriter(tmp_path / "own", transfer=SMALL)
    for begin in (dcp.save, lambda *args, **kwargs: dcp.async_save(*args, **kwargs).result(60)):
        begin(state_of(1), storage_writer=writer, checkpoint_id=tmp_path / "other", no_dist=True)
        begin(state_of(2), storage_writer=writer, no_dist=True)
        assert loaded_value(tmp_path / "other") == 1
        assert loaded_value(tmp_path / "own") == 2


def test_async_save_in_a_thread(tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        state = state_of(1)
        future = dcp.async_save(state, storage_writer=AsyncStorageWriter(tmp_path), planner=ShardedSavePlanner())
        state["large"].fill_(9)  # what training does next must not reach the checkpoint
        future.result(timeout=60)
    finally:
        torch.distributed.destroy_process_group()
    assert loaded_value(tmp_path) == 1


def test_each_rank_s_objects_are_told_apart_and_the_manifest_counts_the_ranks(tmp_path):
    states = [{f"rank_{rank}": torch.full((1000,), rank)} for rank in range(3)]
    fake_ranks.save(states, lambda: AsyncStorageWriter(tmp_path))
    merged = {key: torch.zeros_like(value) for state in states for key, value in state.items()}
    dcp.load(merged, storage_reader=AsyncStorageReader(tmp_path))
    assert all((merged[f"rank_{rank}"] == rank).all() for rank in range(3))
    assert sorted(name.name.split("-")[1] for name in tmp_path.glob("*.zst")) == ["0", "1", "2"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_fails_leaves_no_objects_behind(tmp_path, asynchronous):
    """As a full disk makes it fail: the next save needs the room."""
    save(tmp_path, 1)
    before = sorted(tmp_path.iterdir())
    writer = AsyncStorageWriter(hooked(tmp_path, after=On("put", fail, 3)), transfer=SMALL)
    begin = dcp.async_save if asynchronous else dcp.save
    with pytest.raises(CheckpointException, match="no space left"):
        saved = begin(state_of(2), storage_writer=writer, no_dist=True)
        saved.result(60)
    assert sorted(tmp_path.iterdir()) == before
    assert loaded_value(tmp_path) == 1
