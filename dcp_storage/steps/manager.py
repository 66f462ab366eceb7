"""`Checkpoints`: saves the steps of a run, resumes from them and removes old ones."""

import logging
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import torch.distributed as dist
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner

from dcp_storage.checkpoint.place import Location
from dcp_storage.config import Codec, Transfer, require_type
from dcp_storage.dcp.planners.save_planner import ShardedSavePlanner
from dcp_storage.errors import ConfigError
from dcp_storage.observe import Observer
from dcp_storage.progress import choose_observer
from dcp_storage.steps.access import Access
from dcp_storage.steps.background import SaveFuture
from dcp_storage.steps.catalog import latest_step, list_steps
from dcp_storage.steps.checking import How, Verdict
from dcp_storage.steps.follow import wait_for
from dcp_storage.steps.groups import Ranks
from dcp_storage.steps.pinning import hold_pin
from dcp_storage.steps.policies import Policy
from dcp_storage.steps.preemption import Preemption
from dcp_storage.steps.resume import Resume, Template
from dcp_storage.steps.retention import Decision
from dcp_storage.steps.saver import Saver
from dcp_storage.steps.saving import Asked, check_step
from dcp_storage.steps.step import Step
from dcp_storage.steps.upkeep import Upkeep
from dcp_storage.store.urls import Address

logger = logging.getLogger(__name__)

State = dict[str, Any]


