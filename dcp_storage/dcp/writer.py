"""`AsyncStorageWriter`: DCP's `StorageWriter` on this package's format, pipelines and stores."""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial, wraps
from itertools import chain
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from dcp_storage.config import Codec, Transfer
from dcp_storage.dcp.background import Turn, Turns, end_save_of_this_thread, gentle, step_back, training_runs_here
from dcp_storage.dcp.calls import Location, Path, choose_observer, observed
from dcp_storage.dcp.metadata import build_manifest
from dcp_storage.dcp.planners.save_planner import ShardedSavePlanner
from dcp_storage.dcp.sources import plan_sources
from dcp_storage.dcp.staging.stage import stage
from dcp_storage.dcp.staging.staged import StagedState, redeem
from dcp_storage.dcp.tensors import check_text, dtype_name
from dcp_storage.dcp.undocumented import METADATA_VERSION
from dcp_storage.errors import CheckpointExists, ConfigError, ObjectExists, StoreError
from dcp_storage.format.manifest import Manifest
from dcp_storage.format.names import data_object
from dcp_storage.observe import Observer
from dcp_storage.store.base import Store
from dcp_storage.transfer.manifests import commit_manifest, is_committed, replaced_objects
from dcp_storage.transfer.save import Source, StoredSegment, save_items

logger = logging.getLogger(__name__)

