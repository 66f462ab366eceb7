"""The contestants: this package and stock DCP, behind one pair of functions. All that differs between them is here."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future
from math import prod
from typing import Any, cast

from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.checkpoint.manifests import read_manifest
from dcp_storage.dcp.undocumented import stock_url_reader, stock_url_writer, stock_zstandard
from dcp_storage.format.dtypes import ITEM_BYTES
from dcp_storage.format.manifest.manifest import Manifest
from dcp_storage.store.open import open_store
from integration.demo.figures import OURS, STOCK_ZSTD, Part, Place


def save(contestant: str, state: dict[str, Any], place: Place) -> None:
    """Save with one contestant, in place of its last checkpoint."""
    dcp_save(state, storage_writer=_writer(contestant, place), planner=_save_planner(contestant))


def load(contestant: str, state: dict[str, Any], place: Place) -> None:
    """Load one contestant's checkpoint into `state`."""
    planner = ShardedLoadPlanner() if contestant == OURS else None
    dcp_load(state, storage_reader=_reader(contestant, place), planner=planner)


def begin_save(state: dict[str, Any], place: Place, group: ProcessGroup) -> Future[Any]:
    """Start to replace this package's checkpoint in the background."""
    writer, planner = _writer(OURS, place), _save_planner(OURS)
    response = dcp_async_save(state, storage_writer=writer, planner=planner, process_group=group)
    return cast("Future[Any]", getattr(response, "upload_completion", response))


def stored_parts(contestant: str, place: Place) -> list[Part]:
    """Return a checkpoint's bytes by top-level key and dtype."""
    totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for fqn, dtype, raw_bytes, stored_bytes in _items(contestant, place):
        total = totals[fqn.partition(".")[0], dtype]
        total[0] += raw_bytes
        total[1] += stored_bytes
    return [Part(key, dtype, raw, stored) for (key, dtype), (raw, stored) in sorted(totals.items())]


def _items(contestant: str, place: Place) -> Iterator[tuple[str, str, int, int]]:
    """Yield name, dtype, raw and stored bytes of every tensor."""
    if contestant == OURS:
        return _own_items(asyncio.run(_read_own_manifest(place)))
    return _stock_items(_reader(contestant, place))


async def _read_own_manifest(place: Place) -> Manifest:
    async with open_store(place.below(OURS), place.storage_options) as store:
        manifest = await read_manifest(store)
    assert isinstance(manifest, Manifest)
    return manifest


def _own_items(manifest: Manifest) -> Iterator[tuple[str, str, int, int]]:
    for fqn, entry in manifest.tensors.items():
        raw_bytes = prod(entry.size) * ITEM_BYTES[entry.dtype]
        segments = (segment for number in range(len(entry.boxes)) for segment in entry.segments(number))
        stored_bytes = sum(sum(segment.lengths) for segment in segments)
        yield fqn, entry.dtype, raw_bytes, stored_bytes


def _stock_items(reader: StorageReader) -> Iterator[tuple[str, str, int, int]]:
    metadata = reader.read_metadata()
    stored: dict[str, int] = defaultdict(int)
    for index, info in cast("dict[Any, Any]", metadata.storage_data).items():
        stored[index.fqn] += info.length
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            dtype = entry.properties.dtype
            yield fqn, str(dtype).removeprefix("torch."), prod(entry.size) * dtype.itemsize, stored[fqn]


def _writer(contestant: str, place: Place) -> StorageWriter:
    path = place.below(contestant)
    if contestant == OURS:
        return AsyncStorageWriter(path, storage_options=place.storage_options)
    extensions = [stock_zstandard()] if contestant == STOCK_ZSTD else None
    if place.is_local:
        return FileSystemWriter(path, _extensions=extensions)
    return stock_url_writer(path, _extensions=extensions, **place.storage_options)


def _reader(contestant: str, place: Place) -> StorageReader:
    path = place.below(contestant)
    if contestant == OURS:
        return AsyncStorageReader(path, storage_options=place.storage_options)
    return FileSystemReader(path) if place.is_local else stock_url_reader(path, **place.storage_options)


def _save_planner(contestant: str) -> SavePlanner | None:
    return ShardedSavePlanner() if contestant == OURS else None
