"""Every operation of a save, broken in every way: what a fresh reader finds afterwards, and what the save said."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint import CheckpointException

from dcp_storage.errors import DcpStorageError
from integration.faults.faults import DEATHS, Fault, Injector, pick
from integration.faults.oracle import Contestant, Damaged, find, small_pieces, states
from integration.faults.places import Bucket, Directory
from integration.faults.ranks import ranks_are_threads, save_on_ranks

Place = Directory | Bucket
NEW, NEXT = 8, 9
"""The saves that are broken, and that come after."""
HISTORIES = {
    "first": (),
    "overwrite": ("whole",),
    "first, after a died save": ("died before its commit",),
    "overwrite, after a died save": ("whole", "died before its commit"),
    "overwrite, after a save died at its end": ("whole", "died after its commit"),
}
"""What happened at the place before."""


@dataclass(frozen=True)
class Case:
    """A save that is to be broken."""

    contestant: Contestant
    history: str
    world: int
    asynchronous: bool


@dataclass(frozen=True)
class Point:
    """One way to break it. `wrong` holds what is wrong with the outcome."""

    case: Case
    fault: Fault
    op: str
    found: str
    wrong: tuple[str, ...]


class Laboratory:
    """Makes the histories once, and then breaks save after save on copies of them."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._before: dict[tuple[str, int, str], int | None] = {}

    def points(self, case: Case, every: int = 1, first: int = 0) -> Iterator[Point]:
        """Break the case's save at every point, or at every `every`-th of them."""
        self._prepare(case)
        for fault, op in pick(self._faults(case), every, first):
            yield self.break_at(case, fault, op)

    def break_at(self, case: Case, fault: Fault, op: str) -> Point:
        """Break one save, and say what came of it."""
        self.place.restore(_key(case))
        injector = Injector(fault)
        outcomes = self._save(case, NEW, injector)
        wrong = [] if injector.fired else ["the operation was never reached"]
        wrong += _judge_errors(case, fault, outcomes)
        found: Any
        try:
            found = find(case.contestant, self.place.url, case.world)
        except Damaged as error:
            found, wrong = "damaged", [*wrong, str(error)]
        else:
            wrong += self._judge_found(case, found, succeeded=None in outcomes)
            wrong += self._judge_next(case)
        names = {NEW: "new", None: "none", "damaged": "damaged"}
        return Point(case, fault, op, names.get(found, "old"), tuple(wrong))

    def record(self, case: Case) -> Injector:
        """Save without a fault and return every rank's operations."""
        self._prepare(case)
        self.place.restore(_key(case))
        injector = Injector()
        outcomes = self._save(case, NEW, injector)
        assert outcomes == [None] * case.world, outcomes
        return injector

    def _faults(self, case: Case) -> Iterator[tuple[Fault, str]]:
        ops = self.record(case).ops
        everyone = frozenset(range(case.world))
        for rank in range(case.world):
            for at, op in enumerate(ops[rank]):
                for kind in self.place.kinds:
                    if not kind.hits(op):
                        continue
                    yield Fault(kind, rank, at, everyone), op.kind
                    if kind.make is None and case.world > 1 and rank in {0, case.world - 1}:
                        yield Fault(kind, rank, at, frozenset({rank})), op.kind

    def _prepare(self, case: Case) -> None:
        key = _key(case)
        if (*key_of(case),) in self._before:
            return
        self.place.restore(None)
        for value, event in enumerate(HISTORIES[case.history], start=1):
            if event == "whole":
                assert self._save(case, value, Injector()) == [None] * case.world
            else:
                self._save(case, value, Injector(self._death(case, event)))
        self._before[key_of(case)] = find(case.contestant, self.place.url, case.world)
        self.place.keep(key)

    def _death(self, case: Case, event: str) -> Fault:
        """Return the death of every rank at the coordinator's commit of the save that comes next."""
        self.place.keep(f"{_key(case)}, before")
        dry = Injector()
        self._save(case, NEXT, dry)
        self.place.restore(f"{_key(case)}, before")
        at = max(number for number, op in enumerate(dry.ops[0]) if op.kind in self.place.commits)
        return Fault(DEATHS[event.startswith("died after")], 0, at, frozenset(range(case.world)))

    def _save(self, case: Case, value: int, injector: Injector) -> list[BaseException | None]:
        contestant = case.contestant
        with self.place.broken(injector):
            return save_on_ranks(
                states(value, case.world),
                lambda: contestant.writer(self.place.url),
                contestant.save_planner,
                injector,
                asynchronous=case.asynchronous,
            )

    def _judge_found(self, case: Case, found: int | None, *, succeeded: bool) -> list[str]:
        allowed = {NEW} if succeeded else {NEW, self._before[key_of(case)]}
        return [] if found in allowed else [f"found save {found}, not one of {allowed}"]

    def _judge_next(self, case: Case) -> list[str]:
        """Save once more, where the broken save left off."""
        outcomes = self._save(case, NEXT, Injector())
        if outcomes != [None] * case.world:
            return [f"the next save failed: {outcomes}"]
        found = find(case.contestant, self.place.url, case.world)
        return [] if found == NEXT else [f"the next save said that it stands, and {found} was found"]


def key_of(case: Case) -> tuple[str, int, str]:
    return case.history, case.world, case.contestant.name


def _key(case: Case) -> str:
    return f"{case.history} by {case.world}, {case.contestant.name}"


def _judge_errors(case: Case, fault: Fault, outcomes: list[BaseException | None]) -> list[str]:
    """Return what is wrong with what the ranks were told: all of them the same, in this package's own errors."""
    if fault.kind.make is None:
        wrong = [f"rank {rank} hung" for rank, outcome in enumerate(outcomes) if type(outcome).__name__ == "Hang"]
        return wrong + ["a dead rank reported success" for rank in fault.victims if outcomes[rank] is None]
    if outcomes == [None] * case.world:
        return []
    return [f"rank {rank} got {outcome!r}" for rank, outcome in enumerate(outcomes) if not _is_typed(case, outcome)]


def _is_typed(case: Case, outcome: BaseException | None) -> bool:
    if not isinstance(outcome, CheckpointException):
        return False
    causes = [cause for cause, _ in outcome.failures.values()]
    return not case.contestant.typed or all(isinstance(cause, DcpStorageError) for cause in causes)


@contextmanager
def laboratory(place: Place) -> Iterator[Laboratory]:
    """Open a laboratory: several objects a rank, and ranks that are threads."""
    with small_pieces(), ranks_are_threads():
        yield Laboratory(place)
