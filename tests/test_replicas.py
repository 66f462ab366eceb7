"""Ranks that hold different data under one name: told before the commit, by name and rank."""

import argparse
import random
import warnings
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedSavePlanner
from dcp_storage.dcp.planners import save_planner
from dcp_storage.dcp.replicas import fingerprint
from dcp_storage.dcp.replicas.objects import object_digest
from dcp_storage.dcp.replicas.tensors import RUN_BYTES, RUNS, WHOLE_BYTES, sample_starts, tensor_digest
from dcp_storage.errors import ConfigError, ReplicaMismatch
from dcp_storage.format.dtypes import ITEM_BYTES
from tests.fake_ranks import plan_save


def save(states, path, policy="error", planners=None):
    """Save one state dict a rank, and return the plans that the ranks followed."""
    planners = planners or [ShardedSavePlanner(replica_policy=policy) for _ in states]
    writers = [AsyncStorageWriter(path) for _ in states]
    plans, metadata = plan_save(states, planners, writers)
    results = []
    for planner, writer, plan in zip(planners, writers, plans, strict=True):
        results.append(writer.write_data(planner.finish_plan(plan), planner).wait())
    writers[0].finish(metadata, results)
    return plans


def large(seed=0):
    return torch.randn(300, 100, generator=torch.Generator().manual_seed(seed))


def with_one(tensor, place, value):
    changed = tensor.clone()
    changed[place] = value
    return changed


def experts(order):
    return {f"experts.{number}.w": large(seed) for number, seed in enumerate(order)}


def nan(payload):
    return torch.tensor([0x7FC00000 + payload], dtype=torch.int32).view(torch.float32)


SMALL = torch.arange(1000.0)
ONE = [1]

DIFFERENT = {
    "one element of a small tensor": ({"x": SMALL}, {"x": with_one(SMALL, 999, -1)}, "x"),
    "the first element": ({"x": SMALL}, {"x": with_one(SMALL, 0, -1)}, "x"),
    "a large tensor everywhere": ({"x": large(0)}, {"x": large(1)}, "x"),
    "a large tensor that drifted": ({"x": large(0)}, {"x": large(0) * (1 + 1e-6)}, "x"),
    "a large tensor of another half": ({"x": large(0)}, {"x": torch.cat([large(0)[:150], large(1)[150:]])}, "x"),
    "two experts exchanged": (experts([0, 1]), experts([1, 0]), "experts.0.w"),
    "a large tensor shifted by a row": ({"x": large(0)}, {"x": large(0).roll(1, 0)}, "x"),
    "a large tensor transposed": ({"x": large(0)[:100]}, {"x": large(0)[:100].t().contiguous()}, "x"),
    "the sign of a zero": ({"x": torch.tensor([0.0])}, {"x": torch.tensor([-0.0])}, "x"),
    "the bits of a NaN": ({"x": nan(1)}, {"x": nan(2)}, "x"),
    "a boolean": ({"x": torch.tensor([True, False])}, {"x": torch.tensor([True, True])}, "x"),
    "a scalar": ({"x": torch.tensor(1)}, {"x": torch.tensor(2)}, "x"),
    "a number": ({"x": 1}, {"x": 2}, "x"),
    "a kind of number": ({"x": 1}, {"x": 1.0}, "x"),
    "a truth": ({"x": 1}, {"x": True}, "x"),
    "a float's sign": ({"x": 0.0}, {"x": -0.0}, "x"),
    "a string": ({"x": "a"}, {"x": "b"}, "x"),
    "text and bytes": ({"x": "a"}, {"x": b"a"}, "x"),
    "an order": ({"x": [1, 2]}, {"x": [2, 1]}, "x"),
    "a nesting": ({"x": ([1], [2])}, {"x": ([1, 2], [])}, "x"),
    "a list and a tuple": ({"x": [1]}, {"x": (1,)}, "x"),
    "a value in a dict": ({"x": ({"a": 1, "b": 2},)}, {"x": ({"a": 2, "b": 1},)}, "x"),
    "a set": ({"x": {1, 2}}, {"x": {1, 3}}, "x"),
    "an integer of many bytes": ({"x": 1 << 900}, {"x": 1 << 901}, "x"),
    "a random state": ({"x": random.Random(1).getstate()}, {"x": random.Random(2).getstate()}, "x"),
    "NumPy's random state": (
        {"x": np.random.RandomState(1).get_state()},
        {"x": np.random.RandomState(2).get_state()},
        "x",
    ),
    "torch's random state": (
        {"x": torch.Generator().manual_seed(1).get_state()},
        {"x": torch.Generator().manual_seed(2).get_state()},
        "x",
    ),
    "a tensor in a tuple": ({"x": (1, large(0))}, {"x": (1, large(1))}, "x"),
    "an object": ({"x": argparse.Namespace(a=1)}, {"x": argparse.Namespace(a=2)}, "x"),
    "a tensor in an object": ({"x": argparse.Namespace(a=large(0))}, {"x": argparse.Namespace(a=large(1))}, "x"),
}  # fmt: skip

