"""What ranks wrote, joined with what was planned, item by item."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dcp_storage.config import Codec
from dcp_storage.dcp.saves.draft import build_draft
from dcp_storage.dcp.saves.results import Results, index_items
from dcp_storage.errors import ConfigError, CoverageError
from dcp_storage.format.manifest.draft import encode
from dcp_storage.format.manifest.manifest import decode
from dcp_storage.format.manifest.schema import Segment
from tests.drafts import columns_of

CODEC = Codec(block_bytes=4096, digest=None)
Item = tuple[str, tuple[int, ...], tuple[int, ...]]


@st.composite
def states(draw):
    """The chunks of some tensors, cut along their first dimension, and names of entries."""
    tensors = {}
    for name in draw(st.lists(st.sampled_from("abcdefg"), unique=True, max_size=4)):
        cuts, columns = draw(st.lists(st.integers(0, 700), min_size=1, max_size=5)), draw(st.integers(1, 3))
        tensors[name] = (cuts, columns, draw(st.integers(0, 2)))
    return tensors, draw(st.lists(st.sampled_from("uvwxyz"), unique=True, max_size=3))


def metadata_of(tensors, entries, chance):
    """Return what a planner would say, and the items that ranks write; their order is of no account."""
    planned, items = {}, []
    for name, (cuts, columns, dims) in tensors.items():
        tail = (columns,) * dims
        size, chunks = (sum(cuts), *tail), []
        for number, rows in enumerate(cuts):
            offsets, sizes = (sum(cuts[:number]), *[0] * dims), (rows, *tail)
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            items.append((name, offsets, sizes))
        chance.shuffle(chunks)
        planned[name] = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(size), chunks)
    for name in entries:
        planned[name] = BytesStorageMetadata()
        items.append((name, (), ()))
    chance.shuffle(items)
    return Metadata(planned), items


def nbytes_of(item: Item, chance) -> int:
    name, _, sizes = item
    return chance.randrange(9000) if name in "uvwxyz" else torch.Size(sizes).numel() * 4


def results_of(items: list[Item], rank: int, chance, codec=CODEC) -> Results:
    """Return what a rank tells that wrote these items: an object of its own, full."""
    segments, offset, sizes = [], 0, [nbytes_of(item, chance) for item in items]
    for size in sizes:
        lengths = [chance.randrange(1, 50) for _ in range(-(-size // codec.block_bytes))]
        checks = "".join(f"{chance.randrange(1 << 32):08x}" for _ in lengths)
        segments.append([Segment(0, offset, lengths, checks)] if lengths else [])
        offset += sum(lengths)
    indices = [MetadataIndex(name, torch.Size(offsets) if sizes else None) for name, offsets, sizes in items]
    names, rows = index_items(indices, sizes)
    return Results(names, rows, [f"{rank:016x}-{rank}-0.distcp.zst"] if offset else [], columns_of(segments), codec)


def draft_of(metadata, results, codec=CODEC):
    return build_draft(metadata, results, codec, save_id="s", world_size=len(results), rank=None, attempt=None, info={})


@given(states(), st.integers(1, 4), st.integers(0, 1 << 30))
def test_every_item_is_found_where_its_rank_put_it(state, ranks, seed):
    chance = random.Random(seed)
    metadata, items = metadata_of(*state, chance)
    shares = [items[rank::ranks] for rank in range(ranks)]
    results = [results_of(share, rank, chance) for rank, share in enumerate(shares)]
    manifest = decode(encode(draft_of(metadata, results)), "here")
    manifest.check_whole()
    assert manifest.tensors.keys() | manifest.bytes.keys() == metadata.state_dict_metadata.keys()
    for share, told in zip(shares, results, strict=True):
        stops = told.stored.stops.tolist()
        for number, (name, offsets, sizes) in enumerate(share):
            if name in manifest.tensors:
                boxes = manifest.tensors[name].boxes
                [at] = [at for at, box in enumerate(boxes) if box == (offsets, sizes)][:1]
                segments = manifest.tensors[name].segments(at)
            else:
                segments = manifest.bytes[name].segments
                assert manifest.bytes[name].size == told.items.nbytes[number]
            row = int(told.stored.segments[:number].sum())
            assert len(segments) == told.stored.segments[number]
            for segment in segments if 0 not in sizes else ():
                assert manifest.objects[segment.object].name == told.objects[0]
                assert (segment.offset, segment.stop) == (told.stored.offsets[row], stops[row])
    assert sum(stored.size for stored in manifest.objects) == sum(int(told.stored.lengths.sum()) for told in results)


@given(states().filter(lambda state: state[0] or state[1]), st.booleans(), st.integers(0, 1 << 30))
def test_an_item_too_few_or_too_many_is_named(state, missing, seed):
    chance = random.Random(seed)
    metadata, items = metadata_of(*state, chance)
    odd = chance.choice(items)
    if missing:
        items.remove(odd)
    else:
        items.append(odd)
    says = "is in the plan but no rank wrote it" if missing else "was written but is not in the plan"
    with pytest.raises(CoverageError, match=says) as caught:
        draft_of(metadata, [results_of(items, 0, chance)])
    assert caught.value.fqn == odd[0]


@pytest.mark.parametrize(
    "item", [("a", (1, 0), (2, 3)), ("a", (0,), (2,)), ("a", (0, 0), (2, 2)), ("b", (0, 0), (2, 3)), ("a", (), ())]
)
def test_what_is_written_otherwise_than_planned(item):
    chance = random.Random(1)
    metadata, _ = metadata_of({"a": ([2], 3, 1)}, [], chance)
    with pytest.raises(CoverageError, match=r"^(a at \[0, 0\] is in the plan|a was written|b was written)"):
        draft_of(metadata, [results_of([item], 0, chance)])


def test_ranks_that_save_with_different_codecs():
    metadata, items = metadata_of({"a": ([2, 2], 3, 1)}, [], random.Random(1))
    other = Codec(block_bytes=8192, digest=None)
    results = [results_of(items[:1], 0, random.Random(1)), results_of(items[1:], 1, random.Random(1), other)]
    with pytest.raises(ConfigError, match=r"^rank 1 saved with Codec\(.*8192.* and the coordinator with Codec\("):
        draft_of(metadata, results)
