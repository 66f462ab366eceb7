"""Ways to spread one tensor over ranks, each built from the whole tensor: what is loaded is compared with that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_storage.geometry import Box, whole
from tests.fake_ranks import Shards

Boxes = list[Box]
Build = Callable[[int, Tensor], Any]


@dataclass(frozen=True)
class Layout:
    """A name, and what a rank makes of the whole tensor."""

    name: str
    build: Build


def layouts(world: int, dims: int) -> list[Layout]:
    """Every layout of a tensor of so many dimensions over so many ranks."""
    return [*upstream(world, dims), *wrappers(world, dims)]


def upstream(world: int, dims: int) -> list[Layout]:
    """What DCP's own tests are about: plain tensors, DTensors on meshes of one and two dimensions, the three hooks."""
    found = [Layout("full", lambda _, full: full.clone())]
    shards = [Replicate(), *map(Shard, range(min(dims, 2)))]
    found += [_dtensor((world,), [placement]) for placement in shards]
    if world == 4:
        found += [_dtensor((2, 2), list(pair)) for pair in product(shards, shards)]
        found.append(_dtensor((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]))  # FSDP over TP
        found.append(_dtensor((2, 2), [_StridedShard(0, split_factor=2), Replicate()]))  # rows apart from each other
        found.append(Layout("submesh 1,2: S(0)", partial(_distribute, (1, 2), None, [Shard(0)])))
    splits = {"rows uneven": rows_uneven, "rows, last rank empty": rows_last_empty}
    if dims > 1:
        splits["columns uneven"] = columns_uneven
    return [*found, *(Layout(f"hooks: {name}", _boxed(_by_hooks, world, split)) for name, split in splits.items())]


def wrappers(world: int, dims: int) -> list[Layout]:
    """`LocalShardsWrapper`s, bare and inside of a DTensor."""
    return [
        Layout(f"{kind}: {name}", _boxed(wrap, world, split))
        for name, split in box_splits(world, dims).items()
        for kind, wrap in (("bare", _bare), ("wrapped", partial(_in_dtensor, world)))
    ]


Split = Callable[[tuple[int, ...], int], list[Boxes]]


def box_splits(world: int, dims: int) -> dict[str, Split]:
    """Ways to cut a shape into boxes and to deal them out to ranks."""
    splits: dict[str, Split] = {
        "rows even": rows_even,
        "rows uneven": rows_uneven,
        "rows, last rank empty": rows_last_empty,
        "rows, several a rank": partial(rows_several, False),
        "rows, interleaved": partial(rows_several, True),
        "zero rows at a real shard's offset": zero_rows,
        "replicated": lambda shape, world: [[whole(shape)]] * world,
    }
    for rank in range(world):
        splits[f"table on rank {rank}"] = partial(table_wise, rank)
    if dims > 1:
        splits |= {
            "columns": partial(along, 1),
            "columns uneven": columns_uneven,
            "columns, several a rank": columns_several,
            "grid": grid,
        }
    return splits


def cut(shape: Sequence[int], dim: int, sizes: Sequence[int]) -> Boxes:
    """Cut a shape along a dimension into boxes of these sizes."""
    boxes, at = [], 0
    for size in sizes:
        offsets, sizes_ = [0] * len(shape), list(shape)
        offsets[dim], sizes_[dim] = at, size
        boxes.append(Box(tuple(offsets), tuple(sizes_)))
        at += size
    return boxes


