"""What a load may leave alone, and what it says of it."""

import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner
from dcp_storage.errors import ConfigError, CoverageError, MissingKeys

STATE = {"model": {"w": torch.ones(3), "b": torch.ones(1)}, "step": 5}


@pytest.fixture
def saved(tmp_path):
    dcp.save(STATE, storage_writer=AsyncStorageWriter(tmp_path))
    return tmp_path


def load(path, state, **planning):
    """Load, and return the planner and what the load warned of."""
    planner = ShardedLoadPlanner(**planning)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dcp.load(state, storage_reader=AsyncStorageReader(path), planner=planner)
    said = [str(w.message) for w in caught if "torch.distributed is disabled" not in str(w.message)]
    assert len(said) <= 1
    return planner, said[0] if said else None


def load_error(path, state, **planning):
    with pytest.raises(CheckpointException) as raised:
        load(path, state, **planning)
    return raised.value.failures[0][0]


def new_state(**more):
    return {"model": {"w": torch.zeros(3), "b": torch.zeros(1)}, "step": 0, **more}


OPTIM = {"state": {"m": torch.zeros(3), "v": torch.zeros(3)}, "lr": 0.1}


def test_a_subtree_may_be_missing(saved):
    state = new_state(optim=OPTIM, head={"w": torch.zeros(2)})
    planner, said = load(saved, state, allow_missing=("optim.*", "head.w"))
    assert planner.skipped == ["head.w", "optim.state.m", "optim.state.v", "optim.lr"]
    assert planner.skipped_by == {"optim.*": planner.skipped[1:], "head.w": ["head.w"]}
    assert "4 of 7 entries are not in the checkpoint and keep their values: optim.state.m, " in said
    assert "('optim.*', 'head.w')" in said
    assert state["model"]["w"].tolist() == [1, 1, 1]
    assert state["step"] == 5
    assert state["optim"]["lr"] == 0.1


def test_what_no_pattern_allows_is_an_error(saved):
    state = new_state(optim=OPTIM, head={"w": torch.zeros(2)})
    error = load_error(saved, state, allow_missing=("optim.*",))
    assert isinstance(error, MissingKeys)
    assert error.fqns == ["head.w"]
    assert "optim" not in str(error).partition("Load without")[0]
    assert "allow_missing=('head.*',)" in str(error)
    assert state["step"] == 0
    error = load_error(saved, new_state(optim=OPTIM))
    assert "allow_missing=('optim.*',)" in str(error)


def test_patterns_may_match_what_is_there(saved):
    planner, said = load(saved, new_state(), allow_missing=("model.*", "st?p"))
    assert said is None
    assert planner.skipped_by == {"model.*": [], "st?p": []}


def test_a_pattern_that_matches_nothing_is_said(saved):
    _, said = load(saved, new_state(optim=OPTIM), allow_missing=("optim.*", "optm.*"))
    assert "patterns that match no entry of this state dict: optm.*" in said
    _, said = load(saved, new_state(), allow_missing=("Model.*",))
    assert said == "allow_missing has patterns that match no entry of this state dict: Model.*"


def test_a_partial_load_says_what_it_skips(saved):
    planner, said = load(saved, {"model": {"w": torch.zeros(3)}, "new": 1}, allow_partial_load=True)
    assert planner.skipped_by == {"*": ["new"]}
    assert said.startswith("1 of 2 entries are not in the checkpoint and keep their values: new ('*'). ")
    assert "The checkpoint has 2 that were not asked for: " in said
    assert "model.b" in said
    assert load(saved, new_state(), allow_partial_load=True)[1] is None


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_load_that_loads_nothing_says_so(saved, prefix):
    state = {f"{prefix}{name}": torch.zeros(3) for name in ("w", "b")}
    _, said = load(saved, state, allow_partial_load=True)
    assert said.startswith("Nothing is loaded: none of the 2 entries of this state dict are in the checkpoint")
    assert "model.w" in said


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("depth", [0, 1])
def test_an_empty_dict_where_the_checkpoint_holds_entries(saved, partial, depth):
    state = {"step": 0, "model": {}} if depth == 0 else {"step": 0, "x": {"model": {}}}
    if depth:
        dcp.save({"x": STATE, "step": 5}, storage_writer=AsyncStorageWriter(saved))
    _, said = load(saved, state, allow_partial_load=partial)
    where = "model" if depth == 0 else "x.model"
    assert said == f"{where} is empty here, but the checkpoint has 2 entries below it, which are not loaded"
    assert state["step"] == 5


@pytest.mark.parametrize(
    "state",
    [
        {"model": {"w": torch.zeros(3), "b": torch.zeros(1)}},
        {"step": 0, "other": {}},
        {"model": {"w": torch.zeros(3)}, "o": [{}]},
        {},
    ],
)
def test_ordinary_loads_are_silent(saved, state):
    assert load(saved, state)[1] is None


@pytest.mark.parametrize("patterns", ["optim.*", [5], [None]])
def test_impossible_patterns(patterns):
    with pytest.raises(ConfigError, match="allow_missing"):
        ShardedLoadPlanner(allow_missing=patterns)


@pytest.mark.parametrize(
    ("rename", "says"),
    [
        (lambda name: f"module.{name}", "module.model.b is model.b there"),
        (lambda name: name.replace("model.", "model._orig_mod."), "model._orig_mod.b is model.b there"),
        (lambda name: name.removeprefix("model."), "b is model.b there"),
        (lambda name: name.replace("model.w", "model.weigth_w"), None),
        (lambda name: name.replace("step", "stepp"), "Is stepp called step there?"),
    ],
)
def test_names_that_a_wrapper_changed_are_recognized(saved, rename, says):
    state = {rename(name): torch.zeros(3 if name == "model.w" else 1) for name in ("model.w", "model.b")}
    error = load_error(saved, state | {rename("step"): 0})
    assert isinstance(error, MissingKeys)
    assert str(saved) in str(error), "which checkpoint it is"
    assert (says or "Missing key") in str(error)
    assert says is not None or "there" not in str(error)


def test_every_entry_that_does_not_fit_is_named(saved):
    error = load_error(saved, {"model": {"w": torch.zeros(4), "b": torch.zeros(2)}, "step": torch.zeros(2)})
    assert isinstance(error, CoverageError)
    for name in ("model.w", "model.b", "step"):
        assert name in str(error)
    assert set(error.fqns) == {"model.w", "model.b", "step"}
    assert str(error).startswith(f"{saved}: 3 entries do not fit: ")
