"""What must hold in a manifest before a byte is read or allocated on its word."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from math import prod

from dcp_storage.format.codecs.base import BlockCodec
from dcp_storage.format.codecs.blocks import CODECS
from dcp_storage.format.dtypes import ITEM_BYTES, number_bytes
from dcp_storage.format.faults import MAX_INT, require
from dcp_storage.format.manifest.frames import Head
from dcp_storage.format.names import is_safe
from dcp_storage.format.paths import list_slots
from dcp_storage.geometry import Shape

MAX_BLOCK_BYTES = 64 << 20
MAX_LIST_SLOTS = 1 << 20
"""Elements of the lists in `planner_data`, or 64 for each of its entries where that is more."""


def check_head(head: Head) -> None:
    """Check what a head says but for its totals."""
    codec = head.codec
    require(codec.compression in CODECS, f"unknown compression {codec.compression!r}")
    require(0 < codec.block_bytes <= MAX_BLOCK_BYTES, f"blocks of {codec.block_bytes} bytes")
    require(codec.block_bytes % 16 == 0, f"blocks of {codec.block_bytes} bytes cut elements in two")
    require(head.world_size >= 1, f"a world size of {head.world_size}")
    require(head.rank is None or 0 <= head.rank < head.world_size, f"rank {head.rank} of {head.world_size}")
    firsts: dict[str, str] = {}
    for frame in head.frames:
        before = firsts.get(frame.kind)
        require(before is None or before < frame.first, f"its frames with {frame.kind} are out of order")
        firsts[frame.kind] = frame.first


def check_objects(names: Sequence[str], sizes: Sequence[int]) -> None:
    """Check a table of objects."""
    require(len(names) == len(sizes), "its table of objects is uneven")
    require(len(set(names)) == len(names), "two objects of one name")
    for name, size in zip(names, sizes, strict=True):
        require(is_safe(name), f"object name {name!r} leaves the checkpoint")
        require(0 <= size <= MAX_INT, f"object {name} of {size} bytes")


def check_names(names: Sequence[str], first: str, after: str | None) -> None:
    """Check that the names of a frame ascend, from the one that the head lists to before the first of the next."""
    require(bool(names) and names[0] == first, f"a frame that begins with another name than {first!r}")
    ascending = all(a < b for a, b in itertools.pairwise(names))
    require(ascending and (after is None or names[-1] < after), f"names that do not ascend after {first!r}")


def check_tensor(fqn: str, dtype: str, size: Shape, planes: int, codec: BlockCodec) -> int:
    """Check what is said of a tensor as a whole, and return the bytes of an element."""
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
    require(list_slots(paths) <= most, "planner_data has lists longer than the checkpoint can hold")
