"""Damage as disks, copies and people do it to a checkpoint, seeded; and what a load and `verify` make of it."""

import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, Codec, ShardedLoadPlanner
from dcp_storage.errors import (
    BlockCorrupt,
    CheckpointNotFound,
    DcpStorageError,
    ManifestCorrupt,
    ObjectNotFound,
    UnsupportedFormat,
)
from dcp_storage.verify import verify
from tests import fake_ranks
from tests.states import DTYPES, assert_same, blank_like, random_bits

CODECS = {
    "zstd": Codec(block_bytes=4096),
    "zstd, no planes": Codec(byte_planes=False, block_bytes=4096),
    "none": Codec("none", block_bytes=4096),
}
RANKS = 3
LIMIT_S = 20


def make_state(seed: int) -> dict[str, Any]:
    """Tensors of every dtype, in one block and in many, random (incompressible) and not, and other entries."""
    torch.manual_seed(seed)
    pick = random.Random(seed)
    return {
        **{name: random_bits(getattr(torch, name), (50, 7)) for name in DTYPES},
        "weights": torch.randn(40, 500),
        "half": torch.randn(60, 200).bfloat16(),
        "zeros": torch.full((5000,), seed),
        "step": seed,
        "lists": [seed, "two", {"three": [3.0] * 50}],
        "text": "".join(pick.choices("0123456789abcdef", k=20_000)),
    }


def save(path: Path, state: dict[str, Any], codec: Codec) -> None:
    """Save as several ranks do, each with a share of the entries, so that there are several objects."""
    names = sorted(state)
    shares = [{name: state[name] for name in names[rank::RANKS]} for rank in range(RANKS)]
    fake_ranks.save(shares, lambda: AsyncStorageWriter(path, codec=codec, sync_files=False))


@dataclass(frozen=True)
class Case:
    """A checkpoint to damage, one of the same shapes beside it, and chance."""

    path: Path
    other: Path
    chance: random.Random

    def objects(self, path: Path | None = None) -> list[Path]:
        """The data objects, in the order of their ranks."""
        found = sorted((path or self.path).glob("*.distcp*"), key=lambda file: file.name.partition("-")[2])
        assert found
        return found

    def any_object(self) -> Path:
        return self.chance.choice(self.objects())

    def any_range(self, data: bytes | bytearray) -> slice:
        start = self.chance.randrange(len(data))
        return slice(start, min(len(data), start + self.chance.choice([1, 4, 64, 512, 4096, 50_000])))


def _edit(file: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)


def _flip(case: Case, file: Path) -> None:
    def change(data: bytearray) -> None:
        data[case.chance.randrange(len(data))] ^= 1 << case.chance.randrange(8)

    _edit(file, change)


def _truncate(case: Case, file: Path) -> None:
    size = file.stat().st_size
    keep = case.chance.choice([0, 1, 4, size - 1, case.chance.randrange(size)])
    _edit(file, lambda data: data.__delitem__(slice(keep, None)))


def _extend(case: Case, file: Path) -> None:
    more = case.chance.choice([b"\0", b"\0" * 4096, case.chance.randbytes(100), file.read_bytes()])
    _edit(file, lambda data: data.extend(more))


def _zero(case: Case, file: Path) -> None:
    def change(data: bytearray) -> None:
        where = case.any_range(data)
        data[where] = bytes(where.stop - where.start)

    _edit(file, change)


def _garbage(case: Case, file: Path) -> None:
    def change(data: bytearray) -> None:
        where = case.any_range(data)
        data[where] = case.chance.randbytes(where.stop - where.start)

    _edit(file, change)


def _misdirect(case: Case, file: Path) -> None:
    """Write a piece of the object over another place in it."""

    def change(data: bytearray) -> None:
        where = case.any_range(data)
        start = case.chance.randrange(len(data) - (where.stop - where.start) + 1)
        data[start : start + where.stop - where.start] = data[where]

    _edit(file, change)


def _lose(case: Case, file: Path) -> None:
    _edit(file, lambda data: data.__delitem__(case.any_range(data)))


def _delete(_case: Case, file: Path) -> None:
    file.unlink()


def _swap(one: Path, another: Path) -> None:
    first, second = one.read_bytes(), another.read_bytes()
    one.write_bytes(second)
    another.write_bytes(first)


def _swap_within(case: Case) -> None:
    _swap(*case.chance.sample(case.objects(), 2))


def _swap_between(case: Case) -> None:
    """One object of another checkpoint, in the place of the same rank's object of this."""
    number = case.chance.randrange(RANKS)
    shutil.copy(case.objects(case.other)[number], case.objects()[number])


def _old_manifest(case: Case) -> None:
    shutil.copy(case.other / ".metadata", case.path / ".metadata")


