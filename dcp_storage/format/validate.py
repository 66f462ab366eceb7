"""What must hold in a manifest before a byte is read or allocated on its word."""

from collections.abc import Sequence
from math import prod

from dcp_storage.collector import uncollected
from dcp_storage.errors import ManifestCorrupt
from dcp_storage.format.blocks import CHECK_CHARS, encoded_limit, plane_count
from dcp_storage.format.dtypes import ITEM_BYTES, number_bytes
from dcp_storage.format.manifest import BytesEntry, Manifest, Segment, TensorEntry
from dcp_storage.format.names import is_safe
from dcp_storage.format.paths import list_slots
from dcp_storage.geometry import contains, tiling_fault

MAX_BLOCK_BYTES = 64 << 20
MAX_INT = (1 << 63) - 1
"""What an extent, an offset or a size in bytes may be: more is no memory address and no place in a file."""
MAX_LIST_SLOTS = 1 << 20
"""Elements of the lists in `planner_data`, or 64 for each of its entries where that is more."""


@uncollected
def validate(manifest: Manifest, where: str) -> Manifest:
    """Return the manifest, or say what in it cannot be.

    A manifest of one rank's part (`rank` is not `None`) need not tile its tensors: the merged one must.

    Raises:
        ManifestCorrupt: Names the entry, and `where` the manifest was read.
    """
    try:
        _check_codec(manifest)
        _check_objects(manifest)
        for fqn, tensor in manifest.tensors.items():
            _check_tensor(manifest, fqn, tensor)
        for fqn, entry in manifest.bytes.items():
            _check_bytes(manifest, fqn, entry)
        _check_paths(manifest)
    except _Fault as fault:
        raise ManifestCorrupt(f"{where} cannot be right: {fault}", url=where) from None
    return manifest


class _Fault(Exception):
    """Something in a manifest that cannot be."""


def _require(holds: bool, says: str) -> None:
    if not holds:
        raise _Fault(says)


def _check_codec(manifest: Manifest) -> None:
    codec = manifest.codec
    _require(codec.compression in CHECK_CHARS, f"unknown compression {codec.compression!r}")
    _require(0 < codec.block_bytes <= MAX_BLOCK_BYTES, f"blocks of {codec.block_bytes} bytes")
    _require(codec.block_bytes % 16 == 0, f"blocks of {codec.block_bytes} bytes cut elements in two")
    _require(manifest.world_size >= 1, f"a world size of {manifest.world_size}")
    _require(
        manifest.rank is None or 0 <= manifest.rank < manifest.world_size,
        f"rank {manifest.rank} of {manifest.world_size}",
    )


def _check_objects(manifest: Manifest) -> None:
    names = [stored.name for stored in manifest.objects]
    _require(len(set(names)) == len(names), "two objects of one name")
    for stored in manifest.objects:
        _require(is_safe(stored.name), f"object name {stored.name!r} leaves the checkpoint")
        _require(0 <= stored.size <= MAX_INT, f"object {stored.name} of {stored.size} bytes")


def _check_tensor(manifest: Manifest, fqn: str, tensor: TensorEntry) -> None:
    _require(tensor.dtype in ITEM_BYTES, f"{fqn} has the unknown dtype {tensor.dtype!r}")
    most_planes = plane_count(number_bytes(tensor.dtype), byte_planes=True)
    _require(tensor.planes in {1, most_planes}, f"{fqn}, of {tensor.dtype}, has {tensor.planes} byte planes")
    raw_bytes = prod(tensor.size) * ITEM_BYTES[tensor.dtype]
    right = raw_bytes <= MAX_INT and all(0 <= extent <= MAX_INT for extent in tensor.size)
    _require(right, f"{fqn} has shape {list(tensor.size)}")
    for chunk in tensor.chunks:
        _require(contains(tensor.size, chunk.box), f"{fqn} has a part outside of its shape {list(tensor.size)}")
        _check_segments(manifest, fqn, tensor.chunk_bytes(chunk), chunk.segments)
    if manifest.rank is None:
        fault = tiling_fault(tensor.size, [chunk.box for chunk in tensor.chunks])
        _require(fault is None, f"{fqn}: {fault}")


def _check_paths(manifest: Manifest) -> None:
    paths = manifest.planner_data or {}
    for fqn, path in paths.items():
        right = path and all(isinstance(step, str) or 0 <= step <= MAX_INT for step in path)
        _require(bool(right), f"{fqn} has a path that is none")
    most = max(MAX_LIST_SLOTS, 64 * len(paths))
    _require(list_slots(paths.values()) <= most, "planner_data has lists longer than the checkpoint can hold")


def _check_bytes(manifest: Manifest, fqn: str, entry: BytesEntry) -> None:
    _require(entry.size >= 0, f"{fqn} has {entry.size} bytes")
    _require(fqn not in manifest.tensors, f"{fqn} is both a tensor and not")
    _check_segments(manifest, fqn, entry.size, entry.segments)


def _check_segments(manifest: Manifest, fqn: str, raw_bytes: int, segments: Sequence[Segment]) -> None:
    codec = manifest.codec
    blocks = sum(len(segment.lengths) for segment in segments)
    _require(blocks == -(-raw_bytes // codec.block_bytes), f"{fqn} has {blocks} blocks for {raw_bytes} bytes")
    first = 0
    for segment in segments:
        _check_segment(manifest, fqn, segment)
        for number, length in enumerate(segment.lengths, first):
            raw = min(codec.block_bytes, raw_bytes - number * codec.block_bytes)
            right = length == raw if codec.compression == "none" else 0 < length <= encoded_limit(raw, "zstd")
            _require(right, f"{fqn} has a block of {raw} bytes stored in {length}")
        first += len(segment.lengths)


def _check_segment(manifest: Manifest, fqn: str, segment: Segment) -> None:
    _require(0 <= segment.object < len(manifest.objects), f"{fqn} names object {segment.object}, which is not listed")
    stored = manifest.objects[segment.object]
    _require(segment.offset >= 0, f"{fqn} begins at {segment.offset} of object {stored.name}")
    _require(segment.stop <= stored.size, f"{fqn} reaches {segment.stop} of object {stored.name} ({stored.size} bytes)")
    chars = CHECK_CHARS[manifest.codec.compression]
    _require(
        len(segment.checks) == chars * len(segment.lengths), f"{fqn} has check values for other blocks than its own"
    )
    _require(set(segment.checks) <= set("0123456789abcdef"), f"{fqn} has check values that are not hexadecimal")
