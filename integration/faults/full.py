"""File systems that really fill up: a small tmpfs for each size between enough for one checkpoint and for two."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from integration.faults.faults import Injector
from integration.faults.oracle import OURS, Damaged, find, states
from integration.faults.places import Bucket
from integration.faults.points import laboratory
from integration.faults.ranks import save_on_ranks
from integration.faults.tally import Tally

_PAGE = 4096
_OLD, _NEW, _NEXT = 1, 2, 3


def is_possible() -> bool:
    """Return whether this user may mount a tmpfs."""
    with tempfile.TemporaryDirectory() as directory:
        mounted = subprocess.run(_mount(directory, _PAGE), capture_output=True, check=False).returncode == 0
        if mounted:
            subprocess.run(["umount", directory], check=True)
        return mounted


def try_full_disks(tally: Tally, *, worlds: tuple[int, ...] = (1, 2), every: int = 1, first: int = 0) -> None:
    """Overwrite a checkpoint on file systems of every size, by pages, that holds the old one and perhaps the new."""
    for world in worlds:
        used = _pages_of_one_checkpoint(world)
        for pages in range(used + 2 + first, 2 * used + 8, every):
            found, wrong = _overwrite(world, pages)
            tally.add(("full disk", OURS.name, "a tmpfs that fills up"), found, wrong, f"{world} ranks, {pages} pages")


def _pages_of_one_checkpoint(world: int) -> int:
    with _tmpfs(1 << 20) as directory:
        _save(directory, _OLD, world)
        return sum(-(-path.stat().st_size // _PAGE) for path in directory.rglob("*") if path.is_file())


def _overwrite(world: int, pages: int) -> tuple[str, list[str]]:
    with _tmpfs(pages) as directory:
        if _save(directory, _OLD, world) is not None:
            return "none", ["the first save did not fit"]
        error = _save(directory, _NEW, world)
        try:
            found = find(OURS, str(directory / "step-1"), world)
        except Damaged as damage:
            return "damaged", [str(damage)]
        allowed = {_NEW} if error is None else {_OLD}
        wrong = [] if found in allowed else [f"found save {found}, not one of {allowed}"]
        if error is not None and "No space left on device" not in str(error):
            wrong.append(f"the error does not say why: {error}")
        subprocess.run(_mount(directory, 1 << 20, "remount,"), check=True)
        if _save(directory, _NEXT, world) is not None or find(OURS, str(directory / "step-1"), world) != _NEXT:
            wrong.append("with room again, the next save failed")
        return {_OLD: "old", _NEW: "new"}.get(found, "none"), wrong


def _save(directory: Path, value: int, world: int) -> BaseException | None:
    url = str(directory / "step-1")
    with laboratory(Bucket(directory)):
        outcomes = save_on_ranks(
            states(value, world), lambda: OURS.writer(url), OURS.save_planner, Injector(), asynchronous=False
        )
    return outcomes[0]


@contextmanager
def _tmpfs(pages: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dcp-storage-") as directory:
        subprocess.run(_mount(directory, pages), check=True)
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", directory], check=True)


def _mount(directory: str | Path, pages: int, how: str = "") -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", f"{how}size={pages * _PAGE}", "tmpfs", str(directory)]
