"""Host memory for staged states: that of one state is kept for the next save, independent of writers."""

import mmap
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from time import sleep
from typing import Literal
from weakref import finalize, ref

import numpy as np
import torch
from numpy.typing import NDArray

from dcp_storage.config import MIB
from dcp_storage.dcp.device import pin
from dcp_storage.errors import StagingError

Where = Literal["private", "shared"]
Bytes = NDArray[np.uint8]

_SPARE = 2
"""Kept memory that is more than this many times too large is returned to the system instead of being lent."""

_TOUCHED_BYTES = 16 * MIB
_TOUCHERS = 8

_WORTH_WAITING = 64 * MIB
_RETURNING_S = 0.005
"""Time for memory to be returned, which is shorter than allocating new pages."""


@dataclass(eq=False)
class Memory:
    """Pages of host memory.

    Attributes:
        array: Their bytes.
        file: The file that another process can map, if the memory is shared.
        pinned: Whether CUDA can write to them directly.
        process: The process that allocated them.
    """

    array: Bytes
    where: Where
    file: int | None = None
    pinned: bool = False
    process: int = field(default_factory=os.getpid)


class Pool:
    """Lends memory, and takes it back when nothing refers to it or to a tensor over it."""

    def __init__(self) -> None:
        # A deque, whose operations are atomic: finalizers run in any thread, even within these methods.
        self._kept: deque[Memory] = deque(maxlen=1)
        self._lent: ref[Bytes] | None = None
        self.shares = False
        """Whether states are sent to another process: set when the first is, to stage later ones in shared memory."""

    def lend(self, nbytes: int, *, device: bool, keep: bool) -> tuple[Bytes, Memory]:
        """Return memory of `nbytes`, and the pages that it is part of.

        Tensors must be created over the array itself (`torch.frombuffer`), which they then keep alive. When it is
        garbage-collected, the memory is kept for the next loan, or freed without `keep`. `device` means that an
        accelerator writes to it.

        Raises:
            StagingError: The host is out of memory of this kind.
        """
        where: Where = "shared" if self.shares else "private"
        pinned = device and torch.cuda.is_available()
        memory = self._take(nbytes, where, pinned=pinned) or _make(nbytes, where, pinned=pinned)
        lent = memory.array[:nbytes]
        finalize(lent, self._kept.append if keep else _forget, memory).atexit = False
        self._lent = ref(lent)
        return lent, memory

    def _take(self, nbytes: int, where: Where, *, pinned: bool) -> Memory | None:
        if nbytes >= _WORTH_WAITING and self._lent and self._lent() is not None:
            sleep(_RETURNING_S)  # DCP's thread drops its state a moment after it reports that the save is done
        with suppress(IndexError):
            memory = self._kept.pop()
            if memory.process != os.getpid():  # after a fork, shared memory belongs to the parent
                return None
            if (memory.where, memory.pinned) == (where, pinned) and nbytes <= len(memory.array) <= _SPARE * nbytes:
                return memory
        return None


def _forget(memory: Memory) -> None:
    """Drop the last reference to pages that are not kept."""


POOL = Pool()
"""The pool of this process."""


def shared_memory(nbytes: int) -> Memory:
    """Return memory that another process can map; it is not in a file system, so no limit of `/dev/shm` applies.

    Raises:
        OSError: The system does not support it, or has not enough.
        AttributeError: This Python does not support it.
    """
    file = os.memfd_create("dcp_storage staging", os.MFD_CLOEXEC)
    try:
        os.ftruncate(file, nbytes)
        memory = Memory(map_shared(file, nbytes), "shared", file)
    except BaseException:
        os.close(file)
        raise
    finalize(memory, os.close, file).atexit = False
    return memory


def map_shared(file: int, nbytes: int) -> Bytes:
    """Map shared memory that this process or another one created."""
    return np.frombuffer(mmap.mmap(file, nbytes, mmap.MAP_SHARED), np.uint8)


def _make(nbytes: int, where: Where, *, pinned: bool) -> Memory:
    try:
        # Not huge pages: if host memory is fragmented, allocating them takes five times as long.
        made = shared_memory(nbytes) if where == "shared" else Memory(_private(nbytes), where)
        if pinned:
            _pin(made)
    except (OSError, MemoryError, RuntimeError) as error:
        raise StagingError(
            f"the host has no memory for a copy of the state ({nbytes} bytes): use dcp.save, which needs no copy, or "
            f"save with Transfer(keep_staging=False) after the last save has ended ({error})"
        ) from error
    return made


def _private(nbytes: int) -> Bytes:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu").numpy()


def _pin(memory: Memory) -> None:
    """Pin memory until it is freed: torch would round its size up to a power of two."""
    _touch(memory.array)
    finalize(memory, pin(memory.array.ctypes.data, len(memory.array))).atexit = False
    memory.pinned = True


def _touch(array: Bytes) -> None:
    """Make the system allocate all pages, in several threads: CUDA would use one."""
    starts = range(0, len(array), _TOUCHED_BYTES)

    def touch(start: int) -> None:
        array[start : start + _TOUCHED_BYTES : mmap.PAGESIZE] = 0

    with ThreadPoolExecutor(_TOUCHERS) as threads:
        list(threads.map(touch, starts))
