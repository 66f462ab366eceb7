"""Reused memory for encoding and fetching: new pages cost page faults."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Buffers:
    """The buffers of one call: as many as are held at once, each as large as the largest requested."""

    def __init__(self) -> None:
        self._size = 0
        self._free: list[memoryview] = []

    @contextmanager
    def hold(self, size: int) -> Iterator[memoryview]:
        """Lend at least `size` bytes (1 or more), page-aligned.

        After an error they are not reused: a thread may still be writing to them.
        """
        self._size = max(self._size, size)
        memory = self._free.pop() if self._free else memoryview(b"")
        if len(memory) < size:
            memory = memoryview(_map(self._size))
        yield memory
        self._free.append(memory)


def _map(size: int) -> mmap.mmap:
    """Map private memory, in huge pages if Linux has them: one page fault instead of 512."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # this kernel has none
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