SAME = {
    "tensors": ({"x": SMALL, "y": large()}, {"x": SMALL.clone(), "y": large()}),
    "strides": ({"x": large()}, {"x": large().t().contiguous().t()}),
    "a view of more": ({"x": large()}, {"x": torch.stack([large(), large(1)])[0]}),
    "a conjugate": ({"x": torch.complex(SMALL, SMALL)}, {"x": torch.complex(SMALL, -SMALL).conj()}),
    "a large conjugate": ({"x": torch.complex(large(), large())}, {"x": torch.complex(large(), -large()).conj()}),
    "a NaN": ({"x": nan(3)}, {"x": nan(3)}),
    "NaNs of Python": ({"x": float("nan")}, {"x": float("nan")}),
    "one list twice": ({"x": (ONE, ONE)}, {"x": ([1], [1])}),
    "a dict in another order": ({"x": ({"a": 1, "b": [2]},)}, {"x": ({"b": [2], "a": 1},)}),
    "a set in another order": ({"x": {f"a{n}" for n in range(50)}}, {"x": {f"a{n}" for n in reversed(range(50))}}),
    "arrays": ({"x": np.arange(6).reshape(2, 3)}, {"x": np.asfortranarray(np.arange(6).reshape(2, 3))}),
    "numbers": ({"x": 1, "y": None}, {"x": 1, "y": None}),
    "an object": ({"x": argparse.Namespace(a=1)}, {"x": argparse.Namespace(a=1)}),
    "nothing": ({"x": torch.zeros(0, 3)}, {"x": torch.zeros(0, 3)}),
    "only of one": ({"x": 1, "y": SMALL}, {}),
}


@pytest.mark.filterwarnings("ignore:x holds")
@pytest.mark.parametrize("odd", ["first", "last", "all but one"])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_named(tmp_path, name, world, odd):
    usual, other, fqn = DIFFERENT[name]
    states = [usual] * world
    states[{"first": 0, "last": -1, "all but one": 0}[odd]] = other
    if odd == "all but one":
        states = [usual, *[other] * (world - 1)]
    with pytest.raises(ReplicaMismatch, match=f"{fqn}.* \\(rank") as raised:
        save(states, tmp_path)
    assert fqn in raised.value.fqns
    apart = "rank 0 against rank" if odd != "last" else f"against rank {world - 1}"
    assert apart in str(raised.value)
    assert not (tmp_path / ".metadata").exists()
    with pytest.warns(UserWarning, match=f"{fqn}.* \\(rank"):
        save(states, tmp_path, "warn")
    AsyncStorageReader(tmp_path).read_metadata()


@pytest.mark.filterwarnings("ignore:x holds")
@pytest.mark.parametrize("name", SAME)
def test_what_is_the_same_is_silent(tmp_path, name):
    for states in (SAME[name], SAME[name][::-1]):
        save([*states, *states], tmp_path)


def test_every_group_of_ranks_is_named(tmp_path):
    states = [{"x": value} for value in (5, 7, 5, 9, 7)]
    with pytest.raises(ReplicaMismatch, match=r"x \(ranks 0, 2 against ranks 1, 4 against rank 3\)"):
        save(states, tmp_path)


def test_many_are_counted(tmp_path):
    states = [{f"x{number}": rank for number in range(20)} for rank in range(2)]
    with pytest.raises(ReplicaMismatch, match="x0 .*; and 15 more") as raised:
        save(states, tmp_path)
    assert len(raised.value.fqns) == 20


