"""The ranks that share a `Checkpoints`, and the process groups in which they communicate."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from dcp_storage.errors import DcpStorageError, picklable

R = TypeVar("R")
Here = TypeVar("Here")


@dataclass(frozen=True)
class _Outcome(Generic[R]):
    """The result or error of a call on a rank."""

    value: R | None
    error: Exception | None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Outcome, (self.value, picklable(self.error))


@dataclass(frozen=True)
class _Groups:
    """Two gloo groups, so that their collectives never mix with those of training on its own group or on a GPU."""

    asked: dist.ProcessGroup
    background: dist.ProcessGroup


class Ranks:
    """The ranks of a process group, or only this process if there is none.

    All of them must make the same calls in the same order, from one thread. The first call creates the groups. If a
    rank has ended or left, calls of the others raise `DcpStorageError`.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self._process_group = process_group
        self._groups: _Groups | None = None

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return dist.get_rank(self._process_group) if _has_groups() else 0

    @property
    def size(self) -> int:
        """The number of ranks."""
        return dist.get_world_size(self._process_group) if _has_groups() else 1

    @property
    def asked(self) -> dist.ProcessGroup | None:
        """The group for calls in the training thread."""
        groups = self._meet()
        return groups.asked if groups else None

    @property
    def background(self) -> dist.ProcessGroup | None:
        """The group for saves in the background."""
        groups = self._meet()
        return groups.background if groups else None

    def meet(self, call: Callable[[], tuple[Here, R]]) -> tuple[Here, list[R]]:
        """Run a call on every rank; return the first result of this rank's, and the second of all, by rank.

        If the call fails on a rank, the error of the lowest such rank is raised on all.
        """
        group = self.asked
        here = _outcome(call)
        told = _Outcome(here.value and here.value[1], here.error)
        outcomes = [told]
        if group:
            outcomes = [told] * self.size
            with _meeting():
                dist.all_gather_object(outcomes, told, group=group)
            outcomes[self.rank] = told  # this rank's own error keeps its traceback
        return (here.value and here.value[0]), [_take(each, rank) for rank, each in enumerate(outcomes)]  # type: ignore[return-value]

    def on_each(self, call: Callable[[], R]) -> list[R]:
        """Return the results of a call on every rank, by rank; the error of the lowest rank is raised on all."""
        return self.meet(lambda: (None, call()))[1]

    def on_first(self, call: Callable[[], R]) -> R:
        """Run a call on rank 0, and return its result or raise its error on every rank."""
        group = self.asked
        outcome = _outcome(call) if self.rank == 0 else None
        if group:
            told = [outcome]
            with _meeting():
                dist.broadcast_object_list(told, src=dist.get_global_rank(group, 0), group=group)
            outcome = outcome or told[0]
        assert outcome is not None, "rank 0 called"
        return _take(outcome, 0)

    def greatest(self, numbers: Sequence[int]) -> list[int]:
        """Return the maximum of each number over all ranks, with one small collective."""
        group = self.asked
        if group is None:
            return list(numbers)
        told = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        with _meeting():
            dist.all_reduce(told, dist.ReduceOp.MAX, group=group)
        return [int(number) for number in told]

    @property
    def have_met(self) -> bool:
        """Whether there are groups, which the ranks create together."""
        return self._groups is not None and _has_groups()

    def part(self) -> None:
        """Destroy the groups. No rank waits for another here."""
        groups, met, self._groups = self._groups, self.have_met, None
        if groups and met:
            dist.destroy_process_group(groups.background)
            dist.destroy_process_group(groups.asked)

    def _meet(self) -> _Groups | None:
        if self._groups is None and _has_groups():
            self._groups = _Groups(self._new_group(), self._new_group())
        return self._groups

    def _new_group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup
        if self._process_group is None:
            group = dist.new_group(backend="gloo")
        else:  # the other ranks do not call
            ranks = dist.get_process_group_ranks(self._process_group)
            group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        return group


def _has_groups() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _meeting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DcpStorageError(
            f"the ranks could not communicate: has one ended, or left its Checkpoints with an error? ({error})"
        ) from error


def _outcome(call: Callable[[], R]) -> _Outcome[R]:
    try:
        return _Outcome(call(), None)
    except Exception as error:  # noqa: BLE001 - raised after all ranks know
        return _Outcome(None, error)


def _take(outcome: _Outcome[R], rank: int) -> R:
    if outcome.error is not None:
        outcome.error.add_note(f"(raised on rank {rank})")
        raise outcome.error
    return outcome.value  # type: ignore[return-value]
