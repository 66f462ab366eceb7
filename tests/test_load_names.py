"""Names of checkpoints that were saved by other code: containers stored whole, keys that are not text."""

import copy
import enum

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.dcp.planners.flatten import flatten
from dcp_storage.dcp.planners.names import names_of
from dcp_storage.errors import ConfigError, MissingKeys


def save(state, path, **planning):
    dcp.save(state, storage_writer=AsyncStorageWriter(path), planner=ShardedSavePlanner(**planning))


def load(state, path, **planning):
    planner = ShardedLoadPlanner(**planning)
    dcp.load(state, storage_reader=AsyncStorageReader(path), planner=planner)
    return planner


def load_error(state, path, **planning):
    with pytest.raises(CheckpointException) as raised:
        load(state, path, **planning)
    return raised.value.failures[0][0]


def metadata_of(paths, *, planner_data=True):
    names = [".".join(map(str, path)) for path in paths]
    return Metadata(
        dict.fromkeys(names, BytesStorageMetadata()),
        planner_data=dict(zip(names, paths, strict=True)) if planner_data else None,
    )


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("flag", [[{"lr": 1.0}], [{"a": {}}], {"b": 2}])
def test_an_entry_that_looks_old_does_not_change_other_names(tmp_path, flag, partial):
    """An empty list is an entry by today's names, and a list of dicts is not."""
    save({"flag": [], "o": {"pg": [{"lr": 0.5}, {"lr": 0.25}]}, "x": torch.ones(2)}, tmp_path)
    state = {"flag": flag, "o": {"pg": [{"lr": 9.0}, {"lr": 9.0}]}, "x": torch.zeros(2)}
    planner = load(state, tmp_path, allow_partial_load=partial)
    assert state["o"] == {"pg": [{"lr": 0.5}, {"lr": 0.25}]}
    assert state["flag"] == []
    assert state["x"].tolist() == [1, 1]
    assert not planner.skipped
    assert not planner.unexpected


def test_containers_within_one_that_was_stored_whole():
    state = {"a": {"old": {"b": {"c": 1}, "d": [2]}, "new": {"e": 3}}}
    for with_data in (True, False):
        metadata = metadata_of([("a", "old"), ("a", "new", "e")], planner_data=with_data)
        flat, mappings = names_of(state, metadata, nested=True)
        assert flat == {"a.old": {"b": {"c": 1}, "d": [2]}, "a.new.e": 3}
        assert mappings == {"a.old": ("a", "old"), "a.new.e": ("a", "new", "e")}


def test_tensors_in_tuples_were_stored_with_their_container():
    state = {"a": {"pair": (torch.ones(1), 2)}, "b": {"list": [torch.ones(1)]}}
    flat, _ = names_of(state, metadata_of([("a",), ("b",)]), nested=True)
    assert flat.keys() == {"a", "b.list.0"}


def test_a_container_with_entries_of_its_own_is_not_taken_whole():
    """Both are stored, as different code may: what lies below counts."""
    state = {"a": {"b": {"c": 1, "d": 2}}}
    flat, _ = names_of(state, metadata_of([("a", "b"), ("a", "b", "c")]), nested=True)
    assert flat == {"a.b.c": 1, "a.b.d": 2}


def test_names_with_dots():
    state = {"a.b": {"c": 1}, "d": {"e": 2}}
    flat, mappings = names_of(state, metadata_of([("a.b",), ("d", "e")]), nested=True)
    assert flat == {"a.b": {"c": 1}, "d.e": 2}
    assert mappings["a.b"] == ("a.b",)
    flat, _ = names_of(state, metadata_of([("a.b",), ("d", "e")], planner_data=False), nested=True)
    assert flat == {"a.b": {"c": 1}, "d.e": 2}


