"""`AsyncStorageReader`: DCP's `StorageReader`, built on this package's format, pipelines and stores."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from dcp_storage.checkpoint.manifests import read_manifest
from dcp_storage.checkpoint.place import Location
from dcp_storage.config import Transfer, require_type
from dcp_storage.dcp.hooks import hook
from dcp_storage.dcp.loads.plan import load_plan
from dcp_storage.dcp.loads.sharing import Wanted, mark_shared, wanted_of
from dcp_storage.dcp.metadata import to_metadata
from dcp_storage.dcp.planners.default_plans import check_default_plan
from dcp_storage.errors import CheckpointReplaced, ConfigError, DcpStorageError, ObjectNotFound
from dcp_storage.format.contents import Contents
from dcp_storage.format.names import new_token
from dcp_storage.observe import Advance, Moved, Observer, Operation, observed
from dcp_storage.progress import choose_observer
from dcp_storage.store.urls import Address
from dcp_storage.transfer.context import Context
from dcp_storage.words import transfer_text

logger = logging.getLogger(__name__)

_READINGS = 5
"""How often a load is tried if another save replaces what it reads."""


class AsyncStorageReader(StorageReader):
    """Reads checkpoints written by `AsyncStorageWriter`, and stock ones of DCP's own writers, under any sharding.

    Pass it to `dcp.load` as `storage_reader=`. Only the blocks that a rank needs are read; each is verified, and
    decoded once. It keeps no event loop, thread, connection or file between calls, and can be pickled.

    ```python
    state = {"model": model.state_dict()}
    reader = AsyncStorageReader("s3://bucket/run/step-100")
    dcp.load(state, storage_reader=reader, planner=ShardedLoadPlanner())
    model.load_state_dict(state["model"])
    ```

    Args:
        path: A directory (`str` or `os.PathLike`) or a URL that fsspec supports, such as `s3://bucket/run/step-100`.
        storage_options: Passed to the fsspec file system unchanged (`key`, `secret`, `endpoint_url`, `profile`, ...).
        transfer: How bytes move, and how much memory that may take.
        progress: Show a progress bar on local rank 0, if standard error is a terminal.
        observer: Called for every transfer of this rank.

    Raises:
        ConfigError: An argument is invalid: an unknown protocol, options for a local path.

    All ranks of a load read the same save. If another save replaces it meanwhile and deletes its objects, a load by a
    single process starts again by itself, up to 5 times; a load by several raises `CheckpointReplaced`: see `load`.

    `dcp.load` raises errors on every rank, inside DCP's `CheckpointException`, whose `failures` are the typed errors:
    `CheckpointNotFound`, `CheckpointReplaced`, `ManifestCorrupt`, `UnsupportedFormat`, `BlockCorrupt`,
    `CoverageError`, `StoreError`.
    """

    def __init__(
        self,
        path: Address | Location,
        *,
        storage_options: Mapping[str, Any] | None = None,
        transfer: Transfer = Transfer(),
        progress: bool = False,
        observer: Observer | None = None,
    ) -> None:
        super().__init__()
        require_type("transfer", transfer, Transfer)
        self._location = Location.of(path, storage_options)
        self._transfer = transfer
        self._observer = choose_observer(observer, progress=progress)
        self._manifest: Contents | DcpStorageError | None = None
        self._alone = self._has_read = self._logs = False
        self._begun = 0.0  # by time.monotonic

    @property
    def checkpoint_id(self) -> Address:
        """Where the checkpoint is, without credentials, because DCP logs it."""
        return self._location.shown

    def reset(self, checkpoint_id: Address | None = None) -> None:
        """Begin another load, from `checkpoint_id` if given."""
        self._manifest, self._alone = None, False
        if checkpoint_id is not None:
            self._location = replace(self._location, path=checkpoint_id)

    @hook
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read and validate the manifest.

        Raises:
            CheckpointNotFound: There is no checkpoint at this path.
            ManifestCorrupt: The manifest is damaged.
            UnsupportedFormat: It has a newer format, or is a pickle that names globals no stock checkpoint uses.
            StoreError: It could not be read.

        After any error `dcp.load` calls this again, with `rank`, and would convert a second error to text. So the
        second call returns empty metadata, and `set_up_storage_reader` raises the typed error.
        """
        if "rank" in kwargs and isinstance(self._manifest, DcpStorageError):
            return Metadata({}, storage_data=self._manifest)
        self._begun = time.monotonic()
        try:
            manifest = self._location.run(read_manifest)
            metadata = to_metadata(manifest)
        except DcpStorageError as error:
            self._manifest = error
            raise
        origin = StorageMeta(checkpoint_id=self.checkpoint_id, save_id=manifest.save_id, load_id=new_token())
        return replace(metadata, storage_meta=origin)

    @hook
    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take the manifest out of the metadata that `read_metadata` returned.

        Raises:
            DcpStorageError: The error of `read_metadata`.
        """
        if isinstance(metadata.storage_data, DcpStorageError):
            raise metadata.storage_data
        self._manifest = metadata.storage_data
        self._alone = self._has_read = False
        self._logs = is_coordinator

    @hook
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Record in the plan which save this rank is about to read, and what of it."""
        return replace(plan, storage_data=wanted_of(plan, self._contents()))

    @hook
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Check that the ranks are about to read the same save, and mark what several of them read.

        Raises:
            CheckpointReplaced: They found different saves.
        """
        self._alone = len(plans) == 1
        told = [plan.storage_data for plan in plans]
        if not all(isinstance(each, Wanted) for each in told):
            return plans  # the planner replaced them
        if len({each.identity for each in told}) > 1:
            raise self._replaced("the ranks found different saves")
        return mark_shared(plans)

    @hook
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for, and return a completed future: DCP waits for it immediately.

        Raises:
            BlockCorrupt: A block failed its check twice.
            CheckpointReplaced: Another save deleted objects to be read, and this load cannot start again by itself.
            CoverageError: The plan asks for something that is not in the checkpoint.
            StoreError: An object is missing or could not be read.
        """
        check_default_plan(plan, planner)
        for reading in range(1, _READINGS + 1):
            try:
                self._read(plan, planner)
                break
            except ObjectNotFound as error:
                self._follow(error, last=reading == _READINGS)
        self._has_read = True
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        contents, moved = self._contents(), Moved()
        self._location.run(
            lambda store: load_plan(
                Context(store, self._transfer, _counting(self._observer, moved)), contents, plan, planner
            )
        )
        if self._logs:
            url, seconds = self._location.url, time.monotonic() - self._begun
            logger.info("loaded %s: %s", url, transfer_text(moved.raw_bytes, moved.stored_bytes, seconds))

    def _contents(self) -> Contents:
        if self._manifest is None or isinstance(self._manifest, DcpStorageError):
            raise ConfigError("the reader was not set up: pass it to dcp.load")
        return self._manifest

    def _follow(self, error: ObjectNotFound, *, last: bool) -> None:
        """Switch to the save that replaced this one, if the plan fits it too.

        Other ranks, or earlier calls, may already have read parts of the old save, and cannot start again.

        Raises:
            ObjectNotFound: `error`: the manifest is the same, and names an object that is missing.
            CheckpointReplaced: There are other ranks, the new save has another layout, or this was the last try.
        """
        old, new = self._contents(), self._location.run(read_manifest)
        if new.identity == old.identity:
            raise error
        if last or not self._alone or self._has_read or _layout(new) != _layout(old):
            raise self._replaced("its objects were deleted while they were read") from error
        self._manifest = new

    def _replaced(self, what: str) -> CheckpointReplaced:
        where = self._location.url
        return CheckpointReplaced(
            f"{where} was replaced by another save: {what}. Discard the loaded state and load again", url=where
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Address) -> bool:
        """Return whether this package can open a path or URL."""
        try:
            Location(checkpoint_id)
        except ConfigError:
            return False
        return True


def _layout(contents: Contents) -> Metadata:
    """Return everything that a plan depends on."""
    return replace(to_metadata(contents), storage_data=None)


def _counting(observer: Observer, moved: Moved) -> Observer:
    """Return an observer that counts bytes, and then calls another."""

    @contextmanager
    def counting(operation: Operation, url: str, raw_bytes: int) -> Iterator[Advance]:
        with observed(observer, operation, url, raw_bytes) as advance:
            yield moved.counted(advance)

    return counting
