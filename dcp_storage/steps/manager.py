"""`Checkpoints`: the steps of a run, saved, resumed from and thinned out."""

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
from dcp_storage.config import Codec, Transfer
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
    """The steps of a run below one root, each a checkpoint of its own in a directory `step-N`.

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
    call them, in the same order, from one thread. What is wrong on one rank is raised on all. `steps`, `latest`,
    `wait`, `wait_for`, `pin` and `request_save` are **local**: any rank, and any other program, calls them by itself.

    Nothing is read, made or installed before the first call. The ranks meet in two gloo groups of their own, so that a
    save beside training never mixes with what training sends; `close` gives them up.

    Args:
        root: A directory or a URL, as text or as a path object.
        storage_options: Go to the fsspec file system as they are.
        keep: Which steps stay, such as `KeepLatest(3) | KeepBest(2, "loss", mode="min")`; all do where it is `None`.
            Old ones go in the background, after the commit of a new one.
        codec: How blocks are encoded.
        transfer: How bytes move.
        save_planner: In place of a `ShardedSavePlanner`.
        load_planner: In place of a `ShardedLoadPlanner()`, to say what may be missing or which types are trusted.
        process_group: The ranks that take part; all of the default group where it is `None`.
        verify: Have each rank check after a commit, in the background, what it wrote: that all its objects are there
            (`"sizes"`), or every block of them (`"full"`). Then old steps go only for steps that passed.
        on_error: `"log"` logs a save that fails, counts it in `failed_saves`, and lets the run go on.
        observer: Is told of every transfer of this rank.
        progress: Show progress bars on local rank 0.
        signals: What `should_save` listens to.

    Raises:
        ConfigError: An argument is impossible.
    """

    def __init__(
        self,
        root: Address | Location,
        *,
        storage_options: Mapping[str, Any] | None = None,
        keep: Policy | None = None,
        codec: Codec = Codec(),  # noqa: B008 (frozen)
        transfer: Transfer = Transfer(),  # noqa: B008 (frozen)
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
            raise ConfigError(f"keep is {keep!r}; give a policy, such as KeepLatest(3), or None")
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
            step: A whole number from 0.
            state: What DCP saves, and `PerRank`s.
            metrics: Numbers by name, for `KeepBest` and for `steps`; those of rank 0 count.
            overwrite: Replace a step that is committed. One that was found damaged is replaced without it.

        Returns:
            The step, or `None` where the save failed and `on_error` is `"log"`.

        Raises:
            ConfigError: The step, the metrics or a `PerRank` is impossible, or the ranks do not agree.
            CheckpointExists: The step is committed.
            DcpStorageError: What failed the save, or the one in the background before it.
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
        """Copy a state, and save it beside training (collective).

        One save goes on at a time: this waits for the one before it, or with `skip_if_busy` saves nothing where that
        goes on still, on any rank. What fails in the background is raised once: by the future's `result`, or else by
        the next call, `wait` or `close`.

        Returns:
            A future of the step; of `None` where nothing was saved, because of `skip_if_busy` or `on_error="log"`.

        Raises:
            As `save`: what the ranks find out before they copy, and what failed the save before this one.
        """
        self._check_open()
        return self._saver.begin(Asked(step, state, metrics, overwrite, skip_if_busy))

    def wait(self) -> None:
        """Wait for the save in the background, and for what follows it: its check, and old steps' removal (local).

        Raises:
            DcpStorageError: What failed the save, if nobody was told yet.
        """
        self._saver.raise_failed()
        self._upkeep.wait()

    def load(self, state: State, step: int | None = None, *, strict: bool = False) -> int | None:
        """Load the newest sound step into a state; return its number, or `None` where there is none (collective).

        A step whose manifest or an object is damaged or missing is passed over, which the log says, and the one before
        it is loaded instead, on all ranks: up to 3 of them, and then what is wrong with the last is raised.

        Args:
            state: What DCP fills, and `PerRank`s.
            step: Take this one, or raise.
            strict: Take the newest, or raise.

        Raises:
            CheckpointNotFound: The step that was asked for is not there.
            ManifestCorrupt: It, or with `strict` the newest one, is damaged; or so are several.
            BlockCorrupt: Likewise.
            MissingKeys: The state asks for what the step does not hold.
            CoverageError: Another number of ranks saved a `PerRank` that has no `regroup`.
            StoreError: The store failed.
        """
        self._check_open()
        template, asked = self._ranks.meet(lambda: (self._template(state, step), (step, strict)))
        if len(set(asked)) > 1:
            raise ConfigError(f"the ranks load different steps (step, strict): {asked[:8]}, by rank")
        resume = Resume(self._ranks, self._access, self._upkeep, template, self._load_planner)
        return resume.load_newest(strict=strict) if step is None else resume.load(step)

    def steps(self) -> list[Step]:
        """Return the committed steps, ascending, of which only the heads are read (local).

        Raises:
            StoreError: The store failed, which never means that there are none.
        """
        return self._root.run(list_steps)

    def latest(self) -> int | None:
        """Return the newest committed step, as the store tells it now (local).

        Raises:
            StoreError: The store failed.
        """
        return self._root.run(latest_step)

    def wait_for(self, step: int | None = None, timeout: float | None = None) -> int:
        """Return the newest committed step, once one is there that is at least `step` (local).

        Another program follows a run by it: it lists now and then, with growing pauses. Where several ranks follow,
        let one ask and tell the others.

        Raises:
            TimeoutError: There was none for `timeout` seconds.
            StoreError: The store failed.
        """
        return self._root.run(partial(wait_for, step=step, timeout_s=timeout))

    def pin(self, step: int, name: str) -> AbstractContextManager[None]:
        """Keep a step from every prune, of any program, for as long as the block lasts (local).

        ```python
        with checkpoints.pin(step, "eval"), open_checkpoint(f"{root}/step-{step}") as checkpoint: ...
        ```

        Raises (when the block begins):
            CheckpointNotFound: The step is not there, or is being removed.
            ConfigError: The name is impossible.
            StoreError: The store failed, or does not tell when objects were written.
        """
        return hold_pin(self._root, step, name)

    def prune(self, *, dry_run: bool = False) -> list[Decision]:
        """Remove the steps that `keep` does not keep, and return what was decided (collective).

        Never removed are the newest committed step, the one that was saved last, those that this program saves, loads
        or checks, and those that are pinned.

        Args:
            dry_run: Decide, and remove nothing.

        Raises:
            StoreError: The store failed; the next prune goes on where this one stopped.
        """
        self._check_open()
        return self._ranks.on_first(partial(self._upkeep.prune, dry_run=dry_run))

    def should_save(self, step: int) -> bool:
        """Return on all ranks whether a save was requested on any of them since the last call (collective, and cheap).

        A save is requested by a signal (SIGTERM, unless `signals` says otherwise) or by `request_save`. The first call
        in the main thread installs the handlers. They call those that they replace, and let a second signal pass.

        Raises:
            ConfigError: The ranks are not at the same step, or it is not a valid one.
        """
        self._check_open()
        self._preemption.listen()
        is_step = isinstance(step, int) and not isinstance(step, bool)
        return self._preemption.agree(self._ranks, step if is_step else -1)

    def request_save(self) -> None:
        """Have the next `should_save` return true, on all ranks (local)."""
        self._preemption.request()

    @property
    def failed_saves(self) -> int:
        """How many saves failed and were only logged, because of `on_error="log"`."""
        return self._saver.failed

    @property
    def preempted(self) -> bool:
        """Whether `should_save` told of a signal, the same on all ranks: time to end."""
        return self._preemption.signalled

    def close(self) -> None:
        """Wait for what goes on in the background, and give up groups and signal handlers (collective).

        Raises:
            DcpStorageError: What failed the last save, if nobody was told yet.
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
        """Close; after an error, which may be this rank's alone, without waiting for the other ranks to do so.

        The save in the background ends first: all ranks take part in it. If it fails, the log says so.
        """
        if kind is None:
            self.close()
            return
        if not self._begin_to_close():
            return
        try:
            self._end()
        except Exception:
            logger.exception("the save in the background failed, too")
        finally:
            self._let_go()

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "a Checkpoints holds groups and threads of this process: make another one in the other process"
        )

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
        """Return whether there is something to close: a fork has none of the threads, and shares the connections."""
        was_closed, self._closed = self._closed, True
        return not was_closed and self._process == os.getpid()

    def _let_go(self) -> None:
        self._preemption.stop()
        self._ranks.part()

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("this Checkpoints is closed: make another one")
        if self._process != os.getpid():
            raise ConfigError("this process is a fork of the one that made the Checkpoints: make another one here")
