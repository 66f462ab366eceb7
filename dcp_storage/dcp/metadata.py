"""DCP's `Metadata` and this package's `Manifest`: each made from the other."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from dcp_storage.collector import uncollected
from dcp_storage.config import Codec
from dcp_storage.dcp.kinds.boxes import chunk_box
from dcp_storage.dcp.tensors import dtype_from_name, dtype_name, planes_of
from dcp_storage.dcp.undocumented import METADATA_VERSION
from dcp_storage.errors import CoverageError, UnsupportedTensor
from dcp_storage.format.legacy import StockManifest
from dcp_storage.format.manifest import BytesEntry, Chunk, Manifest, Segment, StoredCodec, StoredObject, TensorEntry
from dcp_storage.geometry import tiling_fault
from dcp_storage.transfer.save import StoredSegment


@uncollected
def build_manifest(
    metadata: Metadata,
    results: Iterable[WriteResult],
    codec: Codec,
    *,
    save_id: str,
    world_size: int,
    rank: int | None,
    attempt: str | None,
) -> Manifest:
    """Join what the planner planned with what the ranks stored.

    Raises:
        CoverageError: The two do not match item by item, or a tensor's chunks do not tile it.
        UnsupportedTensor: The planner data is no flatten mapping.
    """
    stored = _by_item(metadata, results)
    table = _ObjectTable()
    tensors: dict[str, TensorEntry] = {}
    entries: dict[str, BytesEntry] = {}
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            chunks = tuple(
                Chunk(tuple(chunk.offsets), tuple(chunk.sizes), table.segments(_take(stored, fqn, number)))
                for number, chunk in enumerate(entry.chunks)
            )
            dtype = dtype_name(entry.properties.dtype, fqn)
            planes = planes_of(dtype, byte_planes=codec.byte_planes and codec.compression == "zstd")
            tensors[fqn] = TensorEntry(dtype, tuple(entry.size), planes, chunks)
            _check_tiling(fqn, tensors[fqn], partial=rank is not None)
        else:
            result = _take(stored, fqn, None)
            entries[fqn] = BytesEntry(result.size_in_bytes, table.segments(result))
    if stored:
        fqn = next(iter(stored))[0]
        raise CoverageError(f"{fqn} was written but the plan has no such item", fqn=fqn)
    return Manifest(
        save_id=save_id,
        created=datetime.now(UTC).isoformat(timespec="microseconds"),
        libraries=_libraries(),
        world_size=world_size,
        rank=rank,
        attempt=attempt,
        codec=StoredCodec(codec.compression, codec.block_bytes, codec.level),
        objects=table.objects(),
        tensors=tensors,
        bytes=entries,
        planner_data=_planner_data(metadata.planner_data),
    )


def is_whole(metadata: Metadata) -> bool:
    """Return whether the chunks of every tensor tile it."""
    entries = [entry for entry in metadata.state_dict_metadata.values() if isinstance(entry, TensorStorageMetadata)]
    return all(tiling_fault(tuple(entry.size), list(map(chunk_box, entry.chunks))) is None for entry in entries)


@uncollected
def to_metadata(manifest: Manifest | StockManifest) -> Metadata:
    """Return what DCP's planners read; the manifest itself is its `storage_data`.

    Raises:
        UnsupportedFormat: This torch lacks a dtype that the checkpoint holds.
    """
    entries: dict[str, Any] = {fqn: BytesStorageMetadata() for fqn in manifest.bytes}
    for fqn, tensor in manifest.tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks]
        properties = TensorProperties(dtype=dtype_from_name(tensor.dtype))
        entries[fqn] = TensorStorageMetadata(properties, torch.Size(tensor.size), chunks)
    version = manifest.version if isinstance(manifest, StockManifest) else METADATA_VERSION
    return Metadata(entries, planner_data=manifest.planner_data, storage_data=manifest, version=version)


@cache
def _libraries() -> dict[str, str]:
    return {"dcp_storage": version("dcp-storage"), "torch": str(torch.__version__)}


class _ObjectTable:
    """Numbers the objects that segments name, and finds their sizes: an object is its segments and nothing else."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._sizes: list[int] = []

    def segments(self, result: WriteResult) -> tuple[Segment, ...]:
        return tuple(map(self._segment, result.storage_data))

    def _segment(self, stored: StoredSegment) -> Segment:
        number = self._numbers.setdefault(stored.object_name, len(self._numbers))
        segment = Segment(number, stored.offset, stored.lengths, stored.checks)
        if number == len(self._sizes):
            self._sizes.append(0)
        self._sizes[number] = max(self._sizes[number], segment.stop)
        return segment

    def objects(self) -> tuple[StoredObject, ...]:
        return tuple(map(StoredObject, self._numbers, self._sizes))


_Item = tuple[str, int | None]


def _by_item(metadata: Metadata, results: Iterable[WriteResult]) -> dict[_Item, WriteResult]:
    stored: dict[_Item, WriteResult] = {}
    for result in results:
        item = (result.index.fqn, _chunk_number(metadata, result.index))
        if item in stored:
            raise CoverageError(f"{result.index.fqn} at {result.index.offset} was written twice", fqn=result.index.fqn)
        stored[item] = result
    return stored


def _chunk_number(metadata: Metadata, index: MetadataIndex) -> int | None:
    """Return which chunk of its tensor an index means; `None` for an entry that is no tensor."""
    entry = metadata.state_dict_metadata.get(index.fqn)
    if not isinstance(entry, TensorStorageMetadata):
        return None
    return find_chunk(index, [chunk.offsets for chunk in entry.chunks])


def find_chunk(index: MetadataIndex, offsets: Sequence[Sequence[int]]) -> int:
    """Return the number of the chunk that begins where an index says; of several (empty ones), the one it hints at.

    Raises:
        CoverageError: No chunk begins there.
    """
    wanted = tuple(index.offset or ())
    if index.index is not None and index.index < len(offsets) and tuple(offsets[index.index]) == wanted:
        return index.index
    for number, offset in enumerate(offsets):
        if tuple(offset) == wanted:
            return number
    raise CoverageError(f"{index.fqn} has no chunk that begins at {list(wanted)}", fqn=index.fqn)


def _take(stored: dict[_Item, WriteResult], fqn: str, number: int | None) -> WriteResult:
    if (fqn, number) not in stored:
        part = "" if number is None else f", chunk {number}"
        raise CoverageError(f"{fqn}{part} is in the plan but no rank wrote it", fqn=fqn)
    return stored.pop((fqn, number))


def _check_tiling(fqn: str, tensor: TensorEntry, *, partial: bool) -> None:
    fault = None if partial else tiling_fault(tensor.size, [chunk.box for chunk in tensor.chunks])
    if fault:
        raise CoverageError(
            f"{fqn}: {fault}. The state dict's sharding does not describe this tensor: nothing was committed", fqn=fqn
        )


def _planner_data(data: Any) -> dict[str, tuple[str | int, ...]] | None:
    if data is None:
        return None
    if isinstance(data, Mapping) and all(isinstance(key, str) and _is_path(path) for key, path in data.items()):
        return {key: tuple(path) for key, path in data.items()}
    raise UnsupportedTensor(
        f"the planner's planner_data is a {type(data).__name__} that is no flatten mapping (name -> path of str and "
        "int); nothing else can be stored without pickle"
    )


def _is_path(path: object) -> bool:
    return isinstance(path, tuple | list) and all(isinstance(step, str | int) for step in path)
