from math import prod

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dcp_storage.format.manifest.frames import StoredCodec
from dcp_storage.format.manifest.schema import Segment
from dcp_storage.transfer.ranges import WASTE, Block, coalesce, locate, needed_blocks
from tests.test_geometry import boxes_in, shapes

CODEC = StoredCodec("none", 16, 1)


@given(shapes, st.data(), st.sampled_from([1, 2, 4, 8]), st.sampled_from([16, 32, 64]))
def test_needed_blocks_are_those_that_hold_a_wanted_element(shape, data, item_bytes, block_bytes):
    boxes = [data.draw(boxes_in(shape)) for _ in range(data.draw(st.integers(0, 3)))]
    wanted = np.zeros(shape, bool)
    for box in boxes:
        wanted[box.slices] = True
    elements = np.flatnonzero(wanted.ravel())
    assert needed_blocks(shape, boxes, item_bytes, block_bytes) == sorted(set(elements * item_bytes // block_bytes))


def test_a_column_of_a_tall_table_needs_all_of_its_blocks_and_little_memory():
    from dcp_storage.geometry import Box

    shape = (50_000_000, 8)
    blocks = needed_blocks(shape, [Box((0, 3), (shape[0], 1))], 4, 1 << 20)
    assert blocks == list(range(-(-prod(shape) * 4 // (1 << 20))))


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), max_size=4), st.data())
def test_locate_finds_blocks_across_segments(lengths, data):
    segments, checks, places = [], iter(range(100)), []
    for number, of_segment in enumerate(lengths):
        offset = data.draw(st.integers(0, 50))
        names = [f"{next(checks):016x}" for _ in of_segment]
        segments.append(Segment(number, offset, tuple(of_segment), "".join(names)))
        for length, name in zip(of_segment, names, strict=True):
            places.append((number, offset, length, name))
            offset += length
    raw_bytes = max(0, len(places) * 16 - 3)
    wanted = sorted(data.draw(st.sets(st.integers(0, len(places) - 1)))) if places else []
    found = list(locate(7, wanted, segments, raw_bytes, CODEC))
    assert [block[3:] for block in found] == [places[number] for number in wanted]
    assert [(block.item, block.start) for block in found] == [(7, number * 16) for number in wanted]
    assert all(block.stop == min(block.start + 16, raw_bytes) for block in found)


@st.composite
def stored_blocks(draw):
    blocks = []
    for number in range(draw(st.integers(0, 3))):
        offset = 0
        for index in range(draw(st.integers(0, 12))):
            offset += draw(st.integers(0, 30))
            length = draw(st.integers(1, 40))
            blocks.append(Block(0, index, index + 1, number, offset, length, ""))
            offset += length
    return draw(st.permutations(blocks))


@given(stored_blocks(), st.integers(0, 40), st.integers(1, 200))
def test_fetches_hold_every_block_once_within_the_limits(blocks, max_gap, max_bytes):
    fetches = coalesce(blocks, max_gap, max_bytes)
    assert sorted(block for fetch in fetches for block in fetch.blocks) == sorted(blocks)
    for fetch in fetches:
        assert fetch.start == fetch.blocks[0].offset
        assert fetch.stop == max(block.offset + block.length for block in fetch.blocks)
        assert all(block.object == fetch.object for block in fetch.blocks)
        assert fetch.stop - fetch.start <= max_bytes or len(fetch.blocks) == 1
    needed = sum(block.length for block in blocks)
    fetched = sum(fetch.stop - fetch.start for fetch in fetches)
    assert needed <= fetched <= (1 + WASTE) * needed


def test_the_smallest_gaps_are_bridged_first():
    places = [(0, 100), (105, 100), (230, 100)]  # gaps of 5 and of 25, a budget of 30
    blocks = [Block(0, 0, 0, 0, offset, length, "") for offset, length in places]
    assert [(f.start, f.stop) for f in coalesce(blocks, 100, 10_000)] == [(0, 330)]
    assert [(f.start, f.stop) for f in coalesce(blocks, 10, 10_000)] == [(0, 205), (230, 330)]


def test_blocks_side_by_side_need_no_gap():
    blocks = [Block(0, 0, 0, 0, offset, 10, "") for offset in range(0, 100, 10)]
    assert len(coalesce(blocks, 0, 10_000)) == 1
    assert [f.stop - f.start for f in coalesce(blocks, 0, 40)] == [40, 40, 20]