_CLEAN_UP_S = 5
"""How long a save that failed may try to delete its objects: the store may be what failed it."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class _Save:
    """One save as this rank sees it: nothing of it outlives it, and no other save meets it."""

    location: Location
    token: str
    rank: int
    coordinator: bool
    collectives: bool

    @property
    def own_rank(self) -> int | None:
        """The rank that commits by itself, or `None` where the coordinator commits for all."""
        return None if self.collectives else self.rank


class _ThreadState(threading.local):
    """What belongs to the save that runs in this thread: DCP runs all of a save in one."""

    location: Location | None = None
    save: _Save | None = None
    turn: Turn | None = None


def _logged(
    hook: Callable[Concatenate["AsyncStorageWriter", P], R],
) -> Callable[Concatenate["AsyncStorageWriter", P], R]:
    """Have what a hook raises logged where the save runs in the background."""

    @wraps(hook)
    def call(writer: "AsyncStorageWriter", /, *args: P.args, **kwargs: P.kwargs) -> R:
        with writer._turn.logging():  # noqa: SLF001
            return hook(writer, *args, **kwargs)

    return call


class AsyncStorageWriter(StorageWriter):
    """Writes checkpoints to local disk, S3 or any fsspec file system: compressed, checksummed, atomically committed.

    Pass it to `dcp.save` or `dcp.async_save` as `storage_writer=`. It holds no loop, thread, connection or file between
    calls, pickles (for the PROCESS executor), and may be used for any number of saves, also at the same time from
    several threads: each save's state is its thread's own. Saves of `dcp.async_save` that overlap follow one another in
    the order of the calls. What fails one is raised by its future's `result()`, and logged.

    Args:
        path: A directory (`str` or `os.PathLike`) or a URL that fsspec knows, such as `s3://bucket/run/step-100`.
        storage_options: Go to the fsspec file system as they are (`key`, `secret`, `endpoint_url`, `profile`, ...).
        codec: How blocks are encoded.
        transfer: How bytes move, and how much memory that may take.
        overwrite: Whether a checkpoint that stands at the path may be replaced; it stays whole until the new one does.
        sync_files: On local disk, whether data reaches the disk (fsync) before the save is reported done.
        progress: Show a progress bar on local rank 0, if standard error is a terminal.
        observer: Is told of every transfer of this rank.

    Raises:
        ConfigError: An argument is impossible: an unknown protocol, options for a local path.

    What a save raises reaches the caller of `dcp.save`, on every rank, inside of DCP's `CheckpointException`, whose
    `failures` hold the typed errors: `CheckpointExists`, `UnsupportedTensor`, `CoverageError`, `DtypeMismatch`,
    `StoreError`. After any of them the checkpoint that was there before is untouched.
    """

    def __init__(
        self,
        path: Path,
        *,
        storage_options: Mapping[str, Any] | None = None,
        codec: Codec = Codec(),  # noqa: B008 (frozen)
        transfer: Transfer = Transfer(),  # noqa: B008 (frozen)
        overwrite: bool = True,
        sync_files: bool = True,
        progress: bool = False,
        observer: Observer | None = None,
    ) -> None:
        super().__init__()
        self._location = Location(path, storage_options, sync_files)
        self._codec = codec
        self._transfer = transfer
        self._overwrite = overwrite
        self._observer = choose_observer(observer, progress=progress)
        self._threads = _ThreadState()
        self._turns = Turns()

    @property
    def checkpoint_id(self) -> Path:
        """Where the next save goes, without credentials; DCP's logger reads it."""
        return self._here.shown

    @property
    def _here(self) -> Location:
        return self._threads.location or self._location

    @property
    def _turn(self) -> Turn:
        if self._threads.turn is None:
            step_back()
            self._threads.turn = self._turns.take(self._here.store().url)
        return self._threads.turn

    @property
    def _save(self) -> _Save:
        if self._threads.save is None:
            raise ConfigError("the writer was not set up in this thread: pass it to dcp.save")
        return self._threads.save

    def reset(self, checkpoint_id: Path | None = None) -> None:
        """Begin another save, at `checkpoint_id` if it is given. DCP calls it in the thread that saves."""
        self._threads.save = self._threads.turn = None
        if checkpoint_id is not None:
            self._threads.location = replace(self._location, path=checkpoint_id)
            self._location = self._threads.location

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take this rank's part: DCP passes `rank` and `use_collectives` to a parameter that is named `kwargs`."""
        rank, collectives = kwargs.get("rank") or 0, kwargs.get("use_collectives", True)
        self._threads.save = _Save(
            self._here, self._turn.token, rank=rank, coordinator=is_coordinator, collectives=collectives
        )

    @_logged
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse early what cannot be saved, before a byte is written.

        Raises:
            UnsupportedTensor: A dtype that the format does not hold, or a name that is no text.
            CheckpointExists: A checkpoint stands here and may not be replaced.
        """
        for item in plan.items:
            check_text(item.index.fqn)
            if item.tensor_data is not None:
                dtype_name(item.tensor_data.properties.dtype, item.index.fqn)
        save = self._save
        if save.collectives and self._overwrite:
            return plan
        if (save.coordinator or not save.collectives) and save.location.run(partial(is_committed, rank=save.own_rank)):
            raise CheckpointExists(_exists_message(save), url=save.location.store().url)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Leave the plans as they are: nothing of a save may live in a plan that DCP caches and replays."""
        return plans

    @_logged
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Encode and put this rank's items, and return a future that is done: DCP waits for it at once.

        Raises:
            CoverageError: The planner resolved an item to another shape than it planned.
            DtypeMismatch: ... or to another dtype.
            UnsupportedTensor: An item is no plain strided memory.
            StoreError: The store failed.
        """
        sources = plan_sources(plan, planner, byte_planes=self._codec.byte_planes)
        segments = self._put(self._save, sources) if sources else []
        results = [
            WriteResult(item.index, source.nbytes, stored)
            for item, source, stored in zip(plan.items, sources, segments, strict=True)
        ]
        if isinstance(planner, ShardedSavePlanner):
            planner.release()
        self._turn.done = self._save.collectives and not self._save.coordinator
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _put(self, save: _Save, sources: Sequence[Source]) -> list[list[StoredSegment]]:
        begun: list[str] = []

        def name(number: int) -> str:
            begun.append(data_object(save.token, save.rank, number, compression=self._codec.compression))
            return begun[-1]

        async def put(store: Store) -> list[list[StoredSegment]]:
            with observed(self._observer, "save", store.url, sum(source.nbytes for source in sources)):
                try:
                    return await save_items(
                        store,
                        sources,
                        name,
                        self._codec,
                        transfer=gentle(self._transfer, remote=store.remote),
                        apart=training_runs_here(),
                        observer=self._observer,
                    )
                except Exception:
                    # Nothing names them, and the next save may need the room. What failed the save is raised.
                    with suppress(StoreError, TimeoutError):
                        async with asyncio.timeout(_CLEAN_UP_S):
                            await store.delete(begun)
                    raise

        return save.location.run(put)

    @_logged
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit: write the manifest, and only then delete what the one that it replaced had named.

        Called on the coordinator (without collectives: on every rank, which then commits its own manifest).

        Raises:
            CoverageError: What was written is not what was planned, or does not tile a tensor.
            CheckpointExists: Another save committed here meanwhile, and this one may not replace it.
            StoreError: The manifest could not be written; the checkpoint that was there before still stands.
        """
        save = self._save
        manifest = build_manifest(
            metadata,
            chain.from_iterable(results),
            self._codec,
            save_id=save.token,
            world_size=len(results) if save.collectives else _world_size(),
            rank=save.own_rank,
        )
        # DCP sends the metadata to all ranks, and `dcp.save` returns it.
        metadata.version = METADATA_VERSION
        metadata.storage_meta = StorageMeta(checkpoint_id=save.location.shown, save_id=save.token)
        try:
            save.location.run(partial(_commit, manifest=manifest, replace=save.collectives and self._overwrite))
        except ObjectExists as error:
            raise CheckpointExists(_exists_message(save), url=error.url) from error
        self._turn.done = True

    def storage_meta(self) -> StorageMeta | None:
        """Tell DCP's planners where this save goes. It is the first that DCP asks: a save waits here for its turn.

        Raises:
            DcpStorageError: What kept this rank's state from being staged: DCP tells all ranks of it now.
        """
        step_back()
        error = redeem()
        self._threads.turn = self._turns.take(self._here.store().url)
        if error:
            with self._threads.turn.logging():
                raise error
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self._threads.turn.token)

    def stage(self, state_dict: dict[str, Any]) -> StagedState:
        """Copy what may be written of a state, before training changes it: DCP saves the copy beside training.

        Of each tensor the elements are copied that this rank holds, whatever their strides, bits, kind and device, and
        nothing else of its storage. The memory is the process's, and is used again once nothing refers to the copy.

        An entry that cannot be copied raises nothing here: the save fails on all ranks, with its name.
        """
        end_save_of_this_thread()
        return stage(state_dict, keep=self._transfer.keep_staging)

    _synchronize_after_execute = False

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Whether staging goes on after `stage` has returned: never."""
        return self._synchronize_after_execute

    def synchronize_staging(self) -> None:
        """Do nothing: `stage` returns when the copy is there."""

    def close(self) -> None:
        """Do nothing: the writer holds nothing."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Path) -> bool:
        """Return whether a path or URL is one that this package can open."""
        try:
            Location(checkpoint_id, None)
        except ConfigError:
            return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in {"_threads", "_turns"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._threads = _ThreadState()
        self._turns = Turns()


async def _commit(store: Store, manifest: Manifest, *, replace: bool = True) -> None:
    superfluous = await replaced_objects(store) if replace else []
    await commit_manifest(store, manifest, replace=replace)
    try:
        await store.delete(superfluous)
    except StoreError as error:
        # The new checkpoint stands; what could not be deleted is named by nothing and `prune` removes it.
        logger.warning("the objects of the replaced checkpoint were not all deleted: %s", error)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _exists_message(save: _Save) -> str:
    where = save.location.store().url
    why = "overwrite=False" if save.collectives else "without collectives it cannot be replaced atomically"
    return f"Checkpoint already exists at {where} and {why}: choose another path, or delete it first"
