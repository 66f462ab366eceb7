"""Where the items of a checkpoint are stored, as columns with rows for all items, segments and blocks."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dcp_storage.format.manifest.schema import Column, Stored


class Columns(NamedTuple):
    """One row per item, segment or block, in order. Numbers are `int64`, texts fixed-width `bytes`.

    Attributes:
        segments: For each item, the number of its segments.
        blocks: For each segment, the number of its blocks.
        objects: For each segment, the number of its object.
        offsets: For each segment, its offset in the object.
        lengths: For each block, its stored size.
        checks: For each block, its check value.
        digests: For each segment, the digest of its raw bytes; empty if there are no digests.
    """

    segments: Any
    blocks: Any
    objects: Any
    offsets: Any
    lengths: Any
    checks: Any
    digests: Any

    def take(self, items: Any) -> "Columns":
        """Return the items with these numbers, in this order."""
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
        """Return them in the form that a frame stores."""
        segments, blocks, objects = map(_one_for_all, (self.segments, self.blocks, self.objects))
        return Stored(segments, blocks, objects, self.offsets.tolist(), self.lengths.tolist(), text_of(self.checks))


def join(parts: Iterable[Columns], objects: Iterable[int]) -> Columns:
    """Concatenate the items of several parts; `objects` gives the first object number for each part."""
    shifted = [part._replace(objects=part.objects + first) for part, first in zip(parts, objects, strict=True)]
    return Columns(*map(np.concatenate, zip(*shifted, strict=True))) if shifted else NOTHING


def numbers(column: Iterable[int]) -> Any:
    """Return numbers as a column."""
    return np.fromiter(column, np.int64)


def texts(parts: Sequence[str], chars: int) -> Any:
    """Return texts of `chars` ASCII characters each as a column; a part may contain several texts."""
    return np.frombuffer("".join(parts).encode("ascii"), f"S{max(1, chars)}")


NOTHING = Columns(*[numbers(())] * 5, *[texts([], 1)] * 2)


def text_of(column: Any) -> str:
    """Return the texts of a column, concatenated."""
    text: str = column.tobytes().decode("ascii")
    return text


def _rows(counts: Any, wanted: Any) -> Any:
    """Return the row numbers of the wanted elements, each of which has as many consecutive rows as `counts` says."""
    taken = counts[wanted]
    firsts = np.cumsum(counts)[wanted] - taken
    return np.repeat(firsts - np.cumsum(taken) + taken, taken) + np.arange(taken.sum())


def _one_for_all(column: Any) -> Column:
    each: list[int] = column.tolist()
    return each[0] if each and (column == column[0]).all() else each
