"""Raw bytes in memory."""

import ctypes

from numpy import copyto, frombuffer, may_share_memory, uint8

Raw = bytes | bytearray | memoryview


def copy_bytes(raw: Raw, out: memoryview) -> None:
    """Copy without the GIL, unless the bytes were read into place."""
    source, target = frombuffer(raw, uint8), frombuffer(out, uint8)
    if not may_share_memory(source, target):
        copyto(target, source)


def address_of(memory: Raw) -> int:
    """Return the address of memory, for C libraries. The caller must keep the memory alive."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(memory))
    except TypeError:  # read-only memory
        return int(frombuffer(memory, uint8).ctypes.data)
