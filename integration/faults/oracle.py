"""Small states of several ranks, and the one question: which save does a fresh reader find, bit for bit?"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, Codec, ShardedLoadPlanner, ShardedSavePlanner, Transfer
from dcp_storage.checkpoint.place import Location
from dcp_storage.errors import CheckpointNotFound
from dcp_storage.transfer import layout, save
from tests.states import assert_same, blank_like

_OBJECT_BYTES, _UNIT_BYTES = 16 << 10, 4 << 10
_TRANSFER = Transfer(concurrency=2, threads=1)


@contextmanager
def small_pieces() -> Iterator[None]:
    """Have a small state make several objects a rank, and a local object several writes."""
    with (
        mock.patch.object(layout, "MIN_OBJECT_BYTES", _OBJECT_BYTES),
        mock.patch.object(save, "UNIT_BYTES", _UNIT_BYTES),
    ):
        yield


class Damaged(AssertionError):
    """What a reader finds is neither a whole checkpoint nor none."""


@dataclass(frozen=True)
class Contestant:
    """A storage writer and reader under test.

    Attributes:
        writer: Makes a writer for a path or URL; this package's also for a `Location`.
        reader: Makes a reader.
        save_planner: Makes a planner.
        load_planner: Makes a planner.
        is_absent: Whether what a load raised says that there is no checkpoint.
        typed: Whether its errors have to be this package's.
    """

    name: str
    writer: Callable[[Any], Any]
    reader: Callable[[str], Any]
    save_planner: Callable[[], Any]
    load_planner: Callable[[], Any]
    is_absent: Callable[[BaseException], bool]
    typed: bool


def ours(name: str, storage_options: dict[str, Any] | None = None, *, sync_files: bool = True) -> Contestant:
    """Return this package's writer and reader."""

    def writer(url: str | Location) -> AsyncStorageWriter:
        codec = Codec(block_bytes=4096)
        return AsyncStorageWriter(
            url, storage_options=storage_options, codec=codec, transfer=_TRANSFER, sync_files=sync_files
        )

    def reader(url: str) -> AsyncStorageReader:
        return AsyncStorageReader(url, storage_options=storage_options, transfer=_TRANSFER)

    def is_absent(cause: BaseException) -> bool:
        return isinstance(cause, CheckpointNotFound)

    return Contestant(name, writer, reader, ShardedSavePlanner, ShardedLoadPlanner, is_absent, typed=True)


def _stock_absent(cause: BaseException) -> bool:
    # DCP makes text of what reading `.metadata` raised, and asks for the rank's own after it.
    return "No such file or directory" in str(cause) and ".metadata" in str(cause)


OURS = ours("dcp_storage")
NOT_SYNCED = ours("dcp_storage, sync_files=False", sync_files=False)
STOCK = Contestant(
    "stock DCP",
    dcp.FileSystemWriter,
    dcp.FileSystemReader,
    dcp.DefaultSavePlanner,
    dcp.DefaultLoadPlanner,
    _stock_absent,
    typed=False,
)


def states(value: int, world: int) -> list[dict[str, Any]]:
    """Return each rank's state of save number `value`: a part of its own, and what all ranks have."""
    return [{**_part(value, rank), **_shared(value)} for rank in range(world)]


def _part(value: int, rank: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1000 * value + rank)
    single, half = torch.randn(9000, generator=generator), torch.randn(40, 150, generator=generator).bfloat16()
    return {f"rank{rank}": {"single": single, "half": half}}


def _shared(value: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1000 * value + 999)
    return {"replicated": torch.randn(1500, generator=generator), "save": value}


def whole(value: int, world: int) -> dict[str, Any]:
    return {key: part for state in states(value, world) for key, part in state.items()}


def find(contestant: Contestant, url: str, world: int) -> int | None:
    """Return the number of the save that stands at a place, every bit of it, or `None` where there is none.

    Raises:
        Damaged: There is something else.
    """
    state = blank_like(whole(0, world))
    try:
        dcp.load(state, storage_reader=contestant.reader(url), planner=contestant.load_planner(), no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if contestant.is_absent(cause):
            return None
        raise Damaged(f"{type(cause).__name__}: {cause}") from error
    value = state["save"]
    try:
        assert_same(state, whole(value, world))
    except (AssertionError, RuntimeError, TypeError) as error:
        raise Damaged(f"a mix of saves: {error}") from error
    return int(value)
