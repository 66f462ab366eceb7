"""Blocking reads of local files, with direct I/O unless the page cache has the bytes or other processes read them too.

A first read through the page cache costs a copy and memory, and on virtual machines page faults: up to 20 times the CPU
time of a direct read, at half of its speed.
"""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from dcp_storage.raw import copy_bytes
from dcp_storage.store.base import PAGE_BYTES, Room
from dcp_storage.store.residency import cached_bytes

_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
_DIRECT = getattr(os, "O_DIRECT", 0)


P = ParamSpec("P")
R = TypeVar("R")

_OPENINGS = 4
_PAUSE_SECONDS = 0.05


def reopening(read: Callable[Concatenate[Path, P], R]) -> Callable[Concatenate[Path, P], R]:
    """Make a function open its path again if another machine replaced or deleted the file (NFS).

    It raises `FileNotFoundError` if the handle stays stale.
    """

    @wraps(read)
    def reads(path: Path, /, *args: P.args, **kwargs: P.kwargs) -> R:
        for opening in range(_OPENINGS):
            try:
                return read(path, *args, **kwargs)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                stale = error
            time.sleep(_PAUSE_SECONDS * opening)
        raise FileNotFoundError(
            errno.ENOENT, "its handle stays stale: it was replaced or deleted", str(path)
        ) from stale

    return reads


def _check_regular(path: Path) -> None:
    """Refuse anything but a regular file before opening it: opening a pipe would wait for a writer forever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


@reopening
def read_file(path: Path) -> bytes:
    """Return a whole file."""
    _check_regular(path)
    return path.read_bytes()


@reopening
def read_range(path: Path, start: int, stop: int, room: Room | None) -> bytes | memoryview:
    """Open, read and close in one call, so that a range costs one switch to a thread."""
    _check_regular(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _pread(descriptor, start, stop) if room is None else _read(descriptor, start, stop, room)
    finally:
        os.close(descriptor)


def _pread(descriptor: int, start: int, stop: int) -> bytes:
    """Read until `stop` or the end of the file; one call may return less than requested."""
    parts = []
    while start < stop and (part := os.pread(descriptor, stop - start, start)):
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _read(descriptor: int, start: int, stop: int, room: Room) -> memoryview:
    before = start % PAGE_BYTES
    window = room.pages[before : before + stop - start]
    target = window if room.final is None else room.final
    cached = None if room.shared else _read_cached(descriptor, start, target)
    if cached is None:
        return target[: _fill(descriptor, start, target, 0)]
    if cached == len(target):
        return target
    # Continue from the page with the first missing byte.
    skip = (before + cached) // PAGE_BYTES * PAGE_BYTES
    pages = room.pages[skip : -(-(before + stop - start) // PAGE_BYTES) * PAGE_BYTES]
    stopped = min(skip + _read_direct(descriptor, start - before + skip, pages) - before, len(target))
    if not cached:
        _forget_probe(descriptor, start)
    if room.final is not None and stopped > cached:
        copy_bytes(window[cached:stopped], target[cached:stopped])
    return target[: max(cached, stopped)]


def _read_cached(descriptor: int, start: int, memory: memoryview) -> int | None:
    """Read from the page cache, up to the first missing byte; `None` if the file system does not report what it holds.

    Linux starts to read requested bytes that are missing, and reads ahead unless it expects random reads. So one page
    is requested first, and then only what is cached.
    """
    filled = 0
    try:
        _expect(descriptor, "POSIX_FADV_RANDOM")
        filled = os.preadv(descriptor, [memory[: PAGE_BYTES - start % PAGE_BYTES]], start, _NOWAIT)
        stop = cached_bytes(descriptor, start, len(memory)) if 0 < filled < len(memory) else filled
        while filled < stop and (count := os.preadv(descriptor, [memory[filled:stop]], start + filled, _NOWAIT)):
            filled += count
    except BlockingIOError:
        return filled
    except OSError:  # not supported: another system, a network, FUSE; the next read raises errors of the file
        _expect(descriptor, "POSIX_FADV_NORMAL")
        return filled or None
    return filled


def _forget_probe(descriptor: int, start: int) -> None:
    """Drop the page that the probe itself put into the page cache: the next read would take it for more."""
    with suppress(AttributeError, OSError):  # it is only advice
        os.posix_fadvise(descriptor, start // PAGE_BYTES * PAGE_BYTES, PAGE_BYTES, os.POSIX_FADV_DONTNEED)


def _expect(descriptor: int, reads: str) -> None:
    with suppress(AttributeError, OSError):  # it is only advice
        os.posix_fadvise(descriptor, 0, 0, getattr(os, reads))


def _read_direct(descriptor: int, start: int, pages: memoryview) -> int:
    """Read whole pages with direct I/O, or through the page cache if the file system supports nothing else."""
    _set_direct(descriptor, direct=True)
    filled = 0
    try:
        while filled < len(pages) and (count := os.preadv(descriptor, [pages[filled:]], start + filled)):
            filled += count
            if filled % PAGE_BYTES:
                return filled  # the end of the file
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _set_direct(descriptor, direct=False)  # a disk with larger pages
        return _fill(descriptor, start, pages, filled)
    return filled


def _fill(descriptor: int, start: int, memory: memoryview, filled: int) -> int:
    while filled < len(memory) and (count := os.preadv(descriptor, [memory[filled:]], start + filled)):
        filled += count
    return filled


def _set_direct(descriptor: int, *, direct: bool) -> None:
    with suppress(OSError):  # the file system does not support it
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _DIRECT if direct else flags & ~_DIRECT)
