"""Manifests, pickles and blocks that mean harm: made by changing sound ones, wherever the choices come from.

`pick(n)` returns a number below `n`: from Hypothesis, from a fuzzer, or from `random`.
"""

import contextlib
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import msgspec
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from xxhash import xxh3_64_hexdigest

from dcp_storage.config import Codec
from dcp_storage.dcp.metadata import to_metadata
from dcp_storage.errors import BlockCorrupt, DcpStorageError
from dcp_storage.format.codecs.blocks import CODECS, ItemEncoder
from dcp_storage.format.dtypes import ITEM_BYTES
from dcp_storage.format.manifest.manifest import Manifest, decode
from dcp_storage.format.names import is_safe
from dcp_storage.format.stock.manifest import decode_stock_metadata
from dcp_storage.geometry import whole
from dcp_storage.transfer.ranges import coalesce, locate, needed_blocks

Pick = Callable[[int], int]

_VALUES: list[Any] = [
    *(-1, 0, 1, 2, 3, 7, 16, 4096, 65_537, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 53, (1 << 63) - 1, 1 << 63, 1 << 64),
    *(10**30, -(1 << 63), 1.5, 1e308, True, False, None, "", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b"),
    *("s3://bucket/x", "c:x", "x" * 300, "\ud7ff", "none", "zstd", "float32", "bfloat16", "complex128", "0" * 16),
    *([], {}, [[]], [0], [1 << 62, 1 << 62], [0, 1 << 70], [1] * 80, {"size": 0}, ["step", 1 << 40], ["step", 0]),
]


def sound_manifest() -> dict[str, Any]:
    """Return a manifest as plain JSON values: several boxes, segments, objects, dtypes and entries."""
    return {
        "head": {
            "format": "dcp_storage",
            "version": 1,
            "requires": [],
            "save_id": "0123456789abcdef",
            "created": "2025-01-01T00:00:00+00:00",
            "libraries": {"torch": "2.13"},
            "world_size": 2,
            "rank": None,
            "codec": {"compression": "zstd", "block_bytes": 4096, "level": 1},
            "info": {"step": 5},
            "tensors": 4,
            "entries": 1,
            "objects": 2,
            "raw_bytes": 15_000,
            "stored_bytes": 14_000,
        },
        "objects": {
            "names": ["0123456789abcdef-0-0.distcp.zst", "0123456789abcdef-1-0.distcp.zst"],
            "sizes": [9000, 5000],
        },
        "tensors": {
            "names": ["empty", "listed", "w", "whole"],
            "dtypes": ["bool", "int8", "float32", "bfloat16"],
            "sizes": [[0, 3], [4, 4], [40, 64], []],
            "planes": [1, 1, 4, 2],
            "layouts": [
                None,
                {"boxes": [[0, 0, 4, 2], [0, 2, 2, 2], [2, 2, 2, 2]]},
                [20, [0]],
                None,
            ],
            "stored": {
                "segments": [0, 1, 1, 1, 1, 2, 1],
                "blocks": [1, 1, 1, 2, 1, 1, 1],
                "objects": [0, 0, 0, 0, 0, 1, 0],
                "offsets": [8900, 8920, 8940, 0, 4900, 0, 8960],
                "lengths": [20, 20, 20, 4000, 900, 4000, 7, 15],
                "checks": "0a1b2c3d" * 8,
            },
        },
        "entries": {
            "names": ["step"],
            "sizes": [5000],
            "stored": {
                "segments": 1,
                "blocks": 2,
                "objects": 1,
                "offsets": [7],
                "lengths": [4000, 900],
                "checks": "0a1b2c3d" * 2,
            },
        },
        "paths": {
            "names": ["empty", "listed", "step", "w", "whole"],
            "paths": [["list", 0], ["listed"], ["list", 1, "step"], ["w"], ["whole"]],
        },
    }


def mutate(document: Any, pick: Pick) -> Any:
    """Return a copy with one to three of its values changed, removed, repeated or exchanged."""
    document = deepcopy(document)
    for _ in range(1 + pick(3)):
        places = list(_places(document))
        if not places:
            return document
        node, key = places[pick(len(places))]
        match pick(6):
            case 0 | 1 | 2:
                node[key] = deepcopy(_VALUES[pick(len(_VALUES))])
            case 3:
                del node[key]
            case 4 if isinstance(node, list):
                node.insert(key, deepcopy(node[key]))
            case _:
                other, at = places[pick(len(places))]
                node[key] = deepcopy(other[at])
    return document


def _places(node: Any) -> Any:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield node, key
        yield from _places(value)


def read_manifest(data: bytes) -> Manifest | None:
    """Read a manifest as a load does up to its plan; `None` where it was refused, with a typed error.

    Raises:
        AssertionError: It was accepted and breaks a promise.
    """
    try:
        manifest = decode(data, "here")
        metadata = to_metadata(manifest)
        dict(metadata.state_dict_metadata)
        manifest.check_whole()
    except DcpStorageError as error:
        assert "here" in str(error) or "torch" in str(error)
        return None
    assert all(is_safe(stored.name) and 0 <= stored.size < 1 << 63 for stored in manifest.objects)
    if manifest.rank is None:
        _plan(manifest)
    pickle.loads(pickle.dumps(metadata))
    return manifest


def _plan(manifest: Manifest) -> None:
    """Plan to read all, and check that nothing but what lies in the objects is asked for."""
    codec = manifest.codec
    items = [(entry.size, entry.segments) for entry in manifest.bytes.values()]
    for tensor in manifest.tensors.values():
        for number, box in enumerate(tensor.boxes):
            items.append((box.numel * ITEM_BYTES[tensor.dtype], tensor.segments(number)))
            blocks = needed_blocks(box.sizes, [whole(box.sizes)], ITEM_BYTES[tensor.dtype], codec.block_bytes)
            assert blocks == list(range(-(-items[-1][0] // codec.block_bytes)))
    blocks = []
    for number, (raw_bytes, segments) in enumerate(items):
        blocks += locate(number, range(-(-raw_bytes // codec.block_bytes)), segments, raw_bytes, codec)
    assert sum(block.stop - block.start for block in blocks) == sum(raw_bytes for raw_bytes, _ in items)
    for fetch in coalesce(blocks, 1 << 20, 1 << 26):
        assert 0 <= fetch.start < fetch.stop <= manifest.objects[fetch.object].size


def stock_pickle() -> bytes:
    """Return the `.metadata` of a stock writer."""
    size = torch.Size
    chunks = [ChunkStorageMetadata(size([0, 0]), size([2, 3])), ChunkStorageMetadata(size([2, 0]), size([2, 3]))]
    metadata = Metadata(
        {
            "w": TensorStorageMetadata(TensorProperties(torch.float32), size([4, 3]), chunks),
            "n": BytesStorageMetadata(),
        },
        {"w": ("w",), "n": ("list", 1)},
        {
            MetadataIndex("w", [0, 0], 0): _StorageInfo("__0_0.distcp", 0, 100),
            MetadataIndex("w", [2, 0], 1): _StorageInfo("__1_0.distcp", 0, 100, ["stream.zstd/1"]),
            MetadataIndex("n"): _StorageInfo("__0_0.distcp", 100, 50),
        },
    )
    return pickle.dumps(metadata, 4)


def mutate_bytes(data: bytes, pick: Pick) -> bytes:
    """Return the bytes with a few of them changed, inserted, removed or repeated."""
    changed = bytearray(data)
    for _ in range(1 + pick(4)):
        at = pick(len(changed) + 1)
        match pick(5):
            case 0:
                changed[at : at + 1] = bytes([pick(256)])
            case 1:
                changed[at:at] = bytes(pick(256) for _ in range(1 + pick(4)))
            case 2:
                del changed[at : at + 1 + pick(9)]
            case 3:
                start = pick(len(changed) + 1)
                changed[at:at] = changed[start : start + pick(40)]
            case _:
                changed[at : at + 4] = struct.pack(
                    "<I", [0, 1, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1][pick(6)]
                )
    return bytes(changed)


def read_stock(data: bytes) -> None:
    """Read a stock manifest; a refusal is typed, and what is accepted keeps its promises."""
    try:
        manifest = decode_stock_metadata(data, where="here")
    except DcpStorageError as error:
        assert "here" in str(error)
        return
    assert all(is_safe(item.object_name) and 0 <= item.offset < 1 << 63 for item in manifest.storage.values())
    to_metadata(manifest)
    msgspec.structs.astuple(manifest)


RAW_BYTES = 4096


def sound_block(compression: str, planes: int) -> bytes:
    """Return an encoded block of `RAW_BYTES`."""
    codec = Codec(compression, block_bytes=RAW_BYTES)  # type: ignore[arg-type]
    raw = (torch.arange(RAW_BYTES // 4, dtype=torch.int32) * 77).numpy().tobytes()
    room = memoryview(bytearray(CODECS["zstd"].limit(RAW_BYTES)))
    (size,) = ItemEncoder(codec).encode(raw, planes, room).lengths
    return bytes(room[:size])


def read_block(data: bytes, compression: str, planes: int) -> None:
    """Decode bytes as a block, with the check value that they would have: only what is decoded can betray them."""
    check = data[-4:].hex() if compression == "zstd" else xxh3_64_hexdigest(data)
    out = memoryview(bytearray(RAW_BYTES + 32))
    with contextlib.suppress(BlockCorrupt):
        CODECS[compression].make_decoder(RAW_BYTES).decode(data, check, planes, out[16:-16])
    assert bytes(out[:16]) == bytes(out[-16:]) == bytes(16)


def rezip(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip archive of these records."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as new:
        for name, data in records.items():
            new.writestr(name, data)
    return buffer.getvalue()


def records_of(data: bytes) -> dict[str, bytes]:
    """Return the records of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def container(value: object) -> bytes:
    """Return what `torch.save` makes of a value."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
