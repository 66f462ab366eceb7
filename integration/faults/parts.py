"""The parts of the table that run in this process: every point, and every power cut."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

from integration.faults.faults import Op
from integration.faults.oracle import NOT_SYNCED, OURS, STOCK, Contestant
from integration.faults.places import Bucket, Directory
from integration.faults.points import HISTORIES, Case, laboratory
from integration.faults.power import Cut, PowerCuts, without
from integration.faults.tally import Tally

STOCK_HISTORIES = ("first", "overwrite")


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory in memory where there is one: nothing here is meant to last."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="dcp-storage-", dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory)


def cases(contestant: Contestant, worlds: tuple[int, ...]) -> Iterator[Case]:
    """Every history for both ways to save; `async_save` differs from `save` before it touches the store."""
    histories = HISTORIES if contestant is OURS else STOCK_HISTORIES
    for history, world in product(histories, worlds):
        yield Case(contestant, history, world, asynchronous=False)
    if contestant is OURS:
        for history, world in product(STOCK_HISTORIES, worlds):
            yield Case(contestant, history, world, asynchronous=True)


def try_points(
    tally: Tally,
    place: type[Directory | Bucket],
    contestant: Contestant,
    *,
    worlds: tuple[int, ...] = (1, 2, 4),
    every: int = 1,
    first: int = 0,
) -> None:
    """Break every operation of every case, or each `every`-th, from the one of number `first` on."""
    with scratch() as directory, laboratory(place(directory)) as lab:
        for case in cases(contestant, worlds):
            for point in lab.points(case, every, first=first):
                where = (case.history, case.world, case.asynchronous, point.fault, point.op)
                kind = point.fault.kind.name
                if case.world > 1 and len(point.fault.victims) == 1 and point.fault.kind.make is None:
                    kind = "one rank dies"
                tally.add((place.name, contestant.name, kind), point.found, point.wrong, where)


def try_power(tally: Tally, contestant: Contestant, *, worlds: tuple[int, ...] = (1, 2), samples: int = 20) -> None:
    """Cut the power at every moment of a first save and of an overwrite."""
    for world, overwrite in product(worlds, (False, True)):
        with _cuts(contestant, world) as cuts:
            recording = cuts.record(overwrite=overwrite)
            kind = "overwrite" if overwrite else "first save"
            _add(tally, contestant.name, kind, cuts.cuts(recording, samples=samples))


def try_power_after_deaths(
    tally: Tally, contestant: Contestant, *, samples: int = 4, every: int = 1, first: int = 0
) -> None:
    """Cut the power while a save repairs what one that died left behind."""
    for overwrite in (False, True):
        with _cuts(contestant, 2) as cuts:
            for recording in [*cuts.record_after_deaths(overwrite=overwrite)][first::every]:
                _add(tally, contestant.name, "after a died save", cuts.cuts(recording, samples=samples))


MUTANTS: dict[str, Callable[[Op], bool]] = {
    "no sync of data files": lambda op: op.kind == "fsync" and ".distcp" in op.path,
    "no sync of the manifest": lambda op: op.kind == "fsync" and ".metadata" in op.path,
    "no sync of the directory": lambda op: op.kind == "fsync" and op.path == "run/step-1",
    "no sync of its parents": lambda op: op.kind == "fsync" and op.path in {".", "run"},
}
"""Saves as they would be with one precaution less: the simulation has to find fault with each."""


def try_mutants(tally: Tally, *, samples: int = 4) -> None:
    """Show that the simulation finds what it should: saves that leave out a sync, or all of them."""
    try_power(tally, NOT_SYNCED, worlds=(1,), samples=samples)
    for name, is_left_out in MUTANTS.items():
        with _cuts(OURS, 1) as cuts:
            for overwrite in (False, True):
                recording = without(cuts.record(overwrite=overwrite), is_left_out)
                _add(tally, f"{OURS.name}, {name}", "", cuts.cuts(recording, samples=samples))


def try_stock(tally: Tally, *, every: int = 1, first: int = 0) -> None:
    """Do the same to DCP's own writer."""
    try_points(tally, Directory, STOCK, worlds=(1, 2), every=every, first=first)
    try_power(tally, STOCK)


@contextmanager
def _cuts(contestant: Contestant, world: int) -> Iterator[PowerCuts]:
    with scratch() as directory, laboratory(Directory(directory)):
        yield PowerCuts(directory / "power", contestant, world)


def _add(tally: Tally, writer: str, kind: str, cuts: Iterator[Cut]) -> None:
    for cut in cuts:
        said = "reported done" if cut.reported else "under way"
        tally.add(("power cut", writer, f"{kind}, {said}".strip(", ")), cut.found, cut.wrong, cut.moment)
