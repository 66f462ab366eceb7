"""The schema of the body's frames: columns, and their rows."""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

from msgspec import Meta, Struct

from dcp_storage.format.faults import MAX_INT
from dcp_storage.format.manifest.boxes import Cuts

Count = Annotated[int, Meta(ge=0, le=MAX_INT)]
Column = Count | list[Count]
"""A number for each row, or one for all of them."""


class Segment(NamedTuple):
    """Consecutive blocks of one item, back to back in one object.

    Attributes:
        object: Index into the manifest's object table.
        offset: Offset of the first block in the object, in bytes.
        lengths: Stored size of each block, in bytes.
        checks: The check values of the blocks in hexadecimal, concatenated, all of the same width.
    """

    object: int
    offset: int
    lengths: Sequence[int]
    checks: str

    @property
    def stop(self) -> int:
        """End of the last block in the object, in bytes."""
        return self.offset + sum(self.lengths)


class Stored(Struct, frozen=True, gc=False):
    """Where the items of a frame are stored: their segments, and the segments' blocks, one item after another.

    Attributes:
        segments: For each item, the number of its segments.
        blocks: For each segment, the number of its blocks.
        objects: For each segment, the number of its object.
        offsets: For each segment, its offset in the object.
        lengths: For each block, its stored size.
        checks: The check values of all blocks.
    """

    segments: Column
    blocks: Column
    objects: Column
    offsets: list[Count]
    lengths: list[Count]
    checks: str


class ListedBoxes(Struct, frozen=True, gc=False):
    """Boxes that are not a grid: the offsets and then the sizes of each."""

    boxes: list[list[Count]]


Layout = list[Cuts] | ListedBoxes | None
"""How a tensor is cut: in a grid along each dimension, into boxes of any kind, or not at all."""


class TensorFrame(Struct, frozen=True, gc=False):
    """Tensors. The items are the boxes of the first tensor, then those of the second, and so on.

    Attributes:
        names: Fully qualified names, ascending.
        dtypes: The dtype of each.
        sizes: Its global shape.
        planes: The number of byte planes of its blocks; 1 is none.
        layouts: How it is cut: `None` for one box, the cuts of a grid along each dimension, or a list.
        stored: Where the boxes are stored.
    """

    names: list[str]
    dtypes: list[str]
    sizes: list[tuple[Count, ...]]
    planes: list[int]
    layouts: list[Layout]
    stored: Stored


class NameColumn(Struct, frozen=True, gc=False):
    """Only the names of a frame of tensors or entries."""

    names: list[str]


class EntryFrame(Struct, frozen=True, gc=False):
    """Entries that are not tensors: their names, ascending, and raw sizes in bytes. Each is an item."""

    names: list[str]
    sizes: list[Count]
    stored: Stored


class ObjectFrame(Struct, frozen=True, gc=False):
    """Data objects, by number: names below the checkpoint's prefix, and sizes in bytes."""

    names: list[str]
    sizes: list[Count]


class DigestFrame(Struct, frozen=True, gc=False):
    """The digests of the raw bytes of all segments of a frame of tensors or entries, in order."""

    digests: str


class PathFrame(Struct, frozen=True, gc=False):
    """`planner_data`: names, ascending, and their paths in the nested state dict."""

    names: list[str]
    paths: list[tuple[str | int, ...]]
