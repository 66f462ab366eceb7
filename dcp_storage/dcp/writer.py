"""`AsyncStorageWriter`: DCP's `StorageWriter`, built on this package's format, pipelines and stores."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter
from torch.futures import Future

from dcp_storage.checkpoint.place import Location
from dcp_storage.config import Codec, Transfer, require_type
from dcp_storage.dcp.dtypes import check_text, dtype_name
from dcp_storage.dcp.hooks import hook
from dcp_storage.dcp.metadata import is_whole
from dcp_storage.dcp.planners.save_planner import ShardedSavePlanner, releasing
from dcp_storage.dcp.replicas.compare import report_mismatches
from dcp_storage.dcp.saves.attempt import name_attempt
from dcp_storage.dcp.saves.commit import check_place, commit
from dcp_storage.dcp.saves.draft import build_draft
from dcp_storage.dcp.saves.failing import ending_on_error
from dcp_storage.dcp.saves.groups import group_items
from dcp_storage.dcp.saves.items import plan_sources
from dcp_storage.dcp.saves.order import begin, leave_save
from dcp_storage.dcp.saves.put import put
from dcp_storage.dcp.saves.results import Results, index_items
from dcp_storage.dcp.saves.save import Role, Save
from dcp_storage.dcp.saves.summary import log_saved
from dcp_storage.dcp.staging.stage import stage
from dcp_storage.dcp.staging.staged import StagedState, redeem
from dcp_storage.dcp.undocumented import rank_alone, world_size_of_save
from dcp_storage.errors import ConfigError
from dcp_storage.format.contents import METADATA_VERSION
from dcp_storage.format.manifest.columns import NOTHING, Columns
from dcp_storage.format.manifest.frames import check_info
from dcp_storage.format.names import ObjectName
from dcp_storage.observe import Observer
from dcp_storage.progress import choose_observer
from dcp_storage.store.urls import Address
from dcp_storage.transfer.context import Context
from dcp_storage.transfer.save import Source


class _Thread(threading.local):
    """The save that runs in a thread."""

    save: Save | None = None


class AsyncStorageWriter(StorageWriter):
    """Writes checkpoints to local disk, S3 or any fsspec file system: compressed, checksummed, atomically committed.

    Pass it to `dcp.save` or `dcp.async_save` as `storage_writer=`. It keeps no event loop, thread, connection or file
    between calls, can be pickled (for the PROCESS executor), and may be used for any number of saves, also from several
    threads at once: each save's state belongs to its thread. Overlapping saves of `dcp.async_save` run one after
    another in the order of the calls. If one fails, its future's `result()` raises the error, which is also logged.

    ```python
    writer = AsyncStorageWriter("s3://bucket/run/step-100", info={"step": 100})
    dcp.save({"model": model.state_dict()}, storage_writer=writer, planner=ShardedSavePlanner())
    ```

    Args:
        path: A directory (`str` or `os.PathLike`) or a URL that fsspec supports, such as `s3://bucket/run/step-100`.
        storage_options: Passed to the fsspec file system unchanged (`key`, `secret`, `endpoint_url`, `profile`, ...).
        codec: How blocks are encoded.
        transfer: How bytes move, and how much memory that may take.
        overwrite: Whether an existing checkpoint may be replaced; it stays intact until the new one is complete.
        sync_files: On local disk, whether data must reach the disk (fsync) before the save completes.
        info: What you want to know about the checkpoint before loading it (`{"step": 5, "metrics": {"loss": 0.3}}`):
            any JSON object of at most 4 KiB. `open_checkpoint` returns it.
        progress: Show a progress bar on local rank 0, if standard error is a terminal.
        observer: Called for every transfer of this rank.

    Raises:
        ConfigError: An argument is invalid: an unknown protocol, options for a local path, `info` that is not JSON.

    `dcp.save` raises errors on every rank, inside DCP's `CheckpointException`, whose `failures` are the typed errors:
    `CheckpointExists`, `UnsupportedTensor`, `UnsupportedEntry`, `StagingError`, `ReplicaMismatch`, `CoverageError`,
    `DtypeMismatch`, `StoreError`. After any of them the previous checkpoint is untouched; after `CheckpointReplaced`,
    that of another save is in its place.
    """

    def __init__(
        self,
        path: Address | Location,
        *,
        storage_options: Mapping[str, Any] | None = None,
        codec: Codec = Codec(),
        transfer: Transfer = Transfer(),
        overwrite: bool = True,
        sync_files: bool = True,
        info: Mapping[str, Any] | None = None,
        progress: bool = False,
        observer: Observer | None = None,
    ) -> None:
        super().__init__()
        require_type("codec", codec, Codec)
        require_type("transfer", transfer, Transfer)
        self._location = Location.of(path, storage_options, sync_files=sync_files)
        self._codec = codec
        self._transfer = transfer
        self._overwrite = overwrite
        self._info = check_info(info or {})
        self._observer = choose_observer(observer, progress=progress)
        self._thread = _Thread()

    @property
    def checkpoint_id(self) -> Address:
        """Where this thread's save goes, without credentials, because DCP logs it."""
        return (self._thread.save.location if self._thread.save else self._location).shown

    def reset(self, checkpoint_id: Address | None = None) -> None:
        """Begin a save in this thread, at `checkpoint_id` if given, which applies to this save only.

        DCP calls it in the thread that saves, if a `checkpoint_id` was given.
        """
        self._thread.save = self._begin(checkpoint_id)

    @hook
    def storage_meta(self) -> StorageMeta | None:
        """Tell DCP's planners where this save goes.

        Raises:
            DcpStorageError: This rank's state could not be staged: DCP reports it to all ranks now.
        """
        staged = redeem()
        if self._thread.save is not None and self._thread.save.announced:
            self._thread.save = None  # it failed before this rank's role was known
        save = self._begun()
        save.announced = True
        save.blocked_s = staged.seconds
        with ending_on_error(save):
            if staged.error:
                raise staged.error
        return StorageMeta(checkpoint_id=save.location.shown, save_id=save.token)

    @hook
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Record this rank's role. DCP passes `rank` and `use_collectives` only if a parameter is named `kwargs`.

        Raises:
            ConfigError: Without collectives, the ranks have no way to agree on an id for the parts of one save.
        """
        save = self._begun()
        with ending_on_error(save):
            alone = rank_alone()
            if alone is not None:
                save.role = Role(alone, dist.get_world_size(), is_coordinator, alone=True)
                return
            size = world_size_of_save()
            attempt = None if kwargs.get("use_collectives", True) else name_attempt(save, size)
            save.role = Role(kwargs.get("rank") or 0, size, is_coordinator, attempt)

    @hook
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse what cannot be saved, before a byte is written.

        Raises:
            UnsupportedTensor: A dtype is not supported by the format, or a name is not valid UTF-8.
            CheckpointExists: A checkpoint already exists here and may not be replaced.
            AccessDenied: The existing checkpoint may not be read, or nothing may be written here.
            StoreError: The store failed, or the bucket does not exist.
        """
        save, role = self._current()
        with ending_on_error(save):
            for item in plan.items:
                check_text(item.index.fqn)
                if item.tensor_data is not None:
                    dtype_name(item.tensor_data.properties.dtype, item.index.fqn)
            if role.commits:
                save.location.run(partial(check_place, overwrite=self._overwrite, part=role.attempt is not None))
        return plan

    @hook
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Leave the plans as they are: a plan, which DCP caches and replays, must not keep anything of a save."""
        return plans

    @hook
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        """Encode and put this rank's items, and return a completed future: DCP waits for it immediately.

        Raises:
            CoverageError: The planner resolved an item to a different shape than planned.
            DtypeMismatch: The planner resolved an item to a different dtype than planned.
            UnsupportedTensor: An item is not plain strided memory.
            UnsupportedEntry: An entry cannot be pickled.
            StoreError: The store failed.
        """
        save, role = self._current()
        with ending_on_error(save), releasing(planner):
            begun = time.monotonic()
            sources = plan_sources(plan, planner, self._codec)
            objects, stored = self._put(save, role, sources, group_items(plan, planner)) if sources else ([], NOTHING)
            names, items = index_items([item.index for item in plan.items], [source.nbytes for source in sources])
            seconds, fingerprints = time.monotonic() - begun, None
            if isinstance(planner, ShardedSavePlanner):
                fingerprints = planner.fingerprints()
            results = Results(names, items, objects, stored, self._codec, seconds, fingerprints)
        save.done = not role.commits
        future: Future[Any] = Future()
        future.set_result(results)
        return future

    def _put(
        self, save: Save, role: Role, sources: Sequence[Source], groups: Sequence[str]
    ) -> tuple[list[ObjectName], Columns]:
        return save.location.run(
            lambda store: put(
                Context(store, self._transfer, self._observer), save, role, sources, groups=groups, codec=self._codec
            )
        )

    @hook
    def finish(self, metadata: Metadata, results: list[Any]) -> None:
        """Commit: write the manifest, and only then delete the objects of the one that it replaced.

        Called on the coordinator (without collectives: on every rank, which then commits its own manifest).

        Raises:
            ReplicaMismatch: Ranks hold different data under one name, and the planner's policy is `"error"`.
            CoverageError: What was written does not match the plan, or does not tile a tensor.
            CheckpointExists: Another save committed here meanwhile, and this one may not replace it.
            CheckpointReplaced: Another save committed here at the same moment.
            StoreError: The manifest could not be written; the previous checkpoint is still there.
        """
        save, role = self._current()
        with ending_on_error(save):
            report_mismatches([each.fingerprints for each in results], metadata, save.location.url)
            is_part = role.attempt is not None or (role.alone and not is_whole(metadata))
            draft = build_draft(
                metadata,
                results,
                self._codec,
                save_id=save.token,
                world_size=role.world_size if is_part else len(results),
                rank=role.rank if is_part else None,
                attempt=role.attempt,
                info=self._info,
            )
        # DCP sends the metadata to all ranks, and `dcp.save` returns it.
        metadata.version = METADATA_VERSION
        metadata.storage_meta = StorageMeta(checkpoint_id=save.location.shown, save_id=save.token)
        with ending_on_error(save, commits=True):
            save.location.run(partial(commit, draft=draft, overwrite=self._overwrite))
        log_saved(save, draft, results)
        save.done = True

    def _begin(self, checkpoint_id: Address | None = None) -> Save:
        location = self._location if checkpoint_id is None else replace(self._location, path=checkpoint_id)
        save = Save(location)
        begin(save)
        return save

    def _begun(self) -> Save:
        """Return the save that `reset` began in this thread, or begin one."""
        if self._thread.save is None or self._thread.save.role:
            self._thread.save = self._begin()
        return self._thread.save

    def _current(self) -> tuple[Save, Role]:
        save = self._thread.save
        if save is None or save.role is None:
            raise ConfigError("the writer was not set up in this thread: pass it to dcp.save")
        return save, save.role

    def stage(self, state_dict: dict[str, Any]) -> StagedState:
        """Copy the parts of a state that may be written, before training changes it: DCP saves the copy meanwhile.

        Only the elements of each tensor that this rank holds are copied, whatever their strides, bits, kind and
        device, and nothing else of its storage. The memory belongs to the process, and is reused once nothing refers
        to the copy.

        An entry that cannot be copied does not raise here: the save fails on all ranks, with an error that names it.
        """
        leave_save()
        begun = time.monotonic()
        staged = stage(state_dict, keep=self._transfer.keep_staging)
        staged.seconds = time.monotonic() - begun
        return staged

    _synchronize_after_execute = False

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Whether staging continues after `stage` returns: never."""
        return self._synchronize_after_execute

    def synchronize_staging(self) -> None:
        """Do nothing: `stage` returns when the copy is complete."""

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Address) -> bool:
        """Return whether this package can open a path or URL."""
        try:
            Location(checkpoint_id)
        except ConfigError:
            return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._thread = _Thread()