@pytest.mark.parametrize("empty", [[], {}])
def test_entries_below_what_is_empty_here(tmp_path, empty):
    save({"o": {"pg": [{"lr": 0.5}]}, "n": 1}, tmp_path)
    if empty == []:
        assert isinstance(load_error({"o": {"pg": empty}, "n": 0}, tmp_path), MissingKeys)
    else:
        state = {"o": empty, "n": 0}
        with pytest.warns(UserWarning, match="o is empty here, but the checkpoint has 1 entries below it"):
            load(state, tmp_path)
        assert state == {"o": {}, "n": 1}


class Key(enum.Enum):
    A = 1


KEYS = [0, -5, True, None, 1.5, (1, 2), Key.A, "a.b", ""]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("nested", [True, False])
def test_keys_that_are_not_text(tmp_path, key, nested):
    """At the top and below, by either planner of ours; stock loads the tensors of these."""
    state = {key: torch.arange(3), "x": {key: {"t": torch.ones(2), "n": 5}}, "y": {key: 7}}
    if not isinstance(key, str):
        state = {key: torch.arange(3)} if not nested else {"x": {key: {"t": torch.ones(2), "n": 5}}, "y": {key: 7}}
    save(state, tmp_path, flatten_state_dict=nested)
    blank = {k: torch.zeros(3, dtype=torch.int64) if isinstance(v, torch.Tensor) else None for k, v in state.items()}
    if nested:
        blank = copy.deepcopy(state)
        for value in blank.get("x", {}).values():
            value["t"].zero_()
            value["n"] = 0
        if "y" in blank:
            blank["y"] = {key: 0}
    load(blank, tmp_path, flatten_state_dict=nested)
    assert str(blank) == str(state)


@pytest.mark.parametrize("nested", [True, False])
def test_two_keys_of_one_text(tmp_path, nested):
    with pytest.raises(ConfigError, match="two entries named 0"):
        flatten({0: 1, "0": 2}, nested=nested)


@pytest.mark.parametrize("one", [3, [torch.ones(1)], {"a": 1}])
@pytest.mark.parametrize("other", [4, [torch.ones(2)], {"b": 1}])
def test_two_keys_of_one_text_within(one, other):
    with pytest.raises(ConfigError, match=r"two entries named d\.1"):
        flatten({"d": {"1": one, 1: other}}, nested=True)


scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab.", max_size=2)
nests = st.recursive(
    scalars | st.just("T"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


def with_tensors(value, fill):
    if value == "T":
        return torch.full((2,), fill)
    if isinstance(value, dict):
        return {key: with_tensors(inner, fill) for key, inner in value.items()}
    return [with_tensors(inner, fill) for inner in value] if isinstance(value, list) else value


@settings(max_examples=60)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=2), nests, min_size=1, max_size=4), st.booleans())
def test_what_stock_or_we_saved_loads_as_it_was(tmp_path_factory, nest, stock):
    path = tmp_path_factory.mktemp("nest")
    state = with_tensors(nest, 3.0)
    writer = dcp.FileSystemWriter(path) if stock else AsyncStorageWriter(path)
    try:
        dcp.save(state, storage_writer=writer, planner=None if stock else ShardedSavePlanner())
    except (CheckpointException, ValueError):
        return  # two names of one text
    loaded = with_tensors(nest, 0.0)
    if not flatten(state, nested=True)[0]:
        return
    load(loaded, path)
    assert str(loaded) == str(state)


@pytest.mark.parametrize("stored", [[], [None, None], {}, None])
@pytest.mark.parametrize("here", [[torch.ones(2), torch.ones(2)], {"a": {"b": torch.ones(2)}}])
def test_tensors_are_not_replaced_by_what_was_stored_whole(tmp_path, stored, here):
    save({"ema": stored, "x": torch.zeros(1)}, tmp_path)
    assert isinstance(load_error({"ema": here, "x": torch.ones(1)}, tmp_path), MissingKeys)
    state = {"ema": here, "x": torch.ones(1)}
    with pytest.warns(UserWarning, match="keep their values"):
        load(state, tmp_path, allow_partial_load=True)
    assert state == {"ema": here, "x": torch.zeros(1)}
