"""Which boxes of which tensor an object of a state dict holds: the one place that looks at kinds of tensors."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.planner_helpers import _create_write_items
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from dcp_storage.errors import CoverageError
from dcp_storage.geometry import Box, Shape


def on_this_rank(value: object) -> bool:
    """Return whether this rank has a part in a value: a DTensor's mesh may be of other ranks only."""
    return not isinstance(value, DTensor) or value.device_mesh.get_coordinate() is not None


def write_items(fqn: str, value: object) -> list[WriteItem]:
    """Return what this rank would write of a value.

    A bare `LocalShardsWrapper` knows its own shards and no global shape: what it reaches stands for that here, and the
    largest of all ranks is the tensor's.
    """
    if not on_this_rank(value):
        return []
    items: list[WriteItem] = _create_write_items(fqn, value)
    if isinstance(value, LocalShardsWrapper) and items:
        reach = torch.Size(_reach([chunk_box(item.tensor_data.chunk) for item in items if item.tensor_data]))
        items = [_with_size(item, reach) for item in items]
    return items


def _with_size(item: WriteItem, size: torch.Size) -> WriteItem:
    assert item.tensor_data is not None
    return dataclasses.replace(item, tensor_data=dataclasses.replace(item.tensor_data, size=size))


def _reach(boxes: Sequence[Box]) -> Shape:
    return tuple(max(o + s for o, s in ends) for ends in zip(*(zip(*box, strict=True) for box in boxes), strict=True))


def wanted_boxes(fqn: str, value: Tensor) -> list[Box]:
    """Return the boxes of the global tensor that this rank wants read into a value, in the order of its shards.

    Raises:
        CoverageError: The value's own hook returned something else than boxes.
    """
    if not on_this_rank(value):
        return []
    if hasattr(value, "__create_chunk_list__"):
        chunks = value.__create_chunk_list__()
    elif isinstance(value, ShardedTensor):
        chunks = [_shard_chunk(shard.metadata) for shard in value.local_shards()]
    else:
        return [Box((0,) * value.dim(), tuple(value.shape))]
    try:
        return [chunk_box(chunk) for chunk in chunks]
    except (AttributeError, TypeError, ValueError) as error:
        raise CoverageError(
            f"{fqn}: {type(value).__name__}.__create_chunk_list__ returned {chunks!r}, which are no chunks: {error}",
            fqn=fqn,
        ) from error


def _shard_chunk(shard: object) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(shard.shard_offsets), torch.Size(shard.shard_sizes))  # type: ignore[attr-defined]


def chunk_box(chunk: ChunkStorageMetadata) -> Box:
    """Return the box that one of DCP's chunks is."""
    box = Box(tuple(map(int, chunk.offsets)), tuple(map(int, chunk.sizes)))
    if len(box.offsets) != len(box.sizes):
        raise ValueError(f"offsets {list(box.offsets)} and sizes {list(box.sizes)} are of different dimensions")
    return box


def box_chunk(box: Box) -> ChunkStorageMetadata:
    """Return a box as one of DCP's chunks."""
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


def global_shape(value: Tensor) -> Shape | None:
    """Return the shape of the whole tensor that a value is of, or `None` where the value cannot know it."""
    return None if isinstance(value, LocalShardsWrapper) else tuple(value.size())


def local_dtype(value: Tensor) -> torch.dtype | None:
    """Return the dtype of what a value holds on this rank, or `None` where that is nothing.

    A `LocalShardsWrapper` calls itself of the default dtype, and so does a DTensor around one.
    """
    local = value._local_tensor if isinstance(value, DTensor) else value  # noqa: SLF001
    if isinstance(local, LocalShardsWrapper):
        return local.local_shards()[0].dtype if local.local_shards() else None
    return local.dtype
