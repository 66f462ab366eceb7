"""Where the items of a checkpoint lie, as columns: rows for all items, segments and blocks at once."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dcp_storage.format.manifest.schema import Column, Stored


class Columns(NamedTuple):
    """A row for each item, segment or block, in their order. Numbers are `int64`, texts fixed-width `bytes`.

    Attributes:
        segments: For each item, its segments.
        blocks: For each segment, its blocks.
        objects: For each segment, the number of its object.
        offsets: For each segment, where in the object it begins.
        lengths: For each block, its stored size.
        checks: For each block, its check value.
        digests: For each segment, the digest of its raw bytes; empty where there are none.
    """

    segments: Any
    blocks: Any
    objects: Any
    offsets: Any
    lengths: Any
    checks: Any
    digests: Any

    def take(self, items: Any) -> "Columns":
        """Return the items of these numbers, in this order."""
        segments = _rows(self.segments, items)
        blocks = _rows(self.blocks, segments)
        return Columns(
            self.segments[items],
            self.blocks[segments],
            self.objects[segments],
            self.offsets[segments],
            self.lengths[blocks],
            self.checks[blocks],
            self.digests[segments] if len(self.digests) else self.digests,
        )

    @property
    def stops(self) -> Any:
        """Where in its object each segment ends."""
        ends = np.concatenate(([0], np.cumsum(self.lengths)))
        lasts = np.cumsum(self.blocks)
        return self.offsets + ends[lasts] - ends[lasts - self.blocks]

    def stored(self) -> Stored:
        """Return them as a frame holds them."""
        segments, blocks, objects = map(_one_for_all, (self.segments, self.blocks, self.objects))
        return Stored(segments, blocks, objects, self.offsets.tolist(), self.lengths.tolist(), text_of(self.checks))


def join(parts: Iterable[Columns], objects: Iterable[int]) -> Columns:
    """Return the items of several, one after another, whose objects are numbered from where each of `objects` says."""
    shifted = [part._replace(objects=part.objects + first) for part, first in zip(parts, objects, strict=True)]
    return Columns(*map(np.concatenate, zip(*shifted, strict=True))) if shifted else NOTHING


def numbers(column: Iterable[int]) -> Any:
    """Return numbers as a column."""
    return np.fromiter(column, np.int64)


def texts(parts: Sequence[str], chars: int) -> Any:
    """Return texts of `chars` ASCII characters each, several of which a part may hold, as a column."""
    return np.frombuffer("".join(parts).encode("ascii"), f"S{max(1, chars)}")


NOTHING = Columns(*[numbers(())] * 5, *[texts([], 1)] * 2)


def text_of(column: Any) -> str:
    """Return a column of texts, one after another."""
    text: str = column.tobytes().decode("ascii")
    return text


def _rows(counts: Any, wanted: Any) -> Any:
    """Return the numbers of the rows of what is wanted, of which each has so many rows, one after another."""
    taken = counts[wanted]
    firsts = np.cumsum(counts)[wanted] - taken
    return np.repeat(firsts - np.cumsum(taken) + taken, taken) + np.arange(taken.sum())


def _one_for_all(column: Any) -> Column:
    each: list[int] = column.tolist()
    return each[0] if each and (column == column[0]).all() else each
