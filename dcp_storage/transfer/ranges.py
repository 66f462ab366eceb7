"""Which blocks a read needs, and which byte ranges contain them: pure planning of a load."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dcp_storage.collector import gc_paused
from dcp_storage.format.codecs.blocks import CODECS
from dcp_storage.format.manifest.frames import StoredCodec
from dcp_storage.format.manifest.schema import Segment
from dcp_storage.geometry import Box, Shape, flat_offset

WASTE = 0.1
"""The maximum ratio of bytes fetched without need to bytes needed."""


class Block(NamedTuple):
    """One stored block that a read needs: the bytes `start` to `stop` of item `item`, and where they are stored."""

    item: int
    start: int
    stop: int
    object: int
    offset: int
    length: int
    check: str


class Fetch(NamedTuple):
    """One request: bytes `start` to `stop` of an object, and the blocks in them, in the order of their offsets."""

    object: int
    start: int
    stop: int
    blocks: list[Block]


def needed_blocks(shape: Shape, boxes: Iterable[Box], item_bytes: int, block_bytes: int) -> list[int]:
    """Return the numbers of the blocks of a row-major item that contain an element of any of the boxes, ascending."""
    count = -(-prod(shape) * item_bytes // block_bytes)
    if count <= 1:
        return [0] if any(box.numel for box in boxes) else []
    edges = np.zeros(count + 1, np.int64)
    for box in boxes:
        if box.numel:
            starts, run = _runs(shape, box, item_bytes, block_bytes)
            edges += np.bincount(starts * item_bytes // block_bytes, minlength=count + 1)
            edges -= np.bincount(((starts + run) * item_bytes - 1) // block_bytes + 1, minlength=count + 1)
    wanted: list[int] = np.flatnonzero(np.cumsum(edges[:-1])).tolist()
    return wanted


def _runs(shape: Shape, box: Box, item_bytes: int, block_bytes: int) -> tuple[NDArray[np.int64], int]:
    """Return where a box's row-major runs start, in elements, and how long each is.

    Runs so close that no whole block fits between them count as one: there are never more runs than blocks.
    """
    starts = np.array([flat_offset(shape, box.offsets)], np.int64)
    run = 1
    for dim in reversed(range(len(shape))):
        stride = prod(shape[dim + 1 :])
        if len(starts) == 1 and (stride - run) * item_bytes < block_bytes:
            run += stride * (box.sizes[dim] - 1)
        else:
            starts = np.add.outer(np.arange(box.sizes[dim], dtype=np.int64) * stride, starts).ravel()
    return starts, run


def locate(
    item: int, wanted: Iterable[int], segments: Sequence[Segment], raw_bytes: int, codec: StoredCodec
) -> Iterator[Block]:
    """Find an item's wanted blocks (ascending numbers) in its segments."""
    chars = CODECS[codec.compression].check_chars
    numbers = iter(wanted)
    number = next(numbers, None)
    first = 0
    for segment in segments:
        offset = segment.offset
        for index, length in enumerate(segment.lengths):
            if number is None:
                return
            if first + index == number:
                start = number * codec.block_bytes
                stop = min(start + codec.block_bytes, raw_bytes)
                check = segment.checks[index * chars : (index + 1) * chars]
                yield Block(item, start, stop, segment.object, offset, length, check)
                number = next(numbers, None)
            offset += length
        first += len(segment.lengths)


@gc_paused
def coalesce(blocks: Iterable[Block], max_gap_bytes: int, max_bytes: int) -> list[Fetch]:
    """Join blocks into few requests.

    A gap of unneeded bytes is read too if it is at most `max_gap_bytes` and all such gaps, smallest first, add up to at
    most a tenth of the bytes needed. No request is larger than `max_bytes` unless one block is.
    """
    ordered = sorted(blocks, key=lambda block: (block.object, block.offset))
    bridged = _bridge(ordered, max_gap_bytes)
    fetches: list[Fetch] = []
    for block in ordered:
        stop = block.offset + block.length
        last = fetches[-1] if fetches else None
        joins = last is not None and (block.offset <= last.stop or (last.object, last.stop, block.offset) in bridged)
        if last is not None and last.object == block.object and joins and stop - last.start <= max_bytes:
            last.blocks.append(block)
            fetches[-1] = last._replace(stop=max(last.stop, stop))
        else:
            fetches.append(Fetch(block.object, block.offset, stop, [block]))
    return fetches


def _bridge(ordered: Sequence[Block], max_gap_bytes: int) -> set[tuple[int, int, int]]:
    gaps = [
        (b.offset - a.offset - a.length, (a.object, a.offset + a.length, b.offset))
        for a, b in pairwise(ordered)
        if a.object == b.object
    ]
    budget = WASTE * sum(block.length for block in ordered)
    bridged = set()
    for gap, place in sorted(gaps):
        if gap > max_gap_bytes or gap > budget:
            break
        if gap > 0:
            budget -= gap
            bridged.add(place)
    return bridged
