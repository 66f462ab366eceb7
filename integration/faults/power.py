"""The power fails at every moment of a save on local disk: what may be on the disk then is loaded by a fresh reader."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from integration.faults.disk import Disk, Files
from integration.faults.faults import DEATHS, Fault, Injector, Op
from integration.faults.oracle import Contestant, Damaged, find, states
from integration.faults.places import Directory
from integration.faults.ranks import save_on_ranks

_URL = Path("run") / "step-1"
OLD, DIED, NEW = 1, 2, 3


@dataclass(frozen=True)
class Cut:
    """A disk after a power cut, as a reader finds it.

    Attributes:
        moment: How many operations had been done.
        reported: Whether the save had been reported done.
        found: `old`, `new`, `none` or `damaged`.
        wrong: What is wrong with that.
    """

    moment: int
    reported: bool
    found: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Recording:
    """The operations of one save, and what was on the disk before it."""

    before: Files
    ops: tuple[Op, ...]
    allowed: frozenset[int | None]
    first: int = 0
    """The first operation of the save that is under test; those before it are of one that died."""


class PowerCuts:
    """Records saves, and cuts their power.

    Args:
        scratch: A directory; best in memory.
        world: How many ranks save.
    """

    def __init__(self, scratch: Path, contestant: Contestant, world: int) -> None:
        self._place = Directory(scratch)
        self._after = scratch / "after"
        self._contestant = contestant
        self._world = world

    def record(self, *, overwrite: bool) -> Recording:
        """Record a save."""
        self._start(overwrite)
        before = read_files(self._root)
        return Recording(before, tuple(self._save(NEW).log), frozenset({NEW, OLD if overwrite else None}))

    def record_after_deaths(self, *, overwrite: bool) -> Iterator[Recording]:
        """Record a save that follows one that died, for every operation at which it may have died."""
        self._start(overwrite)
        for at in range(len(self._save(DIED).ops[0])):
            self._start(overwrite)
            before = read_files(self._root)
            died = self._save(DIED, Fault(DEATHS[1], 0, at, frozenset(range(self._world))))
            log = self._save(NEW).log
            allowed = frozenset({NEW, DIED, OLD if overwrite else None})
            yield Recording(before, (*died.log, *log), allowed, first=len(died.log))

    def cuts(
        self, recording: Recording, *, samples: int, moments: Callable[[int], bool] | None = None
    ) -> Iterator[Cut]:
        """Cut the power before every operation and at the end; yield each different disk once a moment."""
        disk, last = Disk(recording.before), len(recording.ops)
        seen: set[tuple[bool, int]] = set()
        for moment in range(last + 1):
            if moment >= recording.first and (moments is None or moments(moment)):
                for files in disk.states(moment, samples):
                    key = (moment == last, _digest(files))
                    if key not in seen:
                        seen.add(key)
                        yield self._judge(files, moment, recording, reported=moment == last)
            if moment < last:
                disk.apply(recording.ops[moment])

    @property
    def _root(self) -> Path:
        return Path(self._place.url).parents[1]

    def _start(self, overwrite: bool) -> None:
        self._place.restore(None)
        if overwrite:
            self._save(OLD)

    def _save(self, value: int, fault: Fault | None = None) -> Injector:
        injector, contestant = Injector(fault), self._contestant
        with self._place.broken(injector):
            outcomes = save_on_ranks(
                states(value, self._world),
                lambda: contestant.writer(self._place.url),
                contestant.save_planner,
                injector,
                asynchronous=False,
            )
        assert fault is not None or outcomes == [None] * self._world, outcomes
        return injector

    def _judge(self, files: Files, moment: int, recording: Recording, *, reported: bool) -> Cut:
        write_files(self._after, files)
        allowed = {NEW} if reported else recording.allowed
        try:
            found = find(self._contestant, str(self._after / _URL), self._world)
        except Damaged as error:
            return Cut(moment, reported, "damaged", (str(error),))
        wrong = () if found in allowed else (f"found save {found}, not one of {sorted(map(str, allowed))}",)
        return Cut(moment, reported, {NEW: "new", None: "none"}.get(found, "old"), wrong)


def without(recording: Recording, is_left_out: Callable[[Op], bool]) -> Recording:
    """Return a recording as a library would make it that leaves out some operations."""
    ops = tuple(op for op in recording.ops if not is_left_out(op))
    return Recording(recording.before, ops, recording.allowed)


def read_files(root: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        found.update({f"{name}/": b""} if path.is_dir() else {name: path.read_bytes()})
    return found


def write_files(root: Path, files: Files) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, content in sorted(files.items()):
        path = root / name
        path.mkdir(exist_ok=True) if name.endswith("/") else path.write_bytes(content)


def _digest(files: Files) -> int:
    return hash(frozenset(files.items()))  # Python computes the hash of a content once
