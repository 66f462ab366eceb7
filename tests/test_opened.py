"""Checkpoints without a template: slices, states, names, of every kind of checkpoint."""

import math
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemWriter

from dcp_storage import AsyncStorageWriter, Codec, ShardedSavePlanner, open_checkpoint
from dcp_storage.errors import (
    BlockCorrupt,
    CheckpointNotFound,
    CheckpointReplaced,
    ConfigError,
    CoverageError,
    MissingKeys,
    UnsupportedEntry,
)
from dcp_storage.geometry import Box
from tests import fake_ranks
from tests.fake_ranks import Shards
from tests.states import assert_same

STATE = {
    "model": {
        "embed": torch.arange(7 * 11 * 13).reshape(7, 11, 13),
        "half": torch.randn(33, 5).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "flags": torch.rand(9) > 0.5,
        "complex": torch.randn(6, dtype=torch.complex64),
    },
    "step": 7,
    "names": ["a", {"b": (1, None)}],
}
FLAT = {f"model.{name}": tensor for name, tensor in STATE["model"].items()}
KINDS = ["ours", "ours, not in planes", "ours, not compressed", "stock"]


def save(path, kind, state=STATE):
    codecs = {
        "ours": Codec(block_bytes=4096),
        "ours, not in planes": Codec(block_bytes=4096, byte_planes=False),
        "ours, not compressed": Codec("none", block_bytes=4096),
    }
    if kind == "stock":
        dcp.save(state, storage_writer=FileSystemWriter(path), no_dist=True)
    else:
        writer = AsyncStorageWriter(path, codec=codecs[kind], info={"step": 7, "metrics": {"loss": 0.25}})
        dcp.save(state, storage_writer=writer, planner=ShardedSavePlanner(), no_dist=True)


@pytest.fixture(scope="module", params=KINDS)
def path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("opened")
    save(path, request.param)
    return path


def test_what_it_holds(path):
    with open_checkpoint(path) as checkpoint:
        assert set(FLAT) | {"step"} <= set(checkpoint)
        assert checkpoint.keys() == sorted(checkpoint)
        assert len(checkpoint) == len(checkpoint.keys())
        assert "model.embed" in checkpoint
        assert "embed" not in checkpoint
        assert checkpoint["step"] == 7
        assert checkpoint["names.1.b"] == (1, None)
        for name, tensor in FLAT.items():
            view = checkpoint[name]
            assert (view.shape, view.dtype, view.nbytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
            assert torch.equal(view[...], tensor)
        assert str(path) in repr(checkpoint)


def test_info(tmp_path):
    save(tmp_path, "ours")
    assert open_checkpoint(tmp_path).info == {"step": 7, "metrics": {"loss": 0.25}}
    save(tmp_path / "stock", "stock")
    assert open_checkpoint(tmp_path / "stock").info == {}


@pytest.mark.parametrize("info", [{"x": "y" * 5000}, {"x": {1, 2}}, {"x": math.nan}, {"x": object()}, [("a",)]])
def test_info_that_is_none(tmp_path, info):
    with pytest.raises(ConfigError, match="info is"):
        AsyncStorageWriter(tmp_path, info=info)


def indices(extent):
    edge = st.none() | st.integers(-extent - 2, extent + 2)
    pieces = st.builds(slice, edge, edge, st.none() | st.integers(1, 4))
    return pieces | st.integers(-extent, extent - 1) if extent else pieces


@settings(max_examples=150)
@given(data=st.data())
def test_any_basic_index_is_as_torch_s(path, data):
    with open_checkpoint(path) as checkpoint:
        name = data.draw(st.sampled_from(sorted(FLAT)))
        tensor = FLAT[name]
        dims = data.draw(st.integers(0, tensor.dim()))
        index = [data.draw(indices(extent)) for extent in tensor.shape[:dims]]
        if data.draw(st.booleans()):
            tail = data.draw(st.integers(0, tensor.dim() - dims))
            index.append(...)
            index += [data.draw(indices(extent)) for extent in tensor.shape[tensor.dim() - tail :]] if tail else []
        index = tuple(index)
        found = checkpoint[name][index]
        assert found.shape == tensor[index].shape
        assert torch.equal(found, tensor[index])


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (7, "index 7 is out of range in dimension 0, of size 7"),
        ((0, -12), "index -12 is out of range in dimension 1"),
        (slice(None, None, -1), "a step of -1"),
        ((0, 0, 0, 0), "4 indices for 3 dimensions"),
        ((..., ...), "at most one `...`"),
        (None, "use integers"),
        (True, "use integers"),
        ([0, 1], "use integers"),
        (torch.tensor([0]), "use integers"),
        ("a", "use integers"),
        (1.0, "use integers"),
    ],
)
def test_indices_that_cannot_be_taken(path, index, says):
    with pytest.raises(IndexError, match=says):
        open_checkpoint(path)["model.embed"][index]


def test_rows_one_by_one(path):
    checkpoint = open_checkpoint(path)
    for name in ("model.embed", "model.half", "model.empty"):
        rows = list(checkpoint[name])
        assert len(rows) == len(checkpoint[name]) == len(FLAT[name])
        assert all(map(torch.equal, rows, FLAT[name]))
    for use in (len, list):
        with pytest.raises(TypeError, match="no dimensions"):
            use(checkpoint["model.scalar"])


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64])
def test_numpy_s_integers_are_integers(tmp_path, kind):
    rows = torch.arange(120 * 700).reshape(120, 700)
    save(tmp_path, "ours", {"rows": rows})
    view = open_checkpoint(tmp_path)["rows"]
    for row in (0, 1, 46, 47, 93, 119):
        assert torch.equal(view[kind(row)], rows[row])
        assert torch.equal(view[kind(row), kind(5) : kind(100)], rows[row, 5:100])


