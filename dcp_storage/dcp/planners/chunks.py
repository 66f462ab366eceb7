"""Which boxes of which tensor an object of a state dict holds: the one place that looks at kinds of tensors."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from dcp_storage.dcp.planners.strided import strided_pieces
from dcp_storage.dcp.undocumented import LocalShardsWrapper, ShardedTensor, local_tensor
from dcp_storage.errors import CoverageError, DcpStorageError, UnsupportedTensor
from dcp_storage.geometry import Box, Shape


def on_this_rank(value: object) -> bool:
    """Return whether this rank has a part in a value: a DTensor's mesh may be of other ranks only."""
    return not isinstance(value, DTensor) or value.device_mesh.get_coordinate() is not None


def write_items(fqn: str, value: object) -> list[WriteItem]:
    """Return what this rank would write of a value.

    A bare `LocalShardsWrapper` knows its own shards and no global shape: what it reaches stands for that here, and the
    largest of all ranks is the tensor's.

    Raises:
        CoverageError: The value's own hook returned something else than items of this entry.
        UnsupportedTensor: The hook raised: a DTensor of partial sums does.
    """
    if not on_this_rank(value):
        return []
    if pieces := strided_pieces(fqn, value):
        assert isinstance(value, DTensor)
        return [_item(fqn, value, piece.box) for piece in pieces]
    if not hasattr(value, "__create_write_items__"):
        return _own_items(fqn, value)
    items: list[WriteItem] = _from_hook(
        fqn, value, "__create_write_items__", lambda: value.__create_write_items__(fqn, value)
    )
    if not isinstance(_held(value), Tensor):
        _check_items(fqn, value, items)
    if isinstance(value, LocalShardsWrapper) and items:
        reach = _reach([item_box(item) for item in items])
        return [_item(fqn, value, item_box(item), reach, _dtype_of(item)) for item in items]
    if isinstance(value, DTensor) and not items and not value.numel():
        return [_item(fqn, value, Box((0,) * value.dim(), tuple(value.shape)))]  # else no rank would tell of the tensor
    return items


def _own_items(fqn: str, value: object) -> list[WriteItem]:
    """Return the items of a value without hooks."""
    if not isinstance(value, Tensor):
        return [WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO)]
    if isinstance(value, ShardedTensor):
        return [_item(fqn, value, chunk_box(_shard_chunk(shard.metadata))) for shard in value.local_shards()]
    [whole] = wanted_boxes(fqn, value)
    return [dataclasses.replace(_item(fqn, value, whole), type=WriteItemType.TENSOR)]


def _held(value: object) -> Tensor | None:
    """Return the plain tensor behind a DTensor, whose hooks are torch's own and need no check."""
    local = local_tensor(value) if isinstance(value, DTensor) else None
    return None if hasattr(local, "__create_write_items__") else local


