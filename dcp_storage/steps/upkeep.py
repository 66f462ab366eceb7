"""Chores after a commit, during training: the step is checked, and old ones are removed."""

import logging
from collections import Counter
from collections.abc import Container, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Condition, Lock
from typing import Any

from dcp_storage.errors import DcpStorageError
from dcp_storage.steps.access import Access
from dcp_storage.steps.background import Chores
from dcp_storage.steps.checking import How, Verdict, Verdicts, check_own
from dcp_storage.steps.names import directory_of
from dcp_storage.steps.policies import Policy
from dcp_storage.steps.proven import ProvenOnly
from dcp_storage.steps.retention import Decision, prune_steps
from dcp_storage.store.base import Store
from dcp_storage.transfer.context import Context

logger = logging.getLogger(__name__)


class Upkeep:
    """Checks what this rank wrote, and on rank 0 removes steps that `keep` does not keep.

    Attributes:
        verdicts: The verdicts on the saved steps.
    """

    def __init__(self, access: Access, keep: Policy | None, verify: How | None) -> None:
        self.verdicts = Verdicts()
        self._access, self._keep, self._verify = access, keep, verify
        self._chores = Chores(self._follow, self._skip)
        self._in_use: Counter[int] = Counter()
        self._removing: int | None = None
        self._turn = Condition()
        self._rank = 0
        self._pruning = Lock()

    def hold(self, step: int) -> None:
        """Keep a step from being removed while this process writes or reads it; wait if it is being removed."""
        with self._turn:
            self._turn.wait_for(lambda: self._removing != step)
            self._in_use[step] += 1

    def release(self, step: int) -> None:
        """Release a step."""
        with self._turn:
            self._in_use[step] -= 1

    @contextmanager
    def using(self, step: int) -> Iterator[None]:
        """Hold a step while a block runs."""
        self.hold(step)
        try:
            yield
        finally:
            self.release(step)

    def committed(self, step: int, rank: int) -> None:
        """Start the chores after the commit of a step on this rank."""
        self._rank = rank
        self.verdicts.damaged.discard(step)
        if self._verify:
            self.verdicts.expect(step)
        if self._verify or (self._keep and rank == 0):
            self._chores.add(step)

    def wait(self) -> None:
        """Wait until nothing is left to do."""
        self._chores.wait()

    def end(self) -> None:
        """Remove what the last verdicts allow."""
        if self._verify and self._keep and self._rank == 0:
            self._prune_quietly()

    def prune(self, *, dry_run: bool) -> list[Decision]:
        """Remove steps that are not to be kept, and return the decisions."""
        keep = self._keep and ProvenOnly(self._keep, self.verdicts)
        with self._pruning:
            how = partial(prune_steps, keep=keep, in_use=_Held(self), claim=self._claim, dry_run=dry_run)
            return self._access.root.run(how)

    @contextmanager
    def _claim(self, step: int) -> Iterator[bool]:
        """Implement `Claim`."""
        with self._turn:
            is_free = not self.holds(step)
            if is_free:
                self._removing = step
        try:
            yield is_free
        finally:
            with self._turn:
                self._removing = None
                self._turn.notify_all()

    def holds(self, step: int) -> bool:
        """Return whether a step is being written, read or checked."""
        return self._in_use[step] > 0 or step in self.verdicts.pending

    def _follow(self, step: int) -> None:
        if self._verify:
            verdict = self._check(step, self._verify)
            if verdict is not None:  # otherwise the step was saved again, and is checked again
                self.verdicts.note(step, verdict)
        if self._keep and self._rank == 0:
            self._prune_quietly()

    def _check(self, step: int, how: How) -> Verdict | None:
        access = self._access

        def check(store: Store) -> Coroutine[Any, Any, Verdict | None]:
            return check_own(Context(store, access.transfer, access.observer), self._rank, how)

        return access.root.child(directory_of(step)).run(check)

    def _skip(self, step: int) -> None:
        self.verdicts.note(step, Verdict.UNCHECKED)

    def _prune_quietly(self) -> None:
        try:
            self.prune(dry_run=False)
        except DcpStorageError as error:
            logger.warning("not all old steps were removed; the next prune will continue: %s", error)


class _Held(Container[int]):
    """The steps that an `Upkeep` holds, looked up during a prune."""

    def __init__(self, upkeep: Upkeep) -> None:
        self._upkeep = upkeep

    def __contains__(self, step: object) -> bool:
        return isinstance(step, int) and self._upkeep.holds(step)
