"""Saves without collectives: every rank commits a part, parts of one attempt merge, and those of two never do."""

import logging
from datetime import timedelta

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import CheckpointException

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner
from dcp_storage.errors import CheckpointExists, ConfigError, ManifestCorrupt
from dcp_storage.format.names import parse_part_manifest
from dcp_storage.geometry import Box
from dcp_storage.prune import prune
from dcp_storage.verify import verify
from tests.fake_ranks import Alone, Shards
from tests.hooks import On, fail, hooked

COLUMNS = 3


@pytest.fixture
def run(monkeypatch):
    """Return what makes this process's ranks those of a run of torchrun, and of a restart."""

    def begin(world=2, restart=0, run="job-7"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        return Alone(world)

    return begin


def state_of(value, rank, world=2):
    """Return a rank's state: a shard of one row, and what all ranks hold alike."""
    shards = [(Box((rank, 0), (1, COLUMNS)), torch.full((1, COLUMNS), float(value)))]
    return {"sharded": Shards((world, COLUMNS), shards, torch.float32), "alike": torch.full((4,), value), "step": value}


def save(ranks, value, path, *only, **options):
    for rank in only or range(ranks.world):
        ranks.save(rank, state_of(value, rank, ranks.world), AsyncStorageWriter(path, **options))


def loaded(path, world=2):
    state = {"sharded": torch.zeros(world, COLUMNS), "alike": torch.zeros(4, dtype=torch.int64), "step": None}
    dcp.load(state, storage_reader=AsyncStorageReader(path), planner=ShardedLoadPlanner())
    values = {*state["sharded"].unique().tolist(), *state["alike"].unique().tolist(), state["step"]}
    assert len(values) == 1, f"a mix of saves: {values}"
    return values.pop()


def attempts_in(path):
    return {part.attempt for file in path.iterdir() if (part := parse_part_manifest(file.name))}


@settings(max_examples=60)
@given(world=st.integers(1, 5), data=st.data())
def test_what_ranks_hold_alike_is_merged_to_one(tmp_path_factory, world, data):
    """Rows of a tensor, each on any ranks, and entries and tensors on any ranks."""
    path = tmp_path_factory.mktemp("parts")
    some_ranks = st.sets(st.integers(0, world - 1), min_size=1)
    rows = [data.draw(some_ranks) for _ in range(data.draw(st.integers(1, 4)))]
    holders = {name: data.draw(some_ranks) for name in ("tensor", "entry", "empty")}
    values = {"tensor": torch.arange(6.0).view(2, 3), "entry": [1, "two", 3.0], "empty": torch.empty(0, 4)}
    matrix = torch.arange(float(len(rows) * COLUMNS)).view(len(rows), COLUMNS)
    ranks = Alone(world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RUN_ID", "job")
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        for rank in range(world):
            mine = [(Box((at, 0), (1, COLUMNS)), matrix[at : at + 1]) for at, held in enumerate(rows) if rank in held]
            state = {name: value for name, value in values.items() if rank in holders[name]}
            if mine:
                state["matrix"] = Shards(tuple(matrix.shape), mine, matrix.dtype)
            ranks.save(rank, state, AsyncStorageWriter(path))
    found = {"matrix": torch.zeros_like(matrix), "tensor": torch.zeros(2, 3), "empty": torch.ones(0, 4), "entry": None}
    dcp.load(found, storage_reader=AsyncStorageReader(path), planner=ShardedLoadPlanner())
    assert torch.equal(found["matrix"], matrix)
    assert torch.equal(found["tensor"], values["tensor"])
    assert found["entry"] == values["entry"]
    chunks = AsyncStorageReader(path).read_metadata().state_dict_metadata
    assert len(chunks["matrix"].chunks) == len(rows)
    assert len(chunks["tensor"].chunks) == 1
    assert verify(path).sound


def test_a_restart_saves_again_at_a_path_where_a_part_was_left(run, tmp_path):
    save(run(restart=0), 1, tmp_path, 0)
    with pytest.raises(CheckpointException, match=r"by 2 ranks, of which these did not commit: \[1\]"):
        loaded(tmp_path)
    save(run(restart=1), 2, tmp_path)
    assert loaded(tmp_path) == 2
    orphans = verify(tmp_path).orphans
    assert {name.split("-")[1] for name in orphans if name.endswith(".zst")} == {"0"}
    prune(tmp_path, older_than=timedelta(0))
    assert len(attempts_in(tmp_path)) == 1
    assert not verify(tmp_path).orphans
    assert loaded(tmp_path) == 2


@pytest.mark.parametrize("again", [{"restart": 1}, {"run": "job-8"}], ids=["restart", "another-run"])
def test_parts_of_two_attempts_never_merge(run, tmp_path, again):
    save(run(), 1, tmp_path, 1)
    save(run(**again), 2, tmp_path, 0)
    assert len(attempts_in(tmp_path)) == 2
    with pytest.raises(CheckpointException, match="did not commit") as raised:
        loaded(tmp_path)
    assert isinstance(raised.value.failures[0][0], ManifestCorrupt)


def test_parts_of_two_saves_of_one_attempt_never_merge(run, tmp_path):
    ranks = run()
    save(ranks, 1, tmp_path)
    save(ranks, 2, tmp_path, 0)
    assert loaded(tmp_path) == 1
    save(ranks, 2, tmp_path, 1)
    assert loaded(tmp_path) == 2
    assert len(attempts_in(tmp_path)) == 1, "the older one is deleted once the newer one is complete"
    assert verify(tmp_path).orphans == {}


def test_the_newest_complete_attempt_is_loaded_and_what_is_missing_of_later_ones_is_said(run, tmp_path, caplog):
    save(run(3), 1, tmp_path)
    save(run(3, restart=1), 2, tmp_path, 0, 2)
    with caplog.at_level(logging.WARNING, "dcp_storage"):
        assert loaded(tmp_path, 3) == 1
    assert "of which only these committed: [0, 2]" in caplog.text
    save(run(3, restart=1), 2, tmp_path, 1)
    assert loaded(tmp_path, 3) == 2


def test_an_attempt_by_another_number_of_ranks_replaces_the_first(run, tmp_path):
    save(run(3), 1, tmp_path)
    save(run(2, restart=1), 2, tmp_path)
    assert loaded(tmp_path) == 2
    assert len(list(tmp_path.glob("*.metadata"))) == 2


def test_a_save_with_collectives_replaces_parts_and_not_the_other_way_round(run, tmp_path):
    save(run(), 1, tmp_path)
    dcp.save({"step": 2}, storage_writer=AsyncStorageWriter(tmp_path), no_dist=True)
    assert not attempts_in(tmp_path)
    with pytest.raises(CheckpointExists, match="without collectives it cannot be replaced atomically"):
        save(run(restart=1), 3, tmp_path)
    assert not attempts_in(tmp_path)


def test_overwrite_false_refuses_a_complete_attempt_and_not_an_incomplete_one(run, tmp_path):
    save(run(), 1, tmp_path, 0, overwrite=False)
    save(run(restart=1), 2, tmp_path, overwrite=False)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointExists, match="overwrite=False"):
        save(run(restart=2), 3, tmp_path, overwrite=False)
    assert sorted(tmp_path.iterdir()) == before
    assert loaded(tmp_path) == 2


def test_a_checkpoint_that_appears_meanwhile_is_not_hidden_nor_hides_the_parts(run, tmp_path):
    overtaken = On("put", lambda _: (tmp_path / ".metadata").write_bytes(b"of another job"))
    with pytest.raises(CheckpointExists):
        save(run(), 1, hooked(tmp_path, before=overtaken), 0)
    assert [file.name for file in tmp_path.iterdir()] == [".metadata"]


def test_a_part_under_another_name_is_refused(run, tmp_path):
    save(run(), 1, tmp_path)
    part = next(tmp_path.glob("__0-*.metadata"))
    part.rename(tmp_path / part.name.replace("__0", "__1"))
    with pytest.raises(CheckpointException, match="it was renamed"):
        loaded(tmp_path)


def test_old_objects_that_cannot_be_deleted_are_told_and_do_not_fail_the_save(run, tmp_path, caplog):
    save(run(), 1, tmp_path)
    save(run(restart=1), 2, hooked(tmp_path, before=On("delete", fail)))
    assert "not all objects of the replaced checkpoint were deleted" in caplog.text
    assert loaded(tmp_path) == 2


def test_several_ranks_that_nothing_binds_together_are_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(ConfigError, match="needs a process group with a store"):
        save(Alone(2), 1, tmp_path)
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


def test_a_rank_by_itself_needs_no_group(tmp_path):
    for value in (1, 2):
        dcp.save(state_of(value, 0, 1), storage_writer=AsyncStorageWriter(tmp_path), use_collectives=False)
        assert loaded(tmp_path, 1) == value
    assert len(attempts_in(tmp_path)) == 1
