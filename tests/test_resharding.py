"""Any tiling of any tensor over any number of ranks loads into any other, bit for bit."""

import itertools
import os
import shutil
from math import prod

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, Codec
from dcp_storage.geometry import Box, whole
from tests import fake_ranks
from tests.fake_ranks import Shards
from tests.states import bits, random_bits

EXAMPLES = int(os.environ.get("RESHARDING_EXAMPLES", "200"))
DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex128]
CODECS = [Codec(block_bytes=4096), Codec("none", block_bytes=4096), Codec(block_bytes=4096, byte_planes=False)]
runs = itertools.count()


@st.composite
def tilings(draw, shape):
    """Boxes that tile a shape, by cutting it at random, and some that are empty; in random order."""
    boxes = [whole(shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        cut = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, cut.sizes[dim]))
        for start, extent in ((0, at), (at, cut.sizes[dim] - at)):
            offsets, sizes = list(cut.offsets), list(cut.sizes)
            offsets[dim], sizes[dim] = cut.offsets[dim] + start, extent
            boxes.append(Box(tuple(offsets), tuple(sizes)))
    return draw(st.permutations(boxes))


@st.composite
def sharded(draw, shape):
    """One list of boxes for each rank; a rank may have none, and several may have the same one."""
    ranks: list[list[Box]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for box in draw(tilings(shape)):
        for owner in draw(st.sets(st.integers(0, len(ranks) - 1), min_size=1)):  # several have a replica
            ranks[owner].append(box)
    return ranks


@st.composite
def cases(draw):
    shape = tuple(draw(st.lists(st.integers(0, 40), max_size=4)))
    while prod(shape) > 200_000:
        shape = shape[1:]
    return (
        shape,
        draw(sharded(shape)),
        draw(sharded(shape)),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(CODECS)),
    )


def place(wrap, full, boxes, *, blank):
    shards = []
    for box in boxes:
        shard = full[box.slices].clone() if full.dim() else full.clone()
        shards.append((box, random_bits(full.dtype, box.sizes) if blank and box.numel else shard))
    return wrap(full, shards)


def by_hooks(full, shards):
    return Shards(tuple(full.shape), shards, full.dtype)


def by_wrapper(_, shards):
    return LocalShardsWrapper([tensor for _, tensor in shards], [box.offsets for box, _ in shards])


def pieces(value):
    if isinstance(value, Shards):
        return value.shards
    # A wrapper of no shards has a chunk all the same.
    boxes = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in value.local_chunks[: len(value.local_shards())]]
    return zip(boxes, value.local_shards(), strict=True)


def check(case, wrap_saved, wrap_loaded):
    shape, saved, loaded, dtype, codec = case
    torch.manual_seed(0)
    full = random_bits(dtype, shape) if prod(shape) else torch.empty(shape, dtype=dtype)
    url = (
        f"/dev/shm/dcp_storage_test_{os.getpid()}_{next(runs)}"
        if os.path.isdir("/dev/shm")
        else f"memory://r/{next(runs)}"
    )
    try:
        states = [{"table": place(wrap_saved, full, boxes, blank=False)} for boxes in saved]
        fake_ranks.save(states, lambda: AsyncStorageWriter(url, codec=codec))
        destinations = [{"table": place(wrap_loaded, full, boxes, blank=True)} for boxes in loaded]
        fake_ranks.load(destinations, lambda: AsyncStorageReader(url))
    finally:
        shutil.rmtree(url, ignore_errors=True)
    for destination in destinations:
        for box, tensor in pieces(destination["table"]):
            assert torch.equal(bits(tensor), bits(full[box.slices]) if full.dim() else bits(full))


@settings(max_examples=EXAMPLES)
@given(cases())
def test_any_tiling_loads_into_any_other(case):
    check(case, by_hooks, by_hooks)


@settings(max_examples=EXAMPLES)
@given(cases(), st.sampled_from([(by_wrapper, by_hooks), (by_hooks, by_wrapper), (by_wrapper, by_wrapper)]))
def test_local_shards_wrappers_load_into_any_tiling_and_back(case, wraps):
    if prod(case[0]):  # without an element, a wrapper tells nothing of its tensor's shape
        check(case, *wraps)
