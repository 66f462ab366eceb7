"""The boxes that a DTensor holds if its placements are not plain `Shard`s: placements are asked to cut row indices."""

from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from dcp_storage.dcp.undocumented import StridedShard, local_tensor, split_as
from dcp_storage.errors import CoverageError, UnsupportedTensor
from dcp_storage.geometry import Box

_Run = tuple[int, int, int]  # first index in the local tensor, first index in the global one, length


class LocalPiece(NamedTuple):
    """A box of the global tensor, and the same elements as a box of the local one."""

    box: Box
    local: Box


def pieces_of(fqn: str, value: DTensor) -> list[LocalPiece] | None:
    """Return the pieces of a DTensor whose placements do not cut it as `Shard` does, or `None` for any other.

    DCP supports one box per DTensor. For FSDP over TP that is right as long as the rows divide evenly; with the TP
    dimension replicated again, an odd split factor, or a custom interleaved placement, a rank's rows are scattered.

    Raises:
        CoverageError: The local tensor's shape contradicts the placements, or does not determine its elements.
        UnsupportedTensor: A placement does not say how it cuts.
    """
    if not any(_has_to_be_asked(fqn, placement) for placement in value.placements):
        return None
    runs = [_runs(fqn, value, dim) for dim in range(value.ndim)]
    return [_piece(along) for along in product(*runs)]


def _has_to_be_asked(fqn: str, placement: Placement) -> bool:
    if type(placement) in {Shard, Replicate} or isinstance(placement, Partial):  # DCP's hooks refuse partial sums
        return False
    changed = _changed(type(placement))
    if isinstance(placement, StridedShard) or "_split_tensor" in changed:
        return True
    if isinstance(placement, Shard | Replicate) and not changed:
        return False
    raise UnsupportedTensor(
        f"{fqn} has the placement {placement!r}, a {type(placement).__name__}, which does not say in _split_tensor "
        "which elements a rank holds. Redistribute it to plain Shard placements first",
        fqn=fqn,
    )


def _changed(kind: type) -> set[str]:
    """Return the methods of torch's placement that a subclass overrides."""
    stop = next((base for base in kind.__mro__ if base in {Shard, Replicate, StridedShard}), object)
    derived = kind.__mro__[: kind.__mro__.index(stop)]
    return {name for base in derived for name in vars(base) if hasattr(stop, name) and not name.startswith("__")}


def _runs(fqn: str, value: DTensor, dim: int) -> list[_Run]:
    """Return the runs of global indices that the local tensor holds along a dimension, in local order."""
    index = _held_indices(fqn, value, dim)
    if not len(index):
        return [(0, 0, 0)]
    starts = [0, *(torch.nonzero(index.diff() != 1).flatten() + 1).tolist()]
    stops = [*starts[1:], len(index)]
    return [(start, int(index[start]), stop - start) for start, stop in zip(starts, stops, strict=True)]


def _held_indices(fqn: str, value: DTensor, dim: int) -> Tensor:
    """Return the global indices that the local tensor holds along a dimension.

    FSDP shards the result of TP, which is the placements from right to left; `distribute_tensor` goes from left to
    right. The two differ if rows do not divide evenly, and then the local tensor's extent must show which it was.
    """
    extent = local_tensor(value).shape[dim]
    known = all(type(placement) in {Shard, StridedShard} for _, placement in _shards(value, dim))
    readings = [reading(value, dim) for reading in ((_right_to_left, _left_to_right) if known else (_left_to_right,))]
    fitting = [index for index in readings if index is not None and len(index) == extent]
    if not fitting or any(not torch.equal(index, fitting[0]) for index in fitting):
        raise CoverageError(
            f"{fqn}: with a local size of {extent} in dimension {dim} it is ambiguous which part of "
            f"{value.shape[dim]} the placements {value.placements} on a mesh of {tuple(value.device_mesh.shape)} "
            "select. Redistribute it to plain Shard placements first, or pad that dimension to divide evenly",
            fqn=fqn,
        )
    return fitting[0]


def _left_to_right(value: DTensor, dim: int) -> Tensor:
    index = _all_indices(value, dim)
    for mesh_dim, placement in _shards(value, dim):
        index = _cut(value, index, mesh_dim, placement)
    return index.flatten()


def _right_to_left(value: DTensor, dim: int) -> Tensor | None:
    """Cut as FSDP over TP does; return `None` if the split factors contradict that."""
    index, sizes = _all_indices(value, dim), list[int]()
    for mesh_dim, placement in reversed(_shards(value, dim)):
        if getattr(placement, "split_factor", prod(sizes)) != prod(sizes) or (
            sizes and not isinstance(placement, StridedShard)
        ):
            return None
        index = _cut(value, index, mesh_dim, Shard(dim))
        sizes.append(value.device_mesh.size(mesh_dim))
    return index.flatten()


def _shards(value: DTensor, dim: int) -> list[tuple[int, Shard | StridedShard]]:
    return [
        (mesh_dim, placement)
        for mesh_dim, placement in enumerate(value.placements)
        if isinstance(placement, Shard | StridedShard) and placement.dim == dim
    ]


def _all_indices(value: DTensor, dim: int) -> Tensor:
    shape = [1] * value.ndim
    shape[dim] = value.shape[dim]
    return torch.arange(value.shape[dim], device="cpu").view(shape)


def _cut(value: DTensor, index: Tensor, mesh_dim: int, placement: Shard | StridedShard) -> Tensor:
    """Return this rank's part of a row of indices, cut by the placement itself."""
    coordinate = value.device_mesh.get_coordinate()
    assert coordinate is not None, "ranks outside the mesh hold nothing and are not asked"
    count = value.device_mesh.size(mesh_dim)
    return split_as(placement, index, count)[coordinate[mesh_dim]]


def _piece(along: tuple[_Run, ...]) -> LocalPiece:
    starts, offsets, sizes = zip(*along, strict=True)
    return LocalPiece(Box(tuple(offsets), tuple(sizes)), Box(tuple(starts), tuple(sizes)))