class Checkpoints:
    """The steps of a run below one root, each a separate checkpoint in a directory `step-N`.

    ```python
    with Checkpoints("s3://bucket/run", keep=KeepLatest(3) | KeepEvery(1000)) as checkpoints:
        first = checkpoints.load(state)  # the newest sound step, or None
        for step in range((first or 0) + 1, steps + 1):
            train(state)
            if step % 100 == 0 or checkpoints.should_save(step):
                checkpoints.async_save(step, state, metrics={"loss": loss})
            if checkpoints.preempted:
                break
    ```

    `save`, `async_save`, `load`, `prune`, `should_save` and `close` are **collective**: all ranks of the process group
    call them, in the same order, from one thread. An error on one rank is raised on all. `steps`, `latest`, `wait`,
    `wait_for`, `pin` and `request_save` are **local**: any rank, and any other program, may call them by itself.

    Nothing is read, created or installed before the first call. The ranks communicate in two separate gloo groups, so
    that a save during training never mixes with the collectives of training; `close` destroys them.

    Args:
        root: A directory or a URL, as a string or a path object.
        storage_options: Passed to the fsspec file system unchanged.
        keep: Which steps to keep, such as `KeepLatest(3) | KeepBest(2, "loss", mode="min")`; `None` keeps all. Old
            steps are removed in the background, after the commit of a new one.
        codec: How blocks are encoded.
        transfer: How bytes move.
        save_planner: Used instead of a `ShardedSavePlanner`.
        load_planner: Used instead of a `ShardedLoadPlanner()`, to say what may be missing or which types are trusted.
        process_group: The ranks that take part; `None` for all of the default group.
        verify: Have each rank check what it wrote after a commit, in the background: that all its objects are there
            (`"sizes"`), or every block of them (`"full"`). Then only steps that passed can replace old ones.
        on_error: `"log"` logs a failed save, counts it in `failed_saves`, and lets the run continue.
        observer: Called for every transfer of this rank.
        progress: Show progress bars on local rank 0.
        signals: The signals that `should_save` listens to.

    Raises:
        ConfigError: An argument is invalid.
    """

    def __init__(
        self,
        root: Address | Location,
        *,
        storage_options: Mapping[str, Any] | None = None,
        keep: Policy | None = None,
        codec: Codec = Codec(),
        transfer: Transfer = Transfer(),
        save_planner: SavePlanner | None = None,
        load_planner: LoadPlanner | None = None,
        process_group: dist.ProcessGroup | None = None,
        verify: How | None = None,
        on_error: Literal["raise", "log"] = "raise",
        observer: Observer | None = None,
        progress: bool = False,
        signals: Sequence[int] = (signal.SIGTERM,),
    ) -> None:
        if verify not in {None, "sizes", "full"}:
            raise ConfigError(f'verify is {verify!r}; choose None, "sizes" or "full"')
        if on_error not in {"raise", "log"}:
            raise ConfigError(f'on_error is {on_error!r}; choose "raise" or "log"')
        if keep is not None and not isinstance(keep, Policy):
            raise ConfigError(f"keep is {keep!r}; pass a policy, such as KeepLatest(3), or None")
        require_type("codec", codec, Codec)
        require_type("transfer", transfer, Transfer)
        self._root = Location.of(root, storage_options)
        self._ranks = Ranks(process_group)
        self._access = Access(self._root, codec, transfer, choose_observer(observer, progress=progress))
        self._upkeep = Upkeep(self._access, keep, verify)
        planner = save_planner or ShardedSavePlanner(enable_plan_caching=True)
        self._saver = Saver(self._ranks, self._access, self._upkeep, planner, logs_errors=on_error == "log")
        self._load_planner = load_planner
        self._preemption = Preemption(signals)
        self._closed = False
        self._process = os.getpid()

    def save(
        self, step: int, state: State, *, metrics: Mapping[str, float] | None = None, overwrite: bool = False
    ) -> int | None:
        """Save a step, and return its number once it is committed (collective).

        Args:
            step: A non-negative integer.
            state: A state dict as for DCP, which may also contain `PerRank`s.
            metrics: Numbers by name, for `KeepBest` and for `steps`; those of rank 0 are stored.
            overwrite: Replace a step that is already committed. A step that was found damaged is always replaced.

        Returns:
            The step, or `None` if the save failed and `on_error` is `"log"`.

        Raises:
            ConfigError: The step, the metrics or a `PerRank` is invalid, or the ranks do not agree.
            CheckpointExists: The step is already committed.
            DcpStorageError: The save failed, or the one in the background before it.
        """
        self._check_open()
        return self._saver.save(Asked(step, state, metrics, overwrite))

    def async_save(
        self,
        step: int,
        state: State,
        *,
        metrics: Mapping[str, float] | None = None,
        overwrite: bool = False,
        skip_if_busy: bool = False,
    ) -> SaveFuture:
        """Copy a state, and save it in the background (collective).

        Only one save runs at a time: this waits for the previous one, or with `skip_if_busy` saves nothing if that is
        still running on any rank. A failure in the background is raised once: by the future's `result`, or else by the
        next call, `wait` or `close`.

        Returns:
            A future of the step; of `None` if nothing was saved, because of `skip_if_busy` or `on_error="log"`.

        Raises:
            As `save`: errors that the ranks find before they copy, and the failure of the previous save.
        """
        self._check_open()
        return self._saver.begin(Asked(step, state, metrics, overwrite, skip_if_busy))

    def wait(self) -> None:
        """Wait for the save in the background, for its check, and for the removal of old steps (local).

        Raises:
            DcpStorageError: The save failed, and this was not raised yet.
        """
        self._saver.raise_failed()
        self._upkeep.wait()

    def load(self, state: State, step: int | None = None, *, strict: bool = False) -> int | None:
        """Load the newest sound step into a state; return its number, or `None` if there is none (collective).

        If the manifest or an object of a step is damaged or missing, all ranks skip the step, log it, and load the one
        before it instead. Up to 3 steps are skipped; then the error of the last is raised.

        Args:
            state: A state dict as for DCP, which may also contain `PerRank`s.
            step: Load this step, or raise.
            strict: Load the newest step, or raise.

        Raises:
            CheckpointNotFound: The requested step does not exist.
            ManifestCorrupt: It is damaged, or with `strict` the newest one is, or several are.
            BlockCorrupt: Likewise.
            MissingKeys: The state asks for entries that are not in the step.
            CoverageError: A `PerRank` without `regroup` was saved by another number of ranks.
            StoreError: The store failed.
        """
        self._check_open()
        template, asked = self._ranks.meet(lambda: (self._template(state, step), (step, strict)))
        if len(set(asked)) > 1:
            raise ConfigError(f"the ranks load different steps: (step, strict) by rank is {asked[:8]}")
        resume = Resume(self._ranks, self._access, self._upkeep, template, self._load_planner)
        return resume.load_newest(strict=strict) if step is None else resume.load(step)

    def steps(self) -> list[Step]:
        """Return the committed steps, ascending; only their heads are read (local).

        Raises:
            StoreError: The store failed; a failure is never returned as an empty list.
        """
        return self._root.run(list_steps)

    def latest(self) -> int | None:
        """Return the newest committed step, by the current state of the store (local).

        Raises:
            StoreError: The store failed.
        """
        return self._root.run(latest_step)

    def wait_for(self, step: int | None = None, timeout: float | None = None) -> int:
        """Wait until there is a committed step of at least `step`, and return the newest (local).

        With it another program can follow a run: it polls with growing pauses. If several ranks follow, let one poll
        and tell the others.

        Raises:
            TimeoutError: There was none for `timeout` seconds.
            StoreError: The store failed.
        """
        return self._root.run(partial(wait_for, step=step, timeout_s=timeout))

    def pin(self, step: int, name: str) -> AbstractContextManager[None]:
        """Protect a step from being pruned, by any program, while the block runs (local).

        ```python
        with checkpoints.pin(step, "eval"), open_checkpoint(f"{root}/step-{step}") as checkpoint: ...
        ```

        Raises (when the block begins):
            CheckpointNotFound: The step does not exist, or is being removed.
            ConfigError: The name is invalid.
            StoreError: The store failed, or does not report when objects were written.
        """
        return hold_pin(self._root, step, name)

    def prune(self, *, dry_run: bool = False) -> list[Decision]:
        """Remove the steps that `keep` does not keep, and return the decisions (collective).

        The newest committed step, the one that was saved last, steps that this program is saving, loading or checking,
        and pinned steps are never removed.

        Args:
            dry_run: Decide, but remove nothing.

        Raises:
            StoreError: The store failed; the next prune continues where this one stopped.
        """
        self._check_open()
        return self._ranks.on_first(partial(self._upkeep.prune, dry_run=dry_run))

    def should_save(self, step: int) -> bool:
        """Return on all ranks whether a save was requested on any of them since the last call (collective, and cheap).

        A save is requested by a signal (SIGTERM, unless `signals` says otherwise) or by `request_save`. The first call
        in the main thread installs the handlers. They call those that they replace, and pass on a second signal.

        Raises:
            ConfigError: The ranks are not at the same step, or it is invalid.
        """
        self._check_open()
        self._preemption.listen()
        is_step = isinstance(step, int) and not isinstance(step, bool)
        return self._preemption.agree(self._ranks, step if is_step else -1)

    def request_save(self) -> None:
        """Make the next `should_save` return true, on all ranks (local)."""
        self._preemption.request()

    @property
    def failed_saves(self) -> int:
        """Number of saves that failed and were only logged, because of `on_error="log"`."""
        return self._saver.failed

    @property
    def preempted(self) -> bool:
        """Whether `should_save` reported a signal, the same on all ranks: time to end."""
        return self._preemption.signalled

    def close(self) -> None:
        """Wait for background work, and release groups and signal handlers (collective).

        Raises:
            DcpStorageError: The last save failed, and this was not raised yet.
        """
        if not self._begin_to_close():
            return
        try:
            told = self._ranks.on_each(self._end) if self._ranks.have_met else [self._end()]
            self._upkeep.verdicts.settle(told)
            self._upkeep.end()
        finally:
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close; after an error, which may have occurred only on this rank, do not wait for the other ranks.

        The save in the background ends first: all ranks take part in it. If it fails, that is logged.
        """
        if kind is None:
            self.close()
            return
        if not self._begin_to_close():
            return
        try:
            self._end()
        except Exception:
            logger.exception("the save in the background also failed")
        finally:
            self._let_go()

    def __reduce__(self) -> NoReturn:
        raise ConfigError("a Checkpoints has groups and threads of this process: create a new one in the other process")

    def _template(self, state: State, step: int | None) -> Template:
        if step is not None:
            check_step(step)
        self._saver.raise_failed()
        return Template(state)

    def _end(self) -> Mapping[int, Verdict]:
        try:
            self._saver.raise_failed()
        finally:
            self._upkeep.wait()
        return self._upkeep.verdicts.told()

    def _begin_to_close(self) -> bool:
        """Return whether there is something to close: a forked process has no threads, and shares the connections."""
        was_closed, self._closed = self._closed, True
        return not was_closed and self._process == os.getpid()

    def _let_go(self) -> None:
        self._preemption.stop()
        self._ranks.part()

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("this Checkpoints is closed: create a new one")
        if self._process != os.getpid():
            raise ConfigError("this process is a fork of the one that created the Checkpoints: create a new one here")
