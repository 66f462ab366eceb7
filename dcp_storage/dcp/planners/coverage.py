"""Which parts of which stored chunks make up a destination: proves that a load is complete before data is read."""

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
    """Return a note for errors where the checkpoint is only one rank's part, else an empty string."""
    part = getattr(metadata.storage_data, "part", None)  # a stock reader's metadata is loaded, too
    if part is None:
        return ""
    rank, ranks = part
    return (
        f". This checkpoint is the part of rank {rank} of {ranks}, which saved it alone (no_dist=True): load the same "
        "sharding, each rank from its own, or save with all ranks"
    )


class StoredTensor:
    """The chunks of one stored tensor that hold anything, found by where they lie."""

    def __init__(self, fqn: str, entry: TensorStorageMetadata, note: str = "") -> None:
        self.fqn = fqn
        self._note = note
        self.shape: Shape = tuple(entry.size)
        self._boxes = boxes_of(entry)

    def reads(self, wanted: Box, place: int) -> list[ReadItem]:
        """Return the reads that fill a destination, which is the shard at this place of its rank, exactly once.

        Raises:
            CoverageError: It reaches beyond the tensor, or the stored chunks do not hold all of it, or overlap.
        """
        if not wanted.numel:
            return []
        if len(self._boxes) == 1 and self._boxes[0] == wanted:  # by far the most common
            return [_read(MetadataIndex(self.fqn, wanted.offsets, place), wanted, Chunk(0, wanted), wanted)]
        if not contains(self.shape, wanted):
            raise self._fault(f"its shard {wanted} is outside of the stored shape {list(self.shape)}")
        parts = [(chunk, part) for chunk in self._near(wanted) if (part := intersect(wanted, chunk.box))]
        self._prove(wanted, [part for _, part in parts])
        index = MetadataIndex(self.fqn, wanted.offsets, place)
        return [_read(index, wanted, chunk, part) for chunk, part in parts]

    def _prove(self, wanted: Box, parts: Sequence[Box]) -> None:
        # Disjoint boxes within `wanted` that are as many elements as it are all of it.
        overlap = find_overlap(parts) if len(parts) > 1 else None
        if overlap:
            raise self._fault(f"stored chunks overlap in {intersect(*overlap)}: which one is right cannot be known")
        if sum(part.numel for part in parts) != wanted.numel:
            missing = subtract(wanted, parts)[0]
            raise self._fault(f"the checkpoint does not hold {missing} of shape {list(self.shape)}{self._note}")

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
