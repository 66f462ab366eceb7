"""What may go wrong with one operation, and the injector that makes it go wrong with the K-th."""

import errno
import os
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from aiohttp import ClientResponseError, RequestInfo
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

T = TypeVar("T")
GROWS = frozenset({"create", "write", "fsync", "rename", "mkdir"})
"""Operations that need space on the disk."""


class Died(BaseException):
    """This process is dead: nothing that it does from now on reaches the store or another rank."""


@dataclass(frozen=True)
class Op:
    """One operation on storage.

    Attributes:
        kind: `create`, `open` (to read), `write`, `fsync`, `rename`, `unlink`, `mkdir`, `list`; on an object store
            `put`, `get`, `size`, `list`, `delete`.
        path: The file or object, below the root that is watched.
        target: Where a rename leads.
        offset: Where a write begins.
        data: What it writes.
    """

    kind: str
    path: str
    target: str = ""
    offset: int = 0
    data: bytes = b""


@dataclass(frozen=True)
class Kind:
    """One way to fail.

    Attributes:
        name: For the table.
        when: Before the operation, half-way through what it writes, or after it had its effect.
        make: The error that it raises, or `None` where the process dies.
        lasting: Whether every later operation fails too.
        ops: The kinds of operations that can fail so; all where empty.
    """

    name: str
    when: str
    make: Callable[[], Exception] | None = None
    lasting: bool = False
    ops: frozenset[str] = frozenset()

    def hits(self, op: Op) -> bool:
        return not self.ops or op.kind in self.ops


def _os_error(number: int) -> Callable[[], OSError]:
    return lambda: OSError(number, os.strerror(number))


def _http(status: int) -> Callable[[], Exception]:
    url = URL("http://store.invalid/bucket")
    request = RequestInfo(url, "PUT", CIMultiDictProxy(CIMultiDict()), url)
    return lambda: ClientResponseError(request, (), status=status, message="the server is unwell")


DEATHS = (Kind("dies before", "before"), Kind("dies after", "after"))
LOCAL_KINDS = (
    *DEATHS,
    Kind("dies, torn write", "half", ops=frozenset({"write"})),
    Kind("EIO", "before", _os_error(errno.EIO)),
    Kind("EIO from then on", "before", _os_error(errno.EIO), lasting=True),
    Kind("EIO, half written", "half", _os_error(errno.EIO), ops=frozenset({"write"})),
    Kind("ENOSPC", "before", _os_error(errno.ENOSPC), ops=GROWS),
    Kind("ENOSPC from then on", "half", _os_error(errno.ENOSPC), lasting=True, ops=GROWS),
)
OBJECT_KINDS = (
    *DEATHS,
    Kind("HTTP 500", "before", _http(500)),
    Kind("HTTP 503", "before", _http(503)),
    Kind("HTTP 503 from then on", "before", _http(503), lasting=True),
    Kind("HTTP 500, done", "after", _http(500)),
    Kind("reset", "before", ConnectionResetError),
    Kind("reset, done", "after", ConnectionResetError),
    Kind("timeout", "before", TimeoutError),
    Kind("timeout, done", "after", TimeoutError),
)


@dataclass(frozen=True)
class Fault:
    """The `at`-th operation of `rank` fails; where it dies, with it die `victims`."""

    kind: Kind
    rank: int
    at: int
    victims: frozenset[int]


def pick(points: Iterable[T], every: int, first: int) -> list[T]:
    """Return each `every`-th point, shuffled first: a stride would meet the same kinds again and again."""
    shuffled = list(points)
    random.Random(0).shuffle(shuffled)
    return shuffled[first % every :: every]


class Here(threading.local):
    """The rank that this thread plays, or `None`: then nothing is counted and nothing fails."""

    rank: int | None = None


class Injector:
    """Counts the operations of every rank, keeps them, and makes one of them fail."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.here = Here()
        self.ops: defaultdict[int, list[Op]] = defaultdict(list)
        self.log: list[Op] = []
        self.dead: set[int] = set()
        self.fired = False
        self._fault = fault

    @contextmanager
    def __call__(self, op: Op) -> Iterator[int]:
        """Stand around an operation; give the number of bytes of its data that it may write."""
        rank = self.here.rank
        if rank is None:
            yield len(op.data)
            return
        self.check_alive(rank)
        kind = self._kind(rank, op)
        self.ops[rank].append(op)
        if kind is not None and kind.when == "before":
            self._fail(kind)
        half = kind is not None and kind.when == "half"
        try:
            yield len(op.data) // 2 if half else len(op.data)
            self.log.append(replace(op, data=op.data[: len(op.data) // 2]) if half else op)
        finally:
            # An operation that failed by itself (nothing was there to read) is a moment to die after, too.
            if kind is not None:
                self._fail(kind)

    def check_alive(self, rank: int) -> None:
        if rank in self.dead:
            raise Died(f"rank {rank} is dead")

    def _kind(self, rank: int, op: Op) -> Kind | None:
        fault = self._fault
        if fault is None or rank != fault.rank or len(self.ops[rank]) < fault.at:
            return None
        if len(self.ops[rank]) == fault.at:
            self.fired = True
            return fault.kind
        return fault.kind if fault.kind.lasting and fault.kind.hits(op) else None

    def _fail(self, kind: Kind) -> None:
        if kind.make is not None:
            raise kind.make()
        assert self._fault is not None
        self.dead |= self._fault.victims
        raise Died(kind.name)
