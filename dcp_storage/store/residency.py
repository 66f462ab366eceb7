"""Finds how much of a file the page cache holds."""

import ctypes
import mmap
import os

_RESIDENT = bytes(value & 1 for value in range(256))
"""Only the lowest bit of a page's byte shows whether it is cached."""

_libc = ctypes.CDLL(None, use_errno=True)


def cached_bytes(descriptor: int, start: int, nbytes: int) -> int:
    """Return how many of the bytes from `start` on are in the page cache, up to the first that is not.

    It returns `nbytes` if the system does not report this. The system reports a file that this user neither owns nor
    may write as cached.
    """
    before = start % mmap.ALLOCATIONGRANULARITY
    try:
        length = min(start + nbytes, os.fstat(descriptor).st_size) - (start - before)
        pages = _resident(descriptor, start - before, length)
    except (OSError, ValueError):  # it cannot be mapped, or was truncated just now
        return nbytes
    first = before // mmap.PAGESIZE
    missing = pages.find(0, first)
    return nbytes if missing < 0 else max(0, missing * mmap.PAGESIZE - before)


def _resident(descriptor: int, start: int, nbytes: int) -> bytes:
    """Return 1 for each page that is cached, and 0 for each that is not."""
    with mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_COPY, offset=start) as mapped:
        pages = ctypes.create_string_buffer(-(-nbytes // mmap.PAGESIZE))
        memory = ctypes.c_char.from_buffer(mapped)
        failed = _libc.mincore(ctypes.byref(memory), ctypes.c_size_t(nbytes), pages)
        del memory  # otherwise the map could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return pages.raw.translate(_RESIDENT)