def _item(
    fqn: str, value: Tensor, box: Box, size: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> WriteItem:
    data = TensorWriteData(box_chunk(box), TensorProperties(dtype or value.dtype), torch.Size(size or value.shape))
    return WriteItem(MetadataIndex(fqn, box.offsets), WriteItemType.SHARD, tensor_data=data)


def _dtype_of(item: WriteItem) -> torch.dtype | None:
    return item.tensor_data.properties.dtype if item.tensor_data else None


def _check_items(fqn: str, value: object, items: object) -> None:
    """Refuse what is no list of items of this entry, each with a chunk."""
    fault: object = None
    try:
        for item in items:  # type: ignore[attr-defined]
            if item.index.fqn != fqn:
                fault = f"an item of {item.index.fqn!r}"
            elif item.tensor_data is not None:
                item_box(item)
    except (AttributeError, TypeError, ValueError) as error:
        fault = f"{items!r}: {error}"
    if fault:
        raise CoverageError(f"{fqn}: {type(value).__name__}.__create_write_items__ returned {fault}", fqn=fqn)


def _reach(boxes: Sequence[Box]) -> Shape:
    return tuple(max(o + s for o, s in ends) for ends in zip(*(zip(*box, strict=True) for box in boxes), strict=True))


def wanted_boxes(fqn: str, value: Tensor) -> list[Box]:
    """Return the boxes of the global tensor that this rank wants read into a value, in the order of its shards.

    Raises:
        CoverageError: The value's own hook returned something else than chunks.
        UnsupportedTensor: The hook raised.
    """
    if not on_this_rank(value):
        return []
    if pieces := strided_pieces(fqn, value):
        return [piece.box for piece in pieces]
    if hasattr(value, "__create_chunk_list__"):
        chunks = _from_hook(fqn, value, "__create_chunk_list__", value.__create_chunk_list__)
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


def is_whole(value: Tensor) -> bool:
    """Return whether a value is all of its tensor and is itself the memory to read and write."""
    return not hasattr(value, "__create_chunk_list__") and not isinstance(value, ShardedTensor)


def holds_nothing(value: object) -> bool:
    """Return whether a value is a bare wrapper of no shards, of which nothing can be missing."""
    return isinstance(value, LocalShardsWrapper) and not value.local_shards()


def shard_at(value: Tensor, index: MetadataIndex) -> Tensor:
    """Return the memory that a value holds one of its boxes in.

    The index's hint is the box's place among those of this rank: with it, shards that share an offset are told apart.

    Raises:
        CoverageError: There is none, or the value's own hook returned no tensor.
        UnsupportedTensor: The hook raised something else than `ValueError`.
    """
    if not hasattr(value, "__get_tensor_shard__") and not isinstance(value, ShardedTensor):
        return value
    pieces = strided_pieces(index.fqn, value)
    if pieces is None:
        found = _from_hook(index.fqn, value, "__get_tensor_shard__", lambda: _looked_up(value, index))
    else:
        assert isinstance(value, DTensor)
        found = local_tensor(value)[_piece_at(pieces, index).slices]
    if not isinstance(found, Tensor):
        kind = type(value).__name__
        raise CoverageError(f"{index.fqn}: {kind}.__get_tensor_shard__ returned {found!r}, no tensor", fqn=index.fqn)
    return found


def _looked_up(value: Any, index: MetadataIndex) -> object:
    if not isinstance(value, ShardedTensor):
        return value.__get_tensor_shard__(index)
    shards, place = value.local_shards(), index.index or 0
    if place < len(shards) and tuple(shards[place].metadata.shard_offsets) == tuple(index.offset or ()):
        return shards[place].tensor
    return next(s.tensor for s in shards if tuple(s.metadata.shard_offsets) == tuple(index.offset or ()))


def _piece_at(pieces: Iterable[tuple[Box, Box]], index: MetadataIndex) -> Box:
    return next(local for box, local in pieces if box.offsets == tuple(index.offset or ()))


def _shard_chunk(shard: object) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(shard.shard_offsets), torch.Size(shard.shard_sizes))  # type: ignore[attr-defined]


def _from_hook(fqn: str, value: object, hook: str, call: Any) -> Any:
    try:
        return call()
    except DcpStorageError:
        raise
    except Exception as error:
        raise UnsupportedTensor(f"{fqn}: {type(value).__name__}.{hook} failed: {error!r}", fqn=fqn) from error


def chunk_box(chunk: ChunkStorageMetadata) -> Box:
    """Return the box that one of DCP's chunks is.

    Raises:
        ValueError: Its offsets and sizes are of different dimensions.
    """
    box = Box(tuple(map(int, chunk.offsets)), tuple(map(int, chunk.sizes)))
    if len(box.offsets) != len(box.sizes):
        raise ValueError(f"offsets {list(box.offsets)} and sizes {list(box.sizes)} are of different dimensions")
    return box


def item_box(item: WriteItem) -> Box:
    """Return the box that an item writes.

    Raises:
        ValueError: It is no box.
    """
    assert item.tensor_data is not None
    return chunk_box(item.tensor_data.chunk)


def box_chunk(box: Box) -> ChunkStorageMetadata:
    """Return a box as one of DCP's chunks."""
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


def global_shape(value: Tensor) -> Shape | None:
    """Return the shape of the whole tensor that a value is of, or `None` where the value cannot know it."""
    return None if isinstance(value, LocalShardsWrapper) else tuple(value.size())
