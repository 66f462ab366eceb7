"""Memory to encode in and fetch into, which is reused: new pages cost page faults."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Buffers:
    """The buffers of one call: as many as are held at once, each as large as the largest that was asked for."""

    def __init__(self) -> None:
        self._size = 0
        self._free: list[memoryview] = []

    @contextmanager
    def hold(self, size: int) -> Iterator[memoryview]:
        """Lend at least `size` bytes (1 or more), which begin at a page.

        After an error they are not lent again: a thread may still be writing to them.
        """
        self._size = max(self._size, size)
        memory = self._free.pop() if self._free else memoryview(b"")
        if len(memory) < size:
            memory = memoryview(_map(self._size))
        yield memory
        self._free.append(memory)


def _map(size: int) -> mmap.mmap:
    """Map memory of this process alone, in huge pages where Linux has them: one fault stands for 512."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # this kernel has none
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