def chunked(extent: int, parts: int) -> list[int]:
    """Return sizes as `torch.chunk` makes them, empty ones included."""
    step = -(-extent // parts)
    return [max(0, min(step, extent - step * part)) for part in range(parts)]


def along(dim: int, shape: tuple[int, ...], world: int) -> list[Boxes]:
    return [[box] for box in cut(shape, dim, chunked(shape[dim], world))]


def rows_even(shape: tuple[int, ...], world: int) -> list[Boxes]:
    return along(0, shape, world)


def rows_uneven(shape: tuple[int, ...], world: int) -> list[Boxes]:
    return [[box] for box in cut(shape, 0, _uneven(shape[0], world))]


def columns_uneven(shape: tuple[int, ...], world: int) -> list[Boxes]:
    return [[box] for box in cut(shape, 1, _uneven(shape[1], world))]


def rows_last_empty(shape: tuple[int, ...], world: int) -> list[Boxes]:
    parts = max(1, world - 1)
    return [*([box] for box in cut(shape, 0, _uneven(shape[0], parts))), *([[]] if world > 1 else [])]


def _uneven(extent: int, parts: int) -> list[int]:
    sizes = [1] * (parts - 1)
    return [*sizes, extent - len(sizes)]


def rows_several(interleaved: bool, shape: tuple[int, ...], world: int) -> list[Boxes]:
    boxes = cut(shape, 0, chunked(shape[0], 2 * world))
    if interleaved:
        return [[boxes[rank], boxes[rank + world]] for rank in range(world)]
    return [boxes[2 * rank : 2 * rank + 2] for rank in range(world)]


def columns_several(shape: tuple[int, ...], world: int) -> list[Boxes]:
    boxes = cut(shape, 1, chunked(shape[1], 2 * world))
    return [boxes[rank::world] for rank in range(world)]


def grid(shape: tuple[int, ...], world: int) -> list[Boxes]:
    rows = [(box.offsets[0], box.sizes[0]) for box in cut(shape, 0, chunked(shape[0], 3))]
    boxes = [
        Box((offset, *box.offsets[1:]), (size, *box.sizes[1:]))
        for offset, size in rows
        for box in cut(shape, 1, _uneven(shape[1], 3))
    ]
    return [boxes[rank::world] for rank in range(world)]


def table_wise(owner: int, shape: tuple[int, ...], world: int) -> list[Boxes]:
    return [[whole(shape)] if rank == owner else [] for rank in range(world)]


def zero_rows(shape: tuple[int, ...], world: int) -> list[Boxes]:
    """Each rank's shard comes after an empty one at its offset, and rank 0 has an empty one at the last rank's."""
    real = cut(shape, 0, _uneven(shape[0], world))
    empty = [Box(box.offsets, (0, *box.sizes[1:])) for box in real]
    return [[*([empty[-1]] if rank == 0 else []), empty[rank], real[rank]] for rank in range(world)]


def _boxed(wrap: Callable[..., Any], world: int, split: Split) -> Build:
    def build(rank: int, full: Tensor) -> Any:
        boxes = split(tuple(full.shape), world)[rank]
        return wrap(full, [(box, full[box.slices].clone()) for box in boxes])

    return build


def _by_hooks(full: Tensor, shards: list[tuple[Box, Tensor]]) -> Shards:
    return Shards(tuple(full.shape), shards, full.dtype)


def _bare(_: Tensor, shards: list[tuple[Box, Tensor]]) -> LocalShardsWrapper:
    return LocalShardsWrapper([tensor for _, tensor in shards], [box.offsets for box, _ in shards])


def _in_dtensor(world: int, full: Tensor, shards: list[tuple[Box, Tensor]]) -> DTensor:
    meta = TensorMeta(full.shape, full.stride(), full.dtype)
    spec = DTensorSpec(mesh(tuple(range(world)), None), (Shard(0),), tensor_meta=meta)
    # As `from_local` makes it, but that cannot view wrappers of several shards in three dimensions.
    return DTensor(_bare(full, shards), spec, requires_grad=False)


def _dtensor(shape: tuple[int, ...], placements: list[Any]) -> Layout:
    ranks = tuple(range(torch.Size(shape).numel()))
    kind = "x".join(map(str, shape))
    name = f"mesh {kind}: " + ",".join(map(str, placements))
    return Layout(name, partial(_distribute, ranks, shape if len(shape) > 1 else None, placements))


def _distribute(
    ranks: tuple[int, ...], shape: tuple[int, ...] | None, placements: list[Any], _: int, full: Tensor
) -> DTensor:
    return distribute_tensor(full.clone(), mesh(ranks, shape), placements, src_data_rank=None)


@cache
def mesh(ranks: tuple[int, ...], shape: tuple[int, ...] | None) -> DeviceMesh:
    """The same mesh every time; all ranks must ask for it in the same order."""
    return DeviceMesh("cpu", torch.tensor(ranks).view(shape or (len(ranks),)), mesh_dim_names=None)


def parts(value: Any) -> list[Tensor]:
    """Return the memory that a value has on this rank."""
    if isinstance(value, DTensor):
        if value.device_mesh.get_coordinate() is None:
            return []
        value = value._local_tensor
    if isinstance(value, LocalShardsWrapper):
        return value.local_shards()
    return [tensor for _, tensor in value.shards] if isinstance(value, Shards) else [value]