def test_one_warning(tmp_path):
    states = [{f"x{number}": rank for number in range(20)} for rank in range(2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(states, tmp_path, "warn")
    assert len([w for w in caught if "ranks hold different data" in str(w.message)]) == 1


@pytest.mark.filterwarnings("ignore:x holds")
def test_the_message_says_what_is_compared_by_its_pickle(tmp_path):
    with pytest.raises(ReplicaMismatch, match="may pickle differently"):
        save([{"x": argparse.Namespace(a=rank)} for rank in range(2)], tmp_path)
    with pytest.raises(ReplicaMismatch) as raised:
        save([{"x": [rank]} for rank in range(2)], tmp_path)
    assert "pickle" not in str(raised.value)


def test_trust_computes_nothing(tmp_path):
    states = [{"x": SMALL, "y": 1}, {"x": -SMALL, "y": 2}]
    with mock.patch.object(save_planner, "fingerprint", side_effect=AssertionError):
        save(states, tmp_path, "trust")


def test_what_is_not_shared_is_not_computed(tmp_path):
    states = [{f"x{rank}": SMALL, f"y{rank}": rank} for rank in range(3)]
    with mock.patch.object(fingerprint, "_digest", side_effect=AssertionError):
        save(states, tmp_path)


def test_with_plan_caching(tmp_path):
    """The first plan, and those that answer claims."""
    planners = [ShardedSavePlanner(enable_plan_caching=True, replica_policy="error") for _ in range(3)]
    alike = [{"x": SMALL, "y": 1, "z": large()} for _ in range(3)]
    save(alike, tmp_path, planners=planners)
    assert not save(alike, tmp_path, planners=planners)[0].usable
    for odd in range(3):
        states = [state | ({"z": large(1)} if rank == odd else {}) for rank, state in enumerate(alike)]
        with pytest.raises(ReplicaMismatch, match=r"z \("):
            save(states, tmp_path, planners=planners)
    save(alike, tmp_path, planners=planners)


def test_impossible_policy():
    with pytest.raises(ConfigError, match="replica_policy"):
        ShardedSavePlanner(replica_policy="maybe")


@given(st.integers(0, (1 << 64) - 1), st.integers(WHOLE_BYTES + 1, 1 << 40), st.sampled_from([1, 2, 4, 8, 16]))
def test_samples_lie_within_and_apart(seed, nbytes, item):
    count, run = -(-nbytes // item), RUN_BYTES // item
    starts = sample_starts(seed, count, run)
    assert starts == sample_starts(seed, count, run)
    assert len(starts) == RUNS
    assert all(0 <= start <= count - run for start in starts)
    assert all(start + run <= after for start, after in pairwise(starts))


def test_samples_are_not_at_the_same_places_for_every_name():
    assert len({tuple(sample_starts(seed, 1 << 20, 64)) for seed in range(50)}) == 50


@pytest.mark.parametrize("name", [name for name in ITEM_BYTES if hasattr(torch, name)])
@pytest.mark.parametrize("count", [10, 200_000])
def test_every_dtype_from_any_memory(name, count):
    dtype = getattr(torch, name)
    raw = torch.arange(count * dtype.itemsize).to(torch.uint8)
    flat = (raw % 2 if name == "bool" else raw).view(dtype)
    tensor = flat.view(10, count // 10)
    apart = torch.empty(count // 10, 20, dtype=torch.uint8).repeat(1, dtype.itemsize).view(dtype)[:, ::2].t()
    apart.copy_(tensor)
    assert not apart.is_contiguous() or count == 10
    assert tensor_digest(7, tensor) == tensor_digest(7, apart)
    assert tensor_digest(7, tensor) != tensor_digest(8, tensor)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
)


@given(values, values)
def test_values_are_told_apart_as_their_reprs_are(a, b):
    """But for the order of dicts, and NaNs of other bits."""

    def canonical(value):
        if isinstance(value, dict):
            return "dict", sorted((repr(k), canonical(v)) for k, v in value.items())
        if isinstance(value, list | tuple):
            return type(value).__name__, [canonical(inner) for inner in value]
        return "", repr(value)

    if "nan" not in repr((a, b)):
        assert (object_digest(a) == object_digest(b)) == (canonical(a) == canonical(b))
    assert object_digest(a) == object_digest(a)


def test_deep_and_circular_objects_have_fingerprints():
    deep = ()
    for _ in range(300):
        deep = (deep,)
    circle = []
    circle.append(circle)
    assert object_digest(deep) & 1
    assert object_digest(circle) & 1
    assert object_digest((circle,)) == object_digest((circle,))


def test_what_cannot_be_pickled_has_a_fingerprint():
    assert object_digest(lambda: 0) & 1
