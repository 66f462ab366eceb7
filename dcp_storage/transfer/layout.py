"""Which bytes of which item go into which object: pure planning of a save."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from msgspec import Struct

from dcp_storage.collector import gc_paused
from dcp_storage.config import MIB

MIN_OBJECT_BYTES = 8 * MIB
"""Smaller objects cost a request (or a file and its fsync) more than they gain in parallelism."""


class Piece(Struct, frozen=True, order=True, gc=False):
    """Bytes `start` to `stop` of an item: whole blocks, from the start of one."""

    item: int
    start: int
    stop: int


def target_bytes(total: int, object_bytes: int, concurrency: int, least: int | None = None) -> int:
    """Return how much raw data an object should hold so that every worker has one, within the limits.

    `least` is for requests to a disk, which may be smaller than objects.
    """
    share = -(-total // concurrency)
    # A little more than its share: objects end with whole blocks, and the rest would need one more object.
    return min(object_bytes, max(MIN_OBJECT_BYTES if least is None else least, share + share // 8))


@gc_paused
def lay_out(sizes: Sequence[int], block_bytes: int, target: int, groups: Sequence[str] = ()) -> list[list[Piece]]:
    """Fill objects with items of these sizes, in order, up to `target` raw bytes each; large items span several.

    Each item's pieces are in order and cover it; empty items have none. Every object but the last of a group
    holds more than `target - block_bytes` bytes, and none holds more than `max(target, block_bytes)`.

    `groups` names the group of each item, if there are any: items of at least one block share no object with those of
    another group, so that a group can be deleted by deleting its objects.
    """
    objects: list[list[Piece]] = []
    for members in _members(sizes, block_bytes, groups):
        objects += _fill(members, sizes, block_bytes, target)
    return objects


def _members(sizes: Sequence[int], block_bytes: int, groups: Sequence[str]) -> list[list[int]]:
    """Return the items of each group that has a large one; those of the other groups join the last of these."""
    if not groups:
        return [list(range(len(sizes)))]
    members: defaultdict[str, list[int]] = defaultdict(list)
    for item, group in enumerate(groups):
        members[group].append(item)
    large = [each for each in members.values() if any(sizes[item] >= block_bytes for item in each)]
    small = [item for each in members.values() if each not in large for item in each]
    return [*large[:-1], [*(large[-1] if large else []), *small]]


def _fill(members: Iterable[int], sizes: Sequence[int], block_bytes: int, target: int) -> list[list[Piece]]:
    objects: list[list[Piece]] = []
    room = 0
    for item in members:
        start, size = 0, sizes[item]
        while start < size:
            fits = size - start if size - start <= room else room // block_bytes * block_bytes
            if not fits:
                objects.append([])
                room = max(target, block_bytes)
                continue
            objects[-1].append(Piece(item, start, start + fits))
            start, room = start + fits, room - fits
    return objects


@gc_paused
def split_units(pieces: Sequence[Piece], block_bytes: int, unit_bytes: int) -> list[list[Piece]]:
    """Split an object's pieces, in order, into units of about `unit_bytes`, which a thread encodes at a time."""
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
