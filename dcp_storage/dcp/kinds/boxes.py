"""Conversions between boxes and DCP's chunks and items."""

from collections.abc import Iterable, Sequence

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType

from dcp_storage.geometry import Box, Shape


def make_box(offsets: Iterable[int], sizes: Iterable[int]) -> Box:
    """Return a box of plain numbers.

    Raises:
        ValueError: Offsets and sizes have different lengths.
    """
    box = Box(tuple(map(int, offsets)), tuple(map(int, sizes)))
    if len(box.offsets) != len(box.sizes):
        raise ValueError(f"offsets {list(box.offsets)} and sizes {list(box.sizes)} have different lengths")
    return box


def chunk_box(chunk: ChunkStorageMetadata) -> Box:
    """Return one of DCP's chunks as a box.

    Raises:
        ValueError: Its offsets and sizes have different lengths.
    """
    return make_box(chunk.offsets, chunk.sizes)


def item_box(item: WriteItem) -> Box:
    """Return the box that an item writes.

    Raises:
        ValueError: It is not a box.
    """
    assert item.tensor_data is not None
    return chunk_box(item.tensor_data.chunk)


def box_chunk(box: Box) -> ChunkStorageMetadata:
    """Return a box as one of DCP's chunks."""
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


def box_item(
    fqn: str, box: Box, shape: Sequence[int], dtype: torch.dtype, kind: WriteItemType = WriteItemType.SHARD
) -> WriteItem:
    """Return the item that writes a box of a tensor with this global shape."""
    data = TensorWriteData(box_chunk(box), TensorProperties(dtype), torch.Size(shape))
    return WriteItem(MetadataIndex(fqn, box.offsets), kind, tensor_data=data)


def reach(boxes: Sequence[Box]) -> Shape:
    """Return the shape of the smallest tensor that contains these boxes."""
    return tuple(max(o + s for o, s in ends) for ends in zip(*(zip(*box, strict=True) for box in boxes), strict=True))


def read_box(read: ReadItem) -> Box:
    """Return the box of the stored chunk that an item reads."""
    return Box(tuple(read.storage_offsets), tuple(read.lengths))
