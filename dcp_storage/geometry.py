"""Boxes in an N-dimensional tensor and runs of its row-major elements: pure arithmetic, without torch."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

Shape = tuple[int, ...]


class Box(NamedTuple):
    """A hyper-rectangle: its first index and its extent in each dimension, in elements."""

    offsets: Shape
    sizes: Shape

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a zero-dimensional box."""
        return prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that cuts this box out of a tensor."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))

    def relative_to(self, origin: Shape) -> "Box":
        """Return the same box relative to `origin`."""
        return Box(tuple(o - z for o, z in zip(self.offsets, origin, strict=True)), self.sizes)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{o}:{o + s}" for o, s in zip(self.offsets, self.sizes, strict=True)) + "]"


def whole(shape: Shape) -> Box:
    """Return the box that covers a whole tensor."""
    return Box((0,) * len(shape), shape)


def intersect(a: Box, b: Box) -> Box | None:
    """Return the intersection of two boxes with the same number of dimensions, or `None` if it is empty."""
    offsets = tuple(map(max, a.offsets, b.offsets))
    stops = tuple(min(ao + az, bo + bz) for ao, az, bo, bz in zip(*a, *b, strict=True))
    if any(stop <= start for start, stop in zip(offsets, stops, strict=True)):
        return None
    return Box(offsets, tuple(stop - start for start, stop in zip(offsets, stops, strict=True)))


def contains(outer: Shape, box: Box) -> bool:
    """Return whether a box lies within a tensor of shape `outer`."""
    if not len(box.offsets) == len(box.sizes) == len(outer):
        return False
    for start, size, extent in zip(*box, outer, strict=True):
        if start < 0 or size < 0 or start + size > extent:
            return False
    return True


def flat_offset(shape: Shape, index: Shape) -> int:
    """Return the row-major position of an element."""
    position = 0
    for extent, i in zip(shape, index, strict=True):
        position = position * extent + i
    return position


def flat_extent(shape: Shape, box: Box) -> tuple[int, int]:
    """Return the row-major positions `start` and `stop` (exclusive) that bound a box's elements.

    If the box is one run, they differ by its number of elements.
    """
    if box.sizes == shape:
        return 0, box.numel
    start = flat_offset(shape, box.offsets)
    if not box.numel:
        return start, start
    return start, flat_offset(shape, tuple(o + s - 1 for o, s in zip(*box, strict=True))) + 1


def boxes_of_run(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """Cut the row-major run `start` to `stop` (exclusive) into at most 2N - 1 boxes that are each one run, in order."""
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    inner = prod(shape[1:])
    first, head = divmod(start, inner)
    last, tail = divmod(stop, inner)
    if first == last:
        yield from _in_row(first, shape, head, tail)
        return
    if head:
        yield from _in_row(first, shape, head, inner)
        first += 1
    if first < last:
        yield Box((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]))
    if tail:
        yield from _in_row(last, shape, 0, tail)


def _in_row(row: int, shape: Shape, start: int, stop: int) -> Iterator[Box]:
    for box in boxes_of_run(shape[1:], start, stop):
        yield Box((row, *box.offsets), (1, *box.sizes))


def subtract(box: Box, holes: Iterable[Box]) -> list[Box]:
    """Return disjoint boxes that cover what is left of `box` after `holes` are cut out of it."""
    left = [box] if box.numel else []
    for hole in holes:
        if not left:
            break
        left = [rest for part in left for rest in _cut(part, hole)]
    return left


def _cut(part: Box, hole: Box) -> Iterator[Box]:
    shared = intersect(part, hole)
    if shared is None:
        yield part
        return
    offsets, sizes = list(part.offsets), list(part.sizes)
    for dim, (start, extent) in enumerate(zip(*shared, strict=True)):
        before, after = start - offsets[dim], offsets[dim] + sizes[dim] - start - extent
        if before:
            yield Box(tuple(offsets), (*sizes[:dim], before, *sizes[dim + 1 :]))
        if after:
            yield Box((*offsets[:dim], start + extent, *offsets[dim + 1 :]), (*sizes[:dim], after, *sizes[dim + 1 :]))
        offsets[dim], sizes[dim] = start, extent


def find_overlap(boxes: Iterable[Box]) -> tuple[Box, Box] | None:
    """Return two boxes that share an element, or `None`."""
    filled = [box for box in boxes if box.numel]
    if len(filled) < 2 or not filled[0].sizes:  # noqa: PLR2004
        return (filled[0], filled[1]) if len(filled) > 1 else None
    dims = range(len(filled[0].sizes))
    sweep = max(dims, key=lambda dim: len({box.offsets[dim] for box in filled}))
    filled.sort(key=lambda box: box.offsets[sweep])
    if all(a.offsets[sweep] + a.sizes[sweep] <= b.offsets[sweep] for a, b in pairwise(filled)):
        return None
    active: list[Box] = []
    for box in filled:
        active = [other for other in active if other.offsets[sweep] + other.sizes[sweep] > box.offsets[sweep]]
        for other in active:
            if intersect(box, other):
                return other, box
        active.append(box)
    return None


def tiling_fault(shape: Shape, boxes: Sequence[Box]) -> str | None:
    """Describe how boxes fail to tile a tensor: out of bounds, an overlap or a gap. `None` if they tile it."""
    if len(boxes) == 1 and boxes[0] == whole(shape):
        return None
    for box in boxes:
        if not contains(shape, box):
            return f"part {box} is outside the tensor, whose shape is {list(shape)}"
    if overlap := find_overlap(boxes):
        return f"parts {overlap[0]} and {overlap[1]} overlap"
    if sum(box.numel for box in boxes) < prod(shape):
        # When sorted, each box cuts only the next one; in any other order each would meet all that is left.
        return f"no part covers {subtract(whole(shape), sorted(boxes))[0]} of shape {list(shape)}"
    return None
