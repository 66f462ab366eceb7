"""`AsyncStorageReader`: DCP's `StorageReader` on this package's format, pipelines and stores."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from dcp_storage.config import Transfer
from dcp_storage.dcp.calls import Location, Path, choose_observer, observed
from dcp_storage.dcp.metadata import find_chunk, to_metadata
from dcp_storage.dcp.planners.default_plans import check_default_plan
from dcp_storage.dcp.stock import load_stock
from dcp_storage.dcp.tensors import BytesTarget, ChunkTarget, dtype_from_name, read_box
from dcp_storage.errors import ConfigError, CoverageError, DcpStorageError
from dcp_storage.format.dtypes import ITEM_BYTES
from dcp_storage.format.legacy import StockManifest
from dcp_storage.format.manifest import Manifest
from dcp_storage.geometry import contains
from dcp_storage.observe import Observer
from dcp_storage.store.base import Store
from dcp_storage.transfer.load import LoadItem, load_items
from dcp_storage.transfer.manifests import read_manifest
from dcp_storage.transfer.ranges import needed_blocks


class AsyncStorageReader(StorageReader):
    """Reads checkpoints of `AsyncStorageWriter`, and stock ones of DCP's own writers, under any sharding.

    Pass it to `dcp.load` as `storage_reader=`. Only the blocks that a rank needs are read; each is verified, and
    decoded once. It holds no loop, thread, connection or file between calls, and pickles.

    Args:
        path: A directory (`str` or `os.PathLike`) or a URL that fsspec knows, such as `s3://bucket/run/step-100`.
        storage_options: Go to the fsspec file system as they are (`key`, `secret`, `endpoint_url`, `profile`, ...).
        transfer: How bytes move, and how much memory that may take.
        progress: Show a progress bar on local rank 0, if standard error is a terminal.
        observer: Is told of every transfer of this rank.

    Raises:
        ConfigError: An argument is impossible: an unknown protocol, options for a local path.

    What a load raises reaches the caller of `dcp.load`, on every rank, inside of DCP's `CheckpointException`, whose
    `failures` hold the typed errors: `CheckpointNotFound`, `ManifestCorrupt`, `UnsupportedFormat`, `BlockCorrupt`,
    `CoverageError`, `StoreError`.
    """

    def __init__(
        self,
        path: Path,
        *,
        storage_options: Mapping[str, Any] | None = None,
        transfer: Transfer = Transfer(),  # noqa: B008 (frozen)
        progress: bool = False,
        observer: Observer | None = None,
    ) -> None:
        super().__init__()
        self._location = Location(path, storage_options)
        self._transfer = transfer
        self._observer = choose_observer(observer, progress=progress)
        self._manifest: Manifest | StockManifest | DcpStorageError | None = None

    @property
    def checkpoint_id(self) -> Path:
        """Where the checkpoint is; DCP's logger reads it, so without credentials."""
        return self._location.shown

    def reset(self, checkpoint_id: Path | None = None) -> None:
        """Begin another load, from `checkpoint_id` if it is given."""
        self._manifest = None
        if checkpoint_id is not None:
            self._location = replace(self._location, path=checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read and validate the manifest.

        Raises:
            CheckpointNotFound: There is none here.
            ManifestCorrupt: There is one, and it is damaged.
            UnsupportedFormat: It is of a later version, or a pickle that names what no stock checkpoint does.
            StoreError: It could not be read.

        After any error `dcp.load` asks a second time, with `rank`, and would then make text of what it gets. So that
        second call returns empty metadata, and `set_up_storage_reader` raises the typed error.
        """
        if "rank" in kwargs and isinstance(self._manifest, DcpStorageError):
            return Metadata({}, storage_data=self._manifest)
        try:
            manifest = self._location.run(read_manifest)
        except DcpStorageError as error:
            self._manifest = error
            raise
        return to_metadata(manifest)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take the manifest out of the metadata that `read_metadata` returned.

        Raises:
            DcpStorageError: What made `read_metadata` fail.
        """
        if isinstance(metadata.storage_data, DcpStorageError):
            raise metadata.storage_data
        self._manifest = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leave the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for, and return a future that is done: DCP waits for it at once.

        Raises:
            BlockCorrupt: A block failed its check twice.
            CoverageError: The plan asks for what the checkpoint does not hold.
            StoreError: An object is missing or could not be read.
        """
        manifest = self._manifest
        check_default_plan(plan, planner)
        if isinstance(manifest, StockManifest):
            self._location.run(
                partial(
                    load_stock,
                    manifest=manifest,
                    plan=plan,
                    planner=planner,
                    transfer=self._transfer,
                    observer=self._observer,
                )
            )
        elif isinstance(manifest, Manifest):
            items = _load_items(manifest, plan, planner)
            self._location.run(partial(self._load, manifest=manifest, items=items))
        else:
            raise ConfigError("the reader was not set up: pass it to dcp.load")
        future: Future[None] = Future()
        future.set_result(None)
        return future

    async def _load(self, store: Store, manifest: Manifest, items: list[LoadItem]) -> None:
        raw_bytes = sum(item.wanted_bytes(manifest.codec.block_bytes) for item in items)
        names = [stored.name for stored in manifest.objects]
        with observed(self._observer, "load", store.url, raw_bytes):
            await load_items(store, items, names, manifest.codec, transfer=self._transfer, observer=self._observer)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Path) -> bool:
        """Return whether a path or URL is one that this package can open."""
        try:
            Location(checkpoint_id, None)
        except ConfigError:
            return False
        return True


def _load_items(manifest: Manifest, plan: LoadPlan, planner: LoadPlanner) -> list[LoadItem]:
    """Group the reads by the stored chunk that they read: resharding aims many at one."""
    items = []
    by_chunk: defaultdict[tuple[str, int], list[ReadItem]] = defaultdict(list)
    offsets = {fqn: [chunk.offsets for chunk in tensor.chunks] for fqn, tensor in manifest.tensors.items()}
    for read in plan.items:
        fqn = read.storage_index.fqn
        if read.type == LoadItemType.BYTE_IO:
            items.append(_bytes_item(manifest, fqn, read, planner))
        elif fqn in offsets:
            by_chunk[fqn, find_chunk(read.storage_index, offsets[fqn])].append(read)
        else:
            raise _not_stored(fqn)
    items.extend(_chunk_item(manifest, fqn, number, reads, planner) for (fqn, number), reads in by_chunk.items())
    return items


def _bytes_item(manifest: Manifest, fqn: str, read: ReadItem, planner: LoadPlanner) -> LoadItem:
    if fqn not in manifest.bytes:
        raise _not_stored(fqn)
    entry = manifest.bytes[fqn]
    blocks = range(-(-entry.size // manifest.codec.block_bytes))
    return LoadItem(fqn, entry.size, 1, entry.segments, blocks, BytesTarget(read, entry.size, planner))


def _chunk_item(manifest: Manifest, fqn: str, number: int, reads: list[ReadItem], planner: LoadPlanner) -> LoadItem:
    tensor = manifest.tensors[fqn]
    chunk = tensor.chunks[number]
    boxes = [read_box(read) for read in reads]
    for box in boxes:
        if not contains(chunk.sizes, box):
            raise CoverageError(f"{fqn}: the plan reads {box} of a chunk of shape {list(chunk.sizes)}", fqn=fqn)
    item_bytes = ITEM_BYTES[tensor.dtype]
    wanted = needed_blocks(chunk.sizes, boxes, item_bytes, manifest.codec.block_bytes)
    target = ChunkTarget(chunk.sizes, dtype_from_name(tensor.dtype), reads, planner)
    return LoadItem(fqn, prod(chunk.sizes) * item_bytes, tensor.planes, chunk.segments, wanted, target)


def _not_stored(fqn: str) -> CoverageError:
    return CoverageError(f"the plan reads {fqn}, which the checkpoint does not hold", fqn=fqn)
