"""Who takes part: this package, stock DCP's writers, and other savers, behind one pair of functions."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, Codec, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.dcp.undocumented import stock_url_reader, stock_url_writer, stock_zstandard
from integration.bench.states import State

OURS = "dcp_storage"
OURS_RAW = "dcp_storage none"
STOCK = "stock"
STOCK_T2 = "stock t2"
STOCK_ZSTD = "stock zstd t2"
FSSPEC = "fsspec"
S3_CONNECTOR = "s3torchconnector t2"
TORCH_CHECKPOINTING = "torch_checkpointing"
WRITES = "writes alone"
_REGION = "us-east-1"


@dataclass(frozen=True)
class Place:
    """Where one checkpoint goes: a directory, or a URL with what s3fs needs to reach it."""

    url: str
    storage_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contestant:
    """A name, and how it saves and loads."""

    name: str
    save: Callable[[State, Place], None]
    load: Callable[[State, Place], None]


def contestants(store: str) -> list[Contestant]:
    """Return everybody who can take part at a store, and is installed."""
    ours = [
        _dcp(OURS, _our_writer, _our_reader, ours=True),
        _dcp(OURS_RAW, partial(_our_writer, codec=Codec(compression="none")), _our_reader, ours=True),
    ]
    return [*ours, *(_local_peers() if store == "local" else _s3_peers())]


def missing() -> list[str]:
    """Return the contestants that are not installed."""
    return [name for name in ("s3torchconnector", "torch_checkpointing") if find_spec(name) is None]


def _local_peers() -> list[Contestant]:
    zstandard = partial(_stock_writer, thread_count=2, extensions=(stock_zstandard,))
    found = [
        _dcp(STOCK, _stock_writer, _stock_reader),
        _dcp(STOCK_T2, partial(_stock_writer, thread_count=2), _stock_reader),
        _dcp(STOCK_ZSTD, zstandard, _stock_reader),
    ]
    if find_spec("torch_checkpointing"):
        found.append(Contestant(TORCH_CHECKPOINTING, _save_torch_checkpointing, _load_torch_checkpointing))
    return found


def _s3_peers() -> list[Contestant]:
    found = [_dcp(FSSPEC, _fsspec_writer, _fsspec_reader)]
    if find_spec("s3torchconnector"):
        found.append(_dcp(S3_CONNECTOR, _connector_writer, _connector_reader))
    return found


def _dcp(
    name: str, writer: Callable[[Place], Any], reader: Callable[[Place], Any], *, ours: bool = False
) -> Contestant:
    def save(state: State, place: Place) -> None:
        dcp_save(state, storage_writer=writer(place), planner=ShardedSavePlanner() if ours else None, no_dist=_alone())

    def load(state: State, place: Place) -> None:
        dcp_load(state, storage_reader=reader(place), planner=ShardedLoadPlanner() if ours else None, no_dist=_alone())

    return Contestant(name, save, load)


def _alone() -> bool:
    return not dist.is_initialized()


def _our_writer(place: Place, codec: Codec = Codec()) -> AsyncStorageWriter:
    return AsyncStorageWriter(place.url, storage_options=place.storage_options or None, codec=codec)


def _our_reader(place: Place) -> AsyncStorageReader:
    return AsyncStorageReader(place.url, storage_options=place.storage_options or None)


def _stock_writer(place: Place, thread_count: int = 1, extensions: tuple[Any, ...] = ()) -> FileSystemWriter:
    made = [extension() for extension in extensions] or None
    return FileSystemWriter(place.url, thread_count=thread_count, _extensions=made)


def _stock_reader(place: Place) -> FileSystemReader:
    return FileSystemReader(place.url)


def _fsspec_writer(place: Place) -> StorageWriter:
    return stock_url_writer(place.url, **place.storage_options)


def _fsspec_reader(place: Place) -> StorageReader:
    return stock_url_reader(place.url, **place.storage_options)


def _connector_writer(place: Place) -> Any:
    from s3torchconnector.dcp import S3FileSystem, S3StorageWriter

    writer = S3StorageWriter(_REGION, place.url, thread_count=2)
    writer.fs = S3FileSystem(_REGION, s3_client=_connector_client(place.storage_options["endpoint_url"]))
    return writer


def _connector_reader(place: Place) -> Any:
    from s3torchconnector.dcp import S3FileSystem, S3StorageReader

    reader = S3StorageReader(_REGION, place.url)
    client = _connector_client(place.storage_options["endpoint_url"])
    reader.fs = S3FileSystem(_REGION, s3_client=client, reader_constructor=reader._reader_constructor)
    return reader


@cache
def _connector_client(endpoint: str) -> Any:
    """Its writer takes no endpoint, so the client below is made here; once, for it starts threads of its own."""
    from s3torchconnector import S3ClientConfig
    from s3torchconnector._s3client import S3Client

    return S3Client(_REGION, endpoint=endpoint, s3client_config=S3ClientConfig(force_path_style=True))


@cache
def _manager() -> Any:
    from torch_checkpointing import CheckpointManager
    from torch_checkpointing.config import SyncCheckpointSaverConfig
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    # Its direct I/O writes unaligned pieces, which ext4 and xfs refuse.
    files = LocalFileSystemStorageConfig(use_direct_io=False)
    return CheckpointManager(CheckpointManager.Config(save=SyncCheckpointSaverConfig(), storage_config=files))


def _save_torch_checkpointing(state: State, place: Place) -> None:
    _manager().save(place.url, {"state": state})
    for path in Path(place.url).iterdir():  # it does not sync its files, and everybody else does
        _sync(path)


def _load_torch_checkpointing(state: State, place: Place) -> None:
    _manager().load(place.url, into={"state": state})


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