def _old_manifest_over_new_objects(case: Case) -> None:
    """The manifest of another checkpoint, and this one's objects under the names that it knows."""
    for mine, theirs in zip(case.objects(), case.objects(case.other), strict=True):
        mine.rename(case.path / theirs.name)
    _old_manifest(case)


def _to_object(damage: Callable[[Case, Path], None]) -> Callable[[Case], None]:
    return lambda case: damage(case, case.any_object())


def _to_manifest(damage: Callable[[Case, Path], None]) -> Callable[[Case], None]:
    return lambda case: damage(case, case.path / ".metadata")


_ON_FILES = {
    "a bit flipped": _flip,
    "truncated": _truncate,
    "extended": _extend,
    "a range zeroed": _zero,
    "a range overwritten": _garbage,
    "a misdirected write": _misdirect,
    "a range lost": _lose,
    "deleted": _delete,
}
TO_OBJECTS: dict[str, Callable[[Case], None]] = {
    **{f"object: {name}": _to_object(damage) for name, damage in _ON_FILES.items()},
    "two objects swapped": _swap_within,
    "object of another checkpoint": _swap_between,
}
DAMAGES: dict[str, Callable[[Case], None]] = {
    **TO_OBJECTS,
    **{f"manifest: {name}": _to_manifest(damage) for name, damage in _ON_FILES.items()},
    "manifest of another checkpoint": _old_manifest,
    "manifest and objects of two checkpoints": _old_manifest_over_new_objects,
}


@dataclass(frozen=True)
class Outcome:
    """What a load made of a damage: `verdict` is "exact", "named" (a typed error that says where), or a failure."""

    verdict: str
    detail: str = ""

    @property
    def is_right(self) -> bool:
        return self.verdict in {"exact", "named"}


def load(path: Path, state: dict[str, Any], names: list[str]) -> Outcome:
    """Load some entries of a damaged checkpoint, and compare them."""
    wanted = {name: state[name] for name in names}
    found = blank_like(wanted)
    try:
        with _limited():
            dcp.load(found, storage_reader=AsyncStorageReader(path), planner=ShardedLoadPlanner())
    except CheckpointException as raised:
        return _judge(raised.failures[0][0])
    return Outcome("exact") if _same(found, wanted) else Outcome("SILENT")


def load_stock(path: Path, state: dict[str, Any]) -> Outcome:
    """Load all of a damaged stock checkpoint with DCP's own reader."""
    found = blank_like(state)
    try:
        with _limited():
            dcp.load(found, storage_reader=dcp.FileSystemReader(path))
    except CheckpointException as raised:
        return Outcome("raised", repr(raised.failures[0][0]))
    return Outcome("exact") if _same(found, state) else Outcome("SILENT")


def check(path: Path, outcome: Outcome) -> Outcome:
    """Return what `verify` says: "named" where it finds damage; it must, where the load did."""
    try:
        with _limited():
            sound = verify(path).sound
    except DcpStorageError as error:
        return _judge(error)
    if sound and outcome.verdict == "named":
        return Outcome("MISSED", outcome.detail)
    return Outcome("exact" if sound else "named")


def _judge(error: BaseException) -> Outcome:
    """Say whether an error is typed and names what is damaged."""
    detail = f"{type(error).__name__}: {error}"
    if isinstance(error, BlockCorrupt):
        names = [error.object_name, error.fqn, str(error.offset)]
    elif isinstance(error, ObjectNotFound):
        names = [error.object_name]
    elif isinstance(error, ManifestCorrupt | CheckpointNotFound | UnsupportedFormat):
        names = [error.url, ".metadata"]
    else:
        return Outcome("UNTYPED", detail)
    return Outcome("named" if all(name and name in str(error) for name in names) else "UNNAMED", detail)


def _same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    try:
        assert_same(found, expected)
    except (AssertionError, AttributeError):
        return False
    return True


@contextmanager
def _limited() -> Iterator[None]:
    """Raise in this thread what runs for too long."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"no end within {LIMIT_S} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Pair:
    """Two saved checkpoints of the same shapes and other values, and the state of the first."""

    path: Path
    other: Path
    state: dict[str, Any]


def make_pair(path: Path, write: Callable[[Path, dict[str, Any]], None]) -> Pair:
    """Save both."""
    states = [make_state(seed) for seed in (1, 2)]
    for name, state in zip(("this", "other"), states, strict=True):
        write(path / name, state)
    return Pair(path / "this", path / "other", states[0])


def damaged(pair: Pair, scratch: Path, damage: Callable[[Case], None], seed: int) -> Case:
    """Damage a copy of a checkpoint."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(pair.path, scratch)
    case = Case(scratch, pair.other, random.Random(seed))
    damage(case)
    return case


def some_names(case: Case, state: dict[str, Any]) -> list[str]:
    """Return all entries, or a third of them: damage to what is not loaded must do no harm."""
    names = sorted(state)
    return names if case.chance.random() < 0.7 else case.chance.sample(names, len(names) // 3)
