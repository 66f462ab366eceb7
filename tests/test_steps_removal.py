"""Steps that are removed while others save, list and pin: what a prune may delete, and what stops it."""

import asyncio
import json
import os

import pytest
import torch

from dcp_storage import AsyncStorageWriter, Checkpoints, KeepLatest
from dcp_storage.checkpoint.place import Location
from dcp_storage.steps.pins import unearth
from dcp_storage.verify import verify
from tests.fake_ranks import Alone
from tests.hooks import On, hooked


@pytest.fixture
def ranks(monkeypatch):
    """Two ranks that save without collectives."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    return Alone(2)


def state_of(value):
    return {"weights": torch.full((64,), float(value)), "step": value}


def bury(path, tombstone, named):
    """Leave a tombstone that names objects."""
    (path / f".removing-{tombstone * 16}").write_text(json.dumps(named))


def unearth_in(path):
    Location(path).run(unearth)


@pytest.mark.parametrize("at", [("delete", "step-2"), ("list", "step-3"), ("commit", "step-3")])
def test_a_step_that_is_saved_again_while_a_prune_runs_stays(tmp_path, at):
    """The run has returned to step 1: the last save is the one that may not be lost."""
    method, where = at
    with Checkpoints(tmp_path) as trainer:
        for step in range(1, 8):
            trainer.save(step, state_of(step))

        async def save_again(operation):
            nonlocal done
            if not done and operation.method == method and operation.url.endswith(where):
                done = True
                await asyncio.to_thread(trainer.save, 3, state_of(300), overwrite=True)

        done = False
        with Checkpoints(hooked(tmp_path, before=save_again), keep=KeepLatest(2)) as other:
            decisions = {each.step: each for each in other.prune()}
        assert done
        assert decisions[3].reasons == ("saved again",)
        assert [step.step for step in trainer.steps()] == [3, 6, 7]
        state = state_of(-1)
        assert trainer.load(state, step=3) == 3
        assert state["step"] == 300


def test_a_step_that_is_a_symbolic_link_is_read_and_never_removed(tmp_path):
    other, root = tmp_path / "other", tmp_path / "run"
    with Checkpoints(other) as checkpoints:
        checkpoints.save(1, state_of(1))
    root.mkdir()
    (root / "step-1").symlink_to(other / "step-1")
    (root / "step-9").symlink_to(tmp_path)
    before = sorted(path.name for path in (other / "step-1").iterdir())
    with Checkpoints(root, keep=KeepLatest(1)) as checkpoints:
        assert checkpoints.load(state_of(-1)) == 1
        for step in (2, 3):
            checkpoints.save(step, state_of(step))
            checkpoints.wait()
        assert [step.step for step in checkpoints.steps()] == [1, 3]
        assert {each.step: each.reasons for each in checkpoints.prune()}[1] == ("a symbolic link",)
    assert sorted(path.name for path in (other / "step-1").iterdir()) == before


def test_a_tombstone_of_a_step_that_stands_deletes_nothing(tmp_path):
    """Another prune put it for a step that was saved anew, and may withdraw because of a pin."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1))
    path = tmp_path / "step-1"
    standing = sorted(os.listdir(path))
    bury(path, "a", ["0123456789abcdef-0-0.distcp.zst"])
    bury(path, "b", [name for name in standing if name != ".metadata"])
    (path / ".pin-eval-0123456789abcdef").write_text("{}")
    (path / "0123456789abcdef-0-0.distcp.zst").write_bytes(b"of the step that was removed")
    unearth_in(path)
    assert sorted(os.listdir(path)) == sorted([*standing, ".pin-eval-0123456789abcdef", f".removing-{'b' * 16}"])
    assert verify(path).sound


def test_a_step_of_parts_is_removed_like_any_other(tmp_path, ranks):
    with Checkpoints(tmp_path, keep=KeepLatest(1)) as checkpoints:
        for rank in range(2):
            ranks.save(rank, state_of(1), AsyncStorageWriter(tmp_path / "step-1"))
        assert checkpoints.latest() == 1
        checkpoints.save(2, state_of(2))
        checkpoints.wait()
        assert os.listdir(tmp_path) == ["step-2"]


def test_a_step_whose_parts_nobody_can_read_is_listed_and_removed(tmp_path, ranks):
    with Checkpoints(tmp_path, keep=KeepLatest(1)) as checkpoints:
        for rank in range(2):
            ranks.save(rank, state_of(1), AsyncStorageWriter(tmp_path / "step-1"))
        for part in (tmp_path / "step-1").glob("__0-*.metadata"):
            part.write_bytes(b"damaged")
        assert [step.step for step in checkpoints.steps()] == [1]
        checkpoints.save(2, state_of(2))
        checkpoints.wait()
        assert [step.step for step in checkpoints.steps()] == [2]
        for left in (tmp_path / "step-1").iterdir():
            assert left.name.endswith(".distcp.zst"), "what nobody can read names no objects: they go after a day"
            os.utime(left, (0, 0))
        checkpoints.prune()
        assert os.listdir(tmp_path) == ["step-2"]


def test_parts_of_some_ranks_are_left_alone_and_stop_no_prune(tmp_path, ranks, caplog):
    """The others' may lie on other machines."""
    ranks.save(1, state_of(1), AsyncStorageWriter(tmp_path / "step-1"))
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2" / "0123456789abcdef-0-0.distcp.zst").write_bytes(b"of a save that died")
    for path in tmp_path.glob("step-*/*"):
        os.utime(path, (0, 0))
    with Checkpoints(tmp_path, keep=KeepLatest(1)) as checkpoints:
        for step in (3, 4):
            checkpoints.save(step, state_of(step))
        checkpoints.wait()
        assert sorted(os.listdir(tmp_path)) == ["step-1", "step-4"]
        assert caplog.text.count("step-1 is left as it is") == 1, "of two prunes the first says so"
        assert len(os.listdir(tmp_path / "step-1")) == 2


def test_a_listing_goes_on_where_a_prune_removes_parts_at_that_moment(tmp_path, ranks):
    for rank in range(2):
        ranks.save(rank, state_of(1), AsyncStorageWriter(tmp_path / "step-1"))
    parts = list((tmp_path / "step-1").glob("__*.metadata"))
    removed = On("list", lambda _: [part.unlink() for part in parts], 1)
    with Checkpoints(hooked(tmp_path, after=removed)) as checkpoints:
        assert checkpoints.steps() == []
    assert removed.seen
    assert len(parts) == 2
