"""Maps destinations to parts of stored chunks: proves that a load is complete before data is read."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from dcp_storage.dcp.stored import boxes_of
from dcp_storage.errors import CoverageError
from dcp_storage.geometry import Box, Shape, contains, find_overlap, intersect, subtract


class Chunk(NamedTuple):
    """A stored box and its number among its tensor's chunks."""

    number: int
    box: Box


def part_note(metadata: Metadata) -> str:
    """Return a note for errors if the checkpoint is only one rank's part, else an empty string."""
    part = getattr(metadata.storage_data, "part", None)  # it may be the metadata of a stock reader
    if part is None:
        return ""
    rank, ranks = part
    return (
        f". This checkpoint is the part of rank {rank} of {ranks}, which saved it alone (no_dist=True): load with the "
        "same sharding, each rank from its own checkpoint, or save with all ranks"
    )


class StoredTensor:
    """The non-empty chunks of one stored tensor, found by position."""

    def __init__(self, fqn: str, entry: TensorStorageMetadata, note: str = "") -> None:
        self.fqn = fqn
        self._note = note
        self.shape: Shape = tuple(entry.size)
        self._boxes = boxes_of(entry)

    def reads(self, wanted: Box, place: int) -> list[ReadItem]:
        """Return the reads that fill a destination, the rank's shard number `place`, exactly once.

        Raises:
            CoverageError: It extends beyond the tensor, or the stored chunks do not cover it, or overlap.
        """
        if not wanted.numel:
            return []
        if len(self._boxes) == 1 and self._boxes[0] == wanted:  # by far the most common
            return [_read(MetadataIndex(self.fqn, wanted.offsets, place), wanted, Chunk(0, wanted), wanted)]
        if not contains(self.shape, wanted):
            raise self._fault(f"its shard {wanted} is outside the stored shape {list(self.shape)}")
        parts = [(chunk, part) for chunk in self._near(wanted) if (part := intersect(wanted, chunk.box))]
        self._prove(wanted, [part for _, part in parts])
        index = MetadataIndex(self.fqn, wanted.offsets, place)
        return [_read(index, wanted, chunk, part) for chunk, part in parts]

    def _prove(self, wanted: Box, parts: Sequence[Box]) -> None:
        # Disjoint boxes within `wanted` with as many elements in total cover it.
        overlap = find_overlap(parts) if len(parts) > 1 else None
        if overlap:
            raise self._fault(f"stored chunks overlap in {intersect(*overlap)}: it is unknown which one is right")
        if sum(part.numel for part in parts) != wanted.numel:
            missing = subtract(wanted, parts)[0]
            raise self._fault(f"the checkpoint does not contain {missing} of shape {list(self.shape)}{self._note}")

    def _fault(self, says: str) -> CoverageError:
        return CoverageError(f"{self.fqn}: {says}", fqn=self.fqn)

    def _near(self, wanted: Box) -> Iterable[Chunk]:
        """Return the chunks that share an element with a box; of equal ones the first."""
        distinct: dict[Box, int] = {}
        for number in self._boxes.near(wanted):
            distinct.setdefault(self._boxes[number], number)
        return (Chunk(number, box) for box, number in distinct.items())


def _read(destination: MetadataIndex, wanted: Box, stored: Chunk, part: Box) -> ReadItem:
    return ReadItem(
        LoadItemType.TENSOR,
        destination,
        _within(part, wanted),
        MetadataIndex(destination.fqn, stored.box.offsets, stored.number),
        _within(part, stored.box),
        torch.Size(part.sizes),
    )


def _within(part: Box, box: Box) -> torch.Size:
    same = part.offsets == box.offsets
    return torch.Size([0] * len(part.offsets)) if same else torch.Size(part.relative_to(box.offsets).offsets)
