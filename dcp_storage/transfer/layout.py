"""Which bytes of which item go into which object: pure planning of a save."""

from collections.abc import Sequence

from msgspec import Struct

from dcp_storage.collector import uncollected
from dcp_storage.config import MIB

MIN_OBJECT_BYTES = 8 * MIB
"""Smaller objects cost a request (or a file and its fsync) more than they gain in parallelism."""


class Piece(Struct, frozen=True, order=True, gc=False):
    """Bytes `start` to `stop` of an item: whole blocks, and the start of a block."""

    item: int
    start: int
    stop: int


def target_bytes(total: int, object_bytes: int, concurrency: int, least: int | None = None) -> int:
    """Return how much raw data an object should hold so that every worker has one, within the limits.

    `least` is for what may be smaller than objects: requests to a disk.
    """
    share = -(-total // concurrency)
    # A little more than its share: objects end with whole blocks, and what is left over would be one more.
    return min(object_bytes, max(MIN_OBJECT_BYTES if least is None else least, share + share // 8))


@uncollected
def lay_out(sizes: Sequence[int], block_bytes: int, target: int) -> list[list[Piece]]:
    """Fill objects with the items of these sizes, in order, to `target` raw bytes each; large items span several.

    Each item's pieces are in order and cover it; items of no bytes have none. Every object but the last holds more than
    `target - block_bytes` bytes, and none holds more than `max(target, block_bytes)`.
    """
    objects: list[list[Piece]] = []
    room = 0
    for item, size in enumerate(sizes):
        start = 0
        while start < size:
            fits = size - start if size - start <= room else room // block_bytes * block_bytes
            if not fits:
                objects.append([])
                room = max(target, block_bytes)
                continue
            objects[-1].append(Piece(item, start, start + fits))
            start, room = start + fits, room - fits
    return objects


@uncollected
def split_units(pieces: Sequence[Piece], block_bytes: int, unit_bytes: int) -> list[list[Piece]]:
    """Cut an object's pieces, in order, into units of about `unit_bytes`: what one thread encodes at a time."""
    units: list[list[Piece]] = [[]]
    room = unit_bytes
    stride = max(block_bytes, unit_bytes // block_bytes * block_bytes)
    for piece in pieces:
        for start in range(piece.start, piece.stop, stride):
            stop = min(start + stride, piece.stop)
            if units[-1] and stop - start > room:
                units.append([])
                room = unit_bytes
            units[-1].append(Piece(piece.item, start, stop))
            room -= stop - start
    return units