def test_a_state(path):
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint.load(["model.*"], rename={"model.": ""}), STATE["model"])
        assert_same(checkpoint.load(["step", "model.half"]), {"step": 7, "model.half": FLAT["model.half"]})
        everything = checkpoint.load()
        assert everything.keys() == set(checkpoint)
        assert_same({name: everything[name] for name in FLAT}, FLAT)
        assert checkpoint.load([]) == {}
        renamed = checkpoint.load(["model.[eh]*"], rename={"model.": "m/", "model.e": "E"})
        assert set(renamed) == {"Embed", "Empty", "m/half"}, "the longest beginning counts"


def test_names_that_are_not_there(path):
    with open_checkpoint(path) as checkpoint:
        for ask in (lambda: checkpoint["model.embde"], lambda: checkpoint.load(["step", "model.embde"])):
            with pytest.raises(MissingKeys, match=r"has no model\.embde \(did you mean model\.embed") as caught:
                ask()
            assert caught.value.fqns == ("model.embde",)
        with pytest.raises(MissingKeys, match=r"optim\.\*"):
            checkpoint.load(["optim.*"])
        with pytest.raises(ConfigError, match="rename turns several names into x"):
            checkpoint.load(["model.half", "step"], rename={"model.half": "x", "step": "x"})
        with pytest.raises(ConfigError, match="pass a list"):
            checkpoint.load("model.*")


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointNotFound):
        open_checkpoint(tmp_path)


def test_only_the_blocks_of_the_rows_are_read(tmp_path):
    tensor = torch.randn(4096, 64)
    save(tmp_path, "ours", {"w": tensor})
    moved = []

    @contextmanager
    def count(operation, url, raw_bytes):
        yield lambda raw_bytes, stored_bytes: moved.append(raw_bytes)

    rows = open_checkpoint(tmp_path, observer=count)["w"][1000:1016]
    assert torch.equal(rows, tensor[1000:1016])
    assert sum(moved) <= 2 * 4096


def rows(tensor, start, stop):
    """Return the shard of a rank that holds these rows."""
    box = Box((start, 0), (stop - start, tensor.shape[1]))
    return Shards(tuple(tensor.shape), [(box, tensor[start:stop].clone())], tensor.dtype)


@settings(max_examples=30)
@given(data=st.data())
def test_slices_across_shards(tmp_path_factory, data):
    """A tensor that several ranks saved, in any row cuts."""
    path = tmp_path_factory.mktemp("shards")
    tensor = torch.randn(24, 6)
    cuts = sorted(data.draw(st.sets(st.integers(1, 23), max_size=3)))
    edges = [0, *cuts, 24]
    states = [{"w": rows(tensor, start, stop)} for start, stop in pairwise(edges)]
    fake_ranks.save(states, lambda: AsyncStorageWriter(path))
    start, stop = sorted((data.draw(st.integers(0, 24)), data.draw(st.integers(0, 24))))
    column = data.draw(st.integers(0, 5))
    view = open_checkpoint(path)["w"]
    assert torch.equal(view[start:stop], tensor[start:stop])
    assert torch.equal(view[:, column], tensor[:, column])


@pytest.mark.filterwarnings("ignore:x holds tests.test_opened.Own")
def test_entries_of_other_types_need_listing(tmp_path):
    save(tmp_path, "ours", {"x": Own(3), "y": 1})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint["y"] == 1
        with pytest.raises(UnsupportedEntry):
            checkpoint["x"]
    assert open_checkpoint(tmp_path, allowed_types=[Own])["x"].value == 3
    assert open_checkpoint(tmp_path, trust="all")["x"].value == 3


class Own:
    def __init__(self, value):
        self.value = value


def test_damage_is_named(tmp_path):
    save(tmp_path, "ours")
    checkpoint = open_checkpoint(tmp_path)
    for file in tmp_path.glob("*.distcp*"):
        file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(BlockCorrupt, match=r"model\.embed"):
        checkpoint["model.embed"][0]


def test_one_that_was_replaced_is_followed_where_it_holds_the_same(tmp_path):
    save(tmp_path, "ours", {"w": torch.zeros(100)})
    checkpoint = open_checkpoint(tmp_path)
    save(tmp_path, "ours", {"w": torch.ones(100)})
    assert torch.equal(checkpoint["w"][...], torch.ones(100))
    save(tmp_path, "ours", {"w": torch.full((100,), 2.0)})
    with pytest.raises(CheckpointReplaced):  # what was read before is not of that save
        checkpoint["w"][:50]


def test_memory_urls_and_path_objects():
    save("memory://opened/step-1", "ours")
    with open_checkpoint("memory://opened/step-1") as checkpoint:
        assert torch.equal(checkpoint["model.embed"][2], FLAT["model.embed"][2])
        assert checkpoint.url == "memory://opened/step-1"


def test_a_part_says_what_it_lacks(tmp_path, as_rank):
    as_rank(0, 2)
    tensor = torch.randn(8, 3)
    writer = AsyncStorageWriter(tmp_path)
    dcp.save({"w": rows(tensor, 0, 4)}, storage_writer=writer, planner=ShardedSavePlanner(), no_dist=True)
    view = open_checkpoint(tmp_path)["w"]
    assert torch.equal(view[1:3], tensor[1:3])
    with pytest.raises(CoverageError, match="rank 0 of 2"):
        view[...]
