"""DCP's `Metadata` and this package's manifest: each made from the other."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from dcp_storage.collector import uncollected
from dcp_storage.config import Codec
from dcp_storage.dcp.kinds.boxes import chunk_box
from dcp_storage.dcp.stored import StoredTensorMetadata
from dcp_storage.dcp.tensors import dtype_from_name, dtype_name, planes_of
from dcp_storage.dcp.undocumented import METADATA_VERSION
from dcp_storage.errors import CoverageError, UnsupportedTensor
from dcp_storage.format.boxes import Boxes
from dcp_storage.format.columns import Columns, layout_of
from dcp_storage.format.draft import Draft, DraftEntry, DraftTensor
from dcp_storage.format.frames import StoredCodec
from dcp_storage.format.legacy import StockManifest
from dcp_storage.format.manifest import Manifest, StoredObject
from dcp_storage.format.schema import ListedBoxes
from dcp_storage.geometry import Box, Shape, tiling_fault


@uncollected
def build_draft(
    metadata: Metadata,
    results: Iterable[WriteResult],
    codec: Codec,
    *,
    save_id: str,
    world_size: int,
    rank: int | None,
    attempt: str | None,
    info: Mapping[str, Any],
) -> Draft:
    """Join what the planner planned with what the ranks stored.

    Raises:
        CoverageError: The two do not match item by item, or a tensor's chunks do not tile it.
        UnsupportedTensor: The planner data is no flatten mapping.
    """
    stored = _Results(results)
    table = _ObjectTable()
    tensors: dict[str, DraftTensor] = {}
    entries: dict[str, DraftEntry] = {}
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            dtype = dtype_name(entry.properties.dtype, fqn)
            planes = planes_of(dtype, byte_planes=codec.byte_planes and codec.compression == "zstd")
            boxes = sorted(Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
            layout = layout_of(tuple(entry.size), boxes)
            itemsize = entry.properties.dtype.itemsize
            columns = table.columns(stored.take(fqn, box, itemsize) for box in boxes)
            tensors[fqn] = DraftTensor(dtype, tuple(entry.size), planes, boxes, layout, columns)
            if rank is None and isinstance(layout, ListedBoxes):
                _check_tiling(fqn, tensors[fqn])
        else:
            result = stored.take(fqn, None)
            entries[fqn] = DraftEntry(result.size_in_bytes, table.columns([result]))
    stored.check_taken()
    return Draft(
        save_id=save_id,
        created=datetime.now(UTC).isoformat(timespec="microseconds"),
        libraries=_libraries(),
        world_size=world_size,
        rank=rank,
        attempt=attempt,
        codec=StoredCodec(codec.compression, codec.block_bytes, codec.level),
        digest=codec.digest,
        info=dict(info),
        objects=table.objects(),
        tensors=tensors,
        entries=entries,
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
        ManifestCorrupt: Something in the manifest cannot be.
        UnsupportedFormat: This torch lacks a dtype that the checkpoint holds.
    """
    if isinstance(manifest, Manifest):
        manifest.check_whole()
    entries: dict[str, Any] = {fqn: BytesStorageMetadata() for fqn in manifest.bytes}
    properties: dict[str, TensorProperties] = {}
    for fqn, tensor in manifest.tensors.items():
        if tensor.dtype not in properties:
            properties[tensor.dtype] = TensorProperties(dtype=dtype_from_name(tensor.dtype))
        entries[fqn] = StoredTensorMetadata(properties[tensor.dtype], tensor.boxes)
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

    def columns(self, results: Iterable[WriteResult]) -> Columns:
        """Return where items were put."""
        columns, numbers, sizes = Columns(), self._numbers, self._sizes
        for result in results:
            for stored in result.storage_data:
                lengths = stored.lengths
                number = numbers.setdefault(stored.object_name, len(sizes))
                if number == len(sizes):
                    sizes.append(0)
                stop = stored.offset + (lengths[0] if len(lengths) == 1 else sum(lengths))
                if stop > sizes[number]:  # noqa: PLR1730 - called for every block, which `max` would feel
                    sizes[number] = stop
                columns.add_segment(number, stored.offset, lengths, stored.checks, stored.digest)
            columns.segments.append(len(result.storage_data))
        return columns

    def objects(self) -> list[StoredObject]:
        return list(map(StoredObject, self._numbers, self._sizes))


class _Results:
    """What the ranks stored, by name and offsets, each taken once."""

    def __init__(self, results: Iterable[WriteResult]) -> None:
        self._left: dict[tuple[str, Shape], WriteResult] = {}
        self._more: list[WriteResult] = []  # chunks without elements begin where others do
        for result in results:
            item = (result.index.fqn, result.index.offset or ())
            if self._left.setdefault(item, result) is not result:
                self._more.append(result)

    def take(self, fqn: str, box: Box | None, itemsize: int = 0) -> WriteResult:
        item = (fqn, box.offsets if box else ())
        if self._more and box:
            self._bring(item, box.numel * itemsize)
        result = self._left.pop(item, None)
        if result is None:
            part = f" {box}" if box else ""
            raise CoverageError(f"{fqn}{part} is in the plan but no rank wrote it", fqn=fqn)
        return result

    def _bring(self, item: tuple[str, Shape], nbytes: int) -> None:
        """Of several that begin at one place have the one of this size taken next."""
        first = self._left.get(item)
        if first is not None and first.size_in_bytes == nbytes:
            return
        for number, other in enumerate(self._more):
            if (other.index.fqn, other.index.offset or ()) == item and other.size_in_bytes == nbytes:
                self._left[item] = self._more.pop(number)
                self._more += [first] if first is not None else []
                return

    def check_taken(self) -> None:
        left = [*self._left.values(), *self._more]
        if left:
            fqn = left[0].index.fqn
            raise CoverageError(f"{fqn} was written but the plan has no such item", fqn=fqn)


def find_chunk(index: MetadataIndex, boxes: Boxes) -> int:
    """Return the number of the chunk that begins where an index says; of several (empty ones), the one it hints at.

    Raises:
        CoverageError: No chunk begins there.
    """
    wanted = tuple(index.offset or ())
    if index.index is not None and index.index < len(boxes) and boxes[index.index].offsets == wanted:
        return index.index
    number = boxes.at(wanted)
    if number is None:
        raise CoverageError(f"{index.fqn} has no chunk that begins at {list(wanted)}", fqn=index.fqn)
    return number


def _check_tiling(fqn: str, tensor: DraftTensor) -> None:
    fault = tiling_fault(tensor.size, tensor.boxes)
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
