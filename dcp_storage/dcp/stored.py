"""Stored tensors as DCP's planners see them."""

from functools import cached_property

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

from dcp_storage.dcp.kinds.boxes import chunk_box
from dcp_storage.format.boxes import Boxes, Listed


class StoredTensorMetadata(TensorStorageMetadata):
    """DCP's metadata of a stored tensor, whose chunks are made when they are asked for."""

    def __init__(self, properties: TensorProperties, boxes: Boxes) -> None:
        self.properties = properties
        self.size = torch.Size(boxes.size)
        self.boxes = boxes

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorStorageMetadata):
            return NotImplemented
        return (self.properties, self.size, self.chunks) == (other.properties, other.size, other.chunks)

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def chunks(self) -> list[ChunkStorageMetadata]:  # type: ignore[override]
        """The boxes."""
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in self.boxes]


def boxes_of(entry: TensorStorageMetadata) -> Boxes:
    """Return the boxes of a stored tensor."""
    if isinstance(entry, StoredTensorMetadata):
        return entry.boxes
    return Listed(tuple(entry.size), [chunk_box(chunk) for chunk in entry.chunks])
