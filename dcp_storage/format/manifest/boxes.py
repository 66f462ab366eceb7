"""The boxes that tile a stored tensor, in row-major order of their offsets: usually a grid, which needs no list."""

from abc import abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import product
from math import prod
from typing import Any, overload

import numpy as np

from dcp_storage.geometry import Box, Shape, intersect, whole

Cuts = int | list[int]
"""Where the boxes of a grid begin along one dimension: at the multiples of a number, or at each number of a list."""


class Boxes(Sequence[Box]):
    """A sequence of boxes."""

    size: Shape

    @abstractmethod
    def near(self, wanted: Box) -> list[int]:
        """Return the numbers of the boxes that share an element with `wanted`, ascending."""

    @abstractmethod
    def at(self, offsets: Shape) -> int | None:
        """Return the number of the first box that begins at `offsets`."""

    @abstractmethod
    def counts(self) -> list[int]:
        """Return the number of elements of each box."""

    @overload
    def __getitem__(self, number: int) -> Box: ...
    @overload
    def __getitem__(self, number: slice) -> list[Box]: ...
    def __getitem__(self, number: int | slice) -> Box | list[Box]:
        if isinstance(number, slice):
            return [self._box(each) for each in range(len(self))[number]]
        return self._box(range(len(self))[number])

    @abstractmethod
    def _box(self, number: int) -> Box: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Boxes) and self.size == other.size and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class Whole(Boxes):
    """One box that covers a whole tensor."""

    def __init__(self, size: Shape) -> None:
        self.size = size

    def __len__(self) -> int:
        return 1

    def _box(self, number: int) -> Box:  # noqa: ARG002 - there is one
        return whole(self.size)

    def near(self, wanted: Box) -> list[int]:
        """Return the only box, if it overlaps."""
        return [0] if intersect(wanted, whole(self.size)) else []

    def at(self, offsets: Shape) -> int | None:
        """Return the only box, if it begins at `offsets`."""
        return None if any(offsets) or len(offsets) != len(self.size) else 0

    def counts(self) -> list[int]:
        """Return the number of elements."""
        return [prod(self.size)]


class Grid(Boxes):
    """The product of intervals along each dimension; `starts` are where these begin, the first of them 0."""

    def __init__(self, size: Shape, starts: Sequence[Sequence[int]]) -> None:
        self.size = size
        self._starts = starts
        self._shape = tuple(map(len, starts))

    def __len__(self) -> int:
        return prod(self._shape)

    def _box(self, number: int) -> Box:
        places = [0] * len(self._shape)
        for dim in reversed(range(len(self._shape))):
            number, places[dim] = divmod(number, self._shape[dim])
        offsets = tuple(starts[place] for starts, place in zip(self._starts, places, strict=True))
        return Box(offsets, tuple(self._extent(dim, place) for dim, place in enumerate(places)))

    def _extent(self, dim: int, place: int) -> int:
        starts = self._starts[dim]
        return (starts[place + 1] if place + 1 < len(starts) else self.size[dim]) - starts[place]

    def near(self, wanted: Box) -> list[int]:
        """Return the part of the grid that a box overlaps."""
        if not wanted.numel:
            return []
        reach = []
        for starts, offset, extent in zip(self._starts, *wanted, strict=True):
            reach.append(range(max(0, bisect_right(starts, offset) - 1), bisect_left(starts, offset + extent)))
        return [self._number(places) for places in product(*reach)]

    def _number(self, places: Sequence[int]) -> int:
        number = 0
        for length, place in zip(self._shape, places, strict=True):
            number = number * length + place
        return number

    def at(self, offsets: Shape) -> int | None:
        """Return the box that begins at `offsets`."""
        if len(offsets) != len(self._starts):
            return None
        places = [bisect_left(starts, offset) for starts, offset in zip(self._starts, offsets, strict=True)]
        for starts, place, offset in zip(self._starts, places, offsets, strict=True):
            if place == len(starts) or starts[place] != offset:
                return None
        return self._number(places)

    def counts(self) -> list[int]:
        """Return the number of elements of each."""
        counts = np.ones(1, np.int64)
        for starts, extent in zip(self._starts, self.size, strict=True):
            counts = np.multiply.outer(counts, np.diff(np.array([*starts, extent], np.int64))).ravel()
        numbers: list[int] = counts.tolist()
        return numbers


class Listed(Boxes):
    """Boxes in any order and of any shape."""

    def __init__(self, size: Shape, boxes: Sequence[Box]) -> None:
        self.size = size
        self._boxes = boxes

    def __len__(self) -> int:
        return len(self._boxes)

    def _box(self, number: int) -> Box:
        return self._boxes[number]

    def __iter__(self) -> Iterator[Box]:
        return iter(self._boxes)

    def near(self, wanted: Box) -> list[int]:
        """Return those that a box overlaps; if there are many, all are compared at once."""
        numbers = range(len(self._boxes)) if len(self._boxes) < 8 or not self.size else self._candidates(wanted)  # noqa: PLR2004
        return [number for number in numbers if intersect(wanted, self._boxes[number])]

    def _candidates(self, wanted: Box) -> list[int]:
        starts, stops = self._bounds
        first, last = np.array(wanted.offsets), np.array(wanted.offsets) + np.array(wanted.sizes)
        found: list[int] = np.flatnonzero(((starts < last) & (stops > first)).all(axis=1)).tolist()
        return found

    @cached_property
    def _bounds(self) -> tuple[Any, Any]:
        starts = np.array([box.offsets for box in self._boxes], np.int64)
        return starts, starts + np.array([box.sizes for box in self._boxes], np.int64)

    def at(self, offsets: Shape) -> int | None:
        """Return the first that begins at `offsets`."""
        return self._firsts.get(offsets)

    @cached_property
    def _firsts(self) -> dict[Shape, int]:
        return {box.offsets: number for number, box in reversed(list(enumerate(self._boxes)))}

    def counts(self) -> list[int]:
        """Return the number of elements of each."""
        return [box.numel for box in self._boxes]


def grid_of(size: Shape, offsets: Any, sizes: Any) -> list[Cuts] | None:
    """Return the cuts of the grid that boxes form, or `None` if they are not a grid. Their offsets must ascend.

    `offsets` and `sizes` are arrays of `int64`, with a row for each box.
    """
    if not size or not all(size) or len(offsets) < 1:
        return None
    starts = [np.unique(offsets[:, dim]) for dim in range(len(size))]
    if prod(map(len, starts)) != len(offsets) or any(cuts[0] for cuts in starts):
        return None
    extents = [np.diff(np.append(cuts, extent)) for cuts, extent in zip(starts, size, strict=True)]
    if not all((extent > 0).all() for extent in extents):
        return None
    for dim in range(len(size)):
        inner, outer = prod(map(len, starts[dim + 1 :])), prod(map(len, starts[:dim]))
        for cut, column in ((starts[dim], offsets[:, dim]), (extents[dim], sizes[:, dim])):
            if not np.array_equal(np.tile(np.repeat(cut, inner), outer), column):
                return None
    return [_cuts(cuts.tolist(), extent) for cuts, extent in zip(starts, size, strict=True)]


def _cuts(starts: list[int], extent: int) -> Cuts:
    step = starts[1] if len(starts) > 1 else extent
    return step if starts == list(range(0, extent, step)) else starts
