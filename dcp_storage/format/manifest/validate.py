"""Checks that a manifest must pass before any byte is read or allocated because of it."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from math import prod

from dcp_storage.format.codecs.base import BlockCodec
from dcp_storage.format.codecs.blocks import CODECS
from dcp_storage.format.dtypes import ITEM_BYTES, number_bytes
from dcp_storage.format.faults import MAX_INT, require
from dcp_storage.format.manifest.frames import Head
from dcp_storage.format.names import ObjectName, is_safe
from dcp_storage.format.paths import list_slots
from dcp_storage.geometry import Shape

MAX_BLOCK_BYTES = 64 << 20
MAX_LIST_SLOTS = 1 << 20
"""Most elements of the lists in `planner_data`; or 64 for each of its entries, if that is more."""


def check_head(head: Head) -> None:
    """Check everything in a head except its totals."""
    codec = head.codec
    require(codec.compression in CODECS, f"compression {codec.compression!r} is unknown")
    require(0 < codec.block_bytes <= MAX_BLOCK_BYTES, f"block_bytes is {codec.block_bytes}")
    require(codec.block_bytes % 16 == 0, f"block_bytes is {codec.block_bytes}, which splits elements")
    require(head.world_size >= 1, f"world_size is {head.world_size}")
    require(head.rank is None or 0 <= head.rank < head.world_size, f"rank {head.rank} of {head.world_size}")
    firsts: dict[str, str] = {}
    for frame in head.frames:
        before = firsts.get(frame.kind)
        require(before is None or before < frame.first, f"its frames with {frame.kind} are out of order")
        firsts[frame.kind] = frame.first


def check_objects(names: Sequence[str], sizes: Sequence[int]) -> list[ObjectName]:
    """Check a table of objects, and return their names."""
    require(len(names) == len(sizes), "its columns of objects have different lengths")
    require(len(set(names)) == len(names), "two objects have the same name")
    for name, size in zip(names, sizes, strict=True):
        require(is_safe(name), f"object name {name!r} leaves the checkpoint")
        require(0 <= size <= MAX_INT, f"object {name} has {size} bytes")
    return list(map(ObjectName, names))


def check_names(names: Sequence[str], first: str, after: str | None) -> None:
    """Check that the names of a frame ascend, from the first that the head lists to before that of the next frame."""
    require(bool(names) and names[0] == first, f"a frame does not begin with {first!r}")
    ascending = all(a < b for a, b in itertools.pairwise(names))
    require(ascending and (after is None or names[-1] < after), f"names do not ascend after {first!r}")


def check_tensor(fqn: str, dtype: str, size: Shape, planes: int, codec: BlockCodec) -> int:
    """Check a tensor's properties, and return the bytes per element."""
    require(dtype in ITEM_BYTES, f"{fqn} has the unknown dtype {dtype!r}")
    most_planes = codec.planes(number_bytes(dtype))
    require(planes in {1, most_planes}, f"{fqn}, of {dtype}, has {planes} byte planes")
    item_bytes = ITEM_BYTES[dtype]
    right = all(0 <= extent <= MAX_INT for extent in size) and prod(size) * item_bytes <= MAX_INT
    require(right, f"{fqn} has shape {list(size)}")
    return item_bytes


def check_paths(paths: Mapping[str, tuple[str | int, ...]]) -> None:
    """Check `planner_data`."""
    for fqn, path in paths.items():
        right = path and all(isinstance(step, str) or 0 <= step <= MAX_INT for step in path)
        require(bool(right), f"{fqn} has an invalid path")
    _check_slots(paths.values())


def _check_slots(paths: Iterable[tuple[str | int, ...]]) -> None:
    paths = list(paths)
    most = max(MAX_LIST_SLOTS, 64 * len(paths))
    require(list_slots(paths) <= most, "planner_data implies lists too long for the checkpoint")
