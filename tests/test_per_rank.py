"""`PerRank`: one entry a rank, with every planner and stager, and for those who look."""

import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from dcp_storage import (
    AsyncStorageReader,
    AsyncStorageWriter,
    Checkpoints,
    PerRank,
    ShardedLoadPlanner,
    open_checkpoint,
)
from dcp_storage.errors import ConfigError, MissingKeys, UnsupportedEntry, UnsupportedTensor

PLANNERS = {"ours": (None, None), "DCP's": (DefaultSavePlanner(), DefaultLoadPlanner())}
VALUES = {
    "number": 7,
    "none": None,
    "tensor": torch.get_rng_state(),
    "empty": {},
    "numpy": np.random.get_state(),  # noqa: NPY002 - what training scripts use
    "generator": np.random.default_rng(1).bit_generator.state,
    "python": random.getstate(),
    "nested": {"workers": [{"at": 3, "seed": torch.arange(3)}, OrderedDict(x=(1, 2))]},
}


def same(one, other):
    if isinstance(one, torch.Tensor | np.ndarray):
        return type(one) is type(other) and (one == other).all()
    if isinstance(one, dict):
        return type(one) is type(other) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("planners", PLANNERS.values(), ids=PLANNERS)
@pytest.mark.parametrize("how", ["save", "async_save"])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_it_comes_back_whatever_the_template_holds(tmp_path, planners, how, value):
    save, load = planners
    with Checkpoints(tmp_path, save_planner=save, load_planner=load) as checkpoints:
        state = {"own": PerRank(value), "deep": {"list": [PerRank(value), torch.ones(2)]}, "x": torch.ones(3)}
        getattr(checkpoints, how)(1, state)
        assert isinstance(state["own"], PerRank)
        for other in (None, {"something": "else"}, torch.zeros(1)):
            state["own"].value = state["deep"]["list"][0].value = other
            assert checkpoints.load(state) == 1
            assert same(state["own"].value, value)
            assert same(state["deep"]["list"][0].value, value)


def test_training_may_change_it_once_async_save_returned(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        state = {"own": PerRank({"tensor": torch.ones(1000), "array": np.ones(3), "list": [1]})}
        future = checkpoints.async_save(1, state)
        value = state["own"].value
        value["tensor"].zero_()
        value["array"][:] = 0
        value["list"].append(2)
        future.result(60)
        checkpoints.load(state)
        assert state["own"].value["tensor"].unique().tolist() == [1]
        assert state["own"].value["array"].tolist() == [1, 1, 1]
        assert state["own"].value["list"] == [1]


def test_who_looks_finds_a_tuple_by_rank(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"deep": {"own": PerRank({"at": 3})}})
    with open_checkpoint(tmp_path / "step-1") as checkpoint:
        assert checkpoint.keys() == ["deep.own.0"]
        assert checkpoint["deep.own.0"] == ({"at": 3},)


class Loader:
    """A data loader that keeps its place itself."""

    def __init__(self, at):
        self.at = at

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_a_stateful_keeps_its_place(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        loader = Loader(3)
        checkpoints.save(1, {"loader": PerRank(loader)})
        loader.at = 9
        assert checkpoints.load({"loader": PerRank(loader)}) == 1
        assert loader.at == 3


def test_what_may_be_missing_stays_as_it_is(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": 1})
        with pytest.raises(MissingKeys, match=r"own\.0"):
            checkpoints.load({"x": 0, "own": PerRank(5)})
    planner = ShardedLoadPlanner(allow_missing=("own.*",))
    with Checkpoints(tmp_path, load_planner=planner) as checkpoints:
        state = {"x": 0, "own": PerRank(5)}
        with pytest.warns(UserWarning, match=r"own\.0"):
            checkpoints.load(state)
        assert (state["x"], state["own"].value) == (1, 5)


def test_a_save_or_load_that_fails_leaves_the_state_dict_as_it_was(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        state = {"deep": {"own": PerRank(1)}, "lock": lambda: None}
        own = state["deep"]["own"]
        for call in (lambda: checkpoints.save(1, state), lambda: checkpoints.async_save(1, state).result(60)):
            with pytest.raises(UnsupportedEntry):
                call()
            assert state["deep"]["own"] is own
        checkpoints.save(1, {"deep": {"own": own}})
        with pytest.raises(MissingKeys):
            checkpoints.load(state)
        assert (state["deep"]["own"], own.value) == (own, 1)


@pytest.mark.parametrize("save", [dcp.save, lambda *args, **kwargs: dcp.async_save(*args, **kwargs).result(60)])
def test_without_checkpoints_it_is_refused_by_name(tmp_path, save):
    with pytest.raises(CheckpointException) as caught:
        save({"own": PerRank(1)}, storage_writer=AsyncStorageWriter(tmp_path), no_dist=True)
    cause = caught.value.failures[0][0]
    assert isinstance(cause, ConfigError | UnsupportedEntry)
    assert "Checkpoints" in str(cause)
    state = {"own": PerRank(1), "x": 1}
    dcp.save({"x": 1}, storage_writer=AsyncStorageWriter(tmp_path), no_dist=True)
    with pytest.raises(CheckpointException):
        dcp.load(state, storage_reader=AsyncStorageReader(tmp_path), planner=ShardedLoadPlanner(), no_dist=True)


def test_a_part_of_a_global_tensor_in_it_is_refused(tmp_path, process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    sharded = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UnsupportedTensor, match="DTensor"):
        checkpoints.save(1, {"own": PerRank({"weights": sharded})})
