"""The items of a body's frames: tensors, entries and their segments, checked and created on demand."""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from dcp_storage.format.codecs.blocks import CODECS
from dcp_storage.format.faults import Fault, require
from dcp_storage.format.manifest.boxes import Boxes, Cuts, Grid, Listed, Whole
from dcp_storage.format.manifest.columns import Columns, texts
from dcp_storage.format.manifest.frames import StoredCodec
from dcp_storage.format.manifest.schema import Column, EntryFrame, Layout, ListedBoxes, Segment, Stored, TensorFrame
from dcp_storage.format.manifest.validate import check_tensor
from dcp_storage.geometry import Box, Shape, contains, tiling_fault


class Digests(Protocol):
    """Gives the digests of a frame's segments, which are in a separate frame."""

    def __call__(self, count: int) -> list[str]:
        """Return the digests of `count` segments, or none if the checkpoint has no digests."""


class Segments:
    """The segments of the items of one frame, checked against their raw sizes and the objects.

    Args:
        stored: The frame.
        raw_bytes: Raw size of each item, an array of `int64`.
        codec: How its blocks are encoded.
        object_sizes: Size of each object, an array of `int64`.
        name: Gives the name of an item's entry.

    Attributes:
        digests: Gives the digests of the segments.

    Raises:
        Fault: They do not contain these items, or extend beyond an object.
    """

    digests: Digests

    def __init__(
        self, stored: Stored, raw_bytes: Any, codec: StoredCodec, object_sizes: Any, name: Callable[[int], str]
    ) -> None:
        self._name = name
        self._checks, self._chars = stored.checks, CODECS[codec.compression].check_chars
        self._lengths = stored.lengths
        self._first = self._cumulate(stored.segments, len(raw_bytes), len(stored.offsets), "segments")
        self._first_block = self._cumulate(stored.blocks, len(stored.offsets), len(stored.lengths), "blocks")
        self._objects = _expand(stored.objects, len(stored.offsets), "objects of segments")
        self._offsets = np.array(stored.offsets, np.int64)
        self._check_blocks(raw_bytes, codec)
        self._check_places(object_sizes)
        right = len(self._checks) == self._chars * len(self._lengths) and not self._checks.strip("0123456789abcdef")
        require(right, f"wrong number of check values, or they are not hexadecimal, after {name(0)}")

    def _cumulate(self, column: Column, rows: int, total: int, what: str) -> Any:
        counts = _expand(column, rows, what)
        # No count can be larger than the right sum.
        require(not rows or int(counts.max()) <= total, f"it counts {what} that are not listed")
        firsts = np.concatenate(([0], np.cumsum(counts)))
        require(int(firsts[-1]) == total, f"it counts {what} that are not listed, or lists too many")
        return firsts

    def _check_blocks(self, raw_bytes: Any, codec: StoredCodec) -> None:
        lengths = np.array(self._lengths, np.int64)
        of_item = self._first_block[self._first]
        blocks, needed = np.diff(of_item), -(-raw_bytes // codec.block_bytes)
        self._refuse(blocks != needed, lambda item: f"has {blocks[item]} blocks for {raw_bytes[item]} bytes")
        raw = np.full(len(lengths), codec.block_bytes, np.int64)
        filled = np.flatnonzero(blocks)
        raw[of_item[1:][filled] - 1] = (raw_bytes - (needed - 1) * codec.block_bytes)[filled]
        wrong = ~CODECS[codec.compression].fits(lengths, raw)
        if wrong.any():
            block = int(np.flatnonzero(wrong)[0])
            item = bisect_right(of_item, block) - 1
            raise Fault(f"{self._name(item)} has a block of {raw[block]} bytes stored in {lengths[block]}")

    def _check_places(self, object_sizes: Any) -> None:
        unknown = self._objects >= len(object_sizes)
        self._refuse_segments(unknown, lambda number: f"refers to object {self._objects[number]}, which is not listed")
        sizes = object_sizes[self._objects]
        stored = np.concatenate(([0], np.cumsum(np.array(self._lengths, np.int64))))[self._first_block]
        room = sizes - self._offsets
        self._refuse_segments(
            (room < 0) | (np.diff(stored) > room),
            lambda number: f"extends beyond object {self._objects[number]} ({sizes[number]} bytes)",
        )

    def _refuse(self, wrong: Any, says: Callable[[int], str]) -> None:
        if wrong.any():
            item = int(np.flatnonzero(wrong)[0])
            raise Fault(f"{self._name(item)} {says(item)}")

    def _refuse_segments(self, wrong: Any, says: Callable[[int], str]) -> None:
        if wrong.any():
            number = int(np.flatnonzero(wrong)[0])
            raise Fault(f"{self._name(bisect_right(self._first, number) - 1)} {says(number)}")

    def of(self, item: int) -> tuple[Segment, ...]:
        """Return the segments of an item."""
        return tuple(self._segment(number) for number in range(self._first[item], self._first[item + 1]))

    def digests_of(self, item: int) -> list[str]:
        """Return the digests of an item's segments, if any."""
        return self.digests(len(self._offsets))[self._first[item] : self._first[item + 1]]

    def columns(self) -> Columns:
        """Return all segments as columns."""
        digests = self.digests(len(self._offsets))
        return Columns(
            np.diff(self._first),
            np.diff(self._first_block),
            self._objects,
            self._offsets,
            np.array(self._lengths, np.int64),
            texts([self._checks], self._chars),
            texts(digests, len(digests[0]) if digests else 0),
        )

    def _segment(self, number: int) -> Segment:
        first, stop = int(self._first_block[number]), int(self._first_block[number + 1])
        checks = self._checks[first * self._chars : stop * self._chars]
        return Segment(int(self._objects[number]), int(self._offsets[number]), self._lengths[first:stop], checks)


def _expand(column: Column, rows: int, what: str) -> Any:
    if isinstance(column, int):
        return np.full(rows, column, np.int64)
    require(len(column) == rows, f"{len(column)} {what} instead of {rows}")
    return np.array(column, np.int64)


class TensorEntry:
    """A tensor: its dtype, its global shape, the boxes that tile it, and where each of these is stored.

    `planes` is the number of byte planes that each of its blocks is laid out in; 1 is none. `frame` contains the
    segments of all tensors in the same frame.
    """

    def __init__(self, dtype: str, planes: int, boxes: Boxes, segments: Segments, first: int) -> None:
        self.dtype = dtype
        self.planes = planes
        self.boxes = boxes
        self.frame = segments
        self._first = first

    @property
    def size(self) -> Shape:
        """Its global shape."""
        return self.boxes.size

    def segments(self, number: int) -> tuple[Segment, ...]:
        """Return where one of its boxes is stored, row-major, as one item."""
        return self.frame.of(self._first + number)

    def digests(self, number: int) -> list[str]:
        """Return the digests of the raw bytes of a box's segments; none if the checkpoint has no digests."""
        return self.frame.digests_of(self._first + number)


def decode_tensors(
    frame: TensorFrame, codec: StoredCodec, object_sizes: Any, digests: Digests, *, partial: bool
) -> dict[str, TensorEntry]:
    """Return the tensors of a frame; the boxes of `partial` ones need not tile them.

    Raises:
        Fault: Something in it is invalid.
    """
    columns = (frame.dtypes, frame.sizes, frame.planes, frame.layouts)
    even = all(len(column) == len(frame.names) for column in columns)
    require(even, "its columns of tensors have different lengths")
    left = len(frame.stored.offsets)  # each non-empty box is stored
    cut = []
    firsts, boxed = [0], 0
    raw_bytes: list[int] = []
    for fqn, dtype, size, planes, layout in zip(frame.names, *columns, strict=True):
        item_bytes = check_tensor(fqn, dtype, size, planes, CODECS[codec.compression])
        boxes = _boxes(fqn, size, layout, left, partial=partial)
        left -= len(boxes) if isinstance(boxes, Grid) else 0
        raw_bytes += [count * item_bytes for count in boxes.counts()]
        boxed += len(boxes)
        firsts.append(boxed)
        cut.append((dtype, planes, boxes))
    sizes = np.array(raw_bytes, np.int64)
    segments = Segments(
        frame.stored, sizes, codec, object_sizes, lambda item: frame.names[bisect_right(firsts, item) - 1]
    )
    segments.digests = digests
    return {
        fqn: TensorEntry(*each, segments, first) for fqn, each, first in zip(frame.names, cut, firsts, strict=False)
    }


def _boxes(fqn: str, size: Shape, layout: Layout, most: int, *, partial: bool) -> Boxes:
    """Return the boxes of a tensor. A grid, whose boxes are all stored, may have at most as many as listed segments."""
    if layout is None:
        return Whole(size)
    if isinstance(layout, ListedBoxes):
        dims = len(size)
        require(all(len(box) == 2 * dims for box in layout.boxes), f"{fqn} has a box of wrong dimensions")
        boxes = [Box(tuple(box[:dims]), tuple(box[dims:])) for box in layout.boxes]
        inside = all(contains(size, box) for box in boxes)
        require(inside, f"{fqn} has a part outside its shape {list(size)}")
        fault = None if partial else tiling_fault(size, boxes)
        require(fault is None, f"{fqn}: {fault}")
        return Listed(size, boxes)
    require(len(layout) == len(size) and bool(size) and all(size), f"{fqn} has a grid of wrong dimensions")
    number, starts = 1, []
    for cuts, extent in zip(layout, size, strict=True):
        starts.append(_starts(fqn, cuts, extent))
        number *= len(starts[-1])
        require(number <= most, f"{fqn} has more parts than are stored")
    return Grid(size, starts)


def _starts(fqn: str, cuts: Cuts, extent: int) -> Sequence[int]:
    if isinstance(cuts, int):
        require(cuts >= 1, f"{fqn} is cut every {cuts} elements")
        return range(0, extent, cuts)
    ascending = all(a < b for a, b in itertools.pairwise(cuts))
    require(bool(cuts) and cuts[0] == 0 and ascending and cuts[-1] < extent, f"{fqn} has invalid cuts")
    return cuts


class BytesEntry:
    """An entry that is not a tensor: its raw size in bytes, and where it is stored."""

    def __init__(self, size: int, segments: Segments, item: int) -> None:
        self.size = size
        self.frame = segments
        self._item = item

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Where it is stored, as one item."""
        return self.frame.of(self._item)

    @property
    def digests(self) -> list[str]:
        """The digests of the raw bytes of its segments; none if the checkpoint has no digests."""
        return self.frame.digests_of(self._item)


def decode_entries(frame: EntryFrame, codec: StoredCodec, object_sizes: Any, digests: Digests) -> dict[str, BytesEntry]:
    """Return the entries of a frame.

    Raises:
        Fault: Something in it is invalid.
    """
    require(len(frame.names) == len(frame.sizes), "its columns of entries have different lengths")
    sizes = np.array(frame.sizes, np.int64)
    segments = Segments(frame.stored, sizes, codec, object_sizes, frame.names.__getitem__)
    segments.digests = digests
    return {
        fqn: BytesEntry(size, segments, item)
        for item, (fqn, size) in enumerate(zip(frame.names, frame.sizes, strict=True))
    }
