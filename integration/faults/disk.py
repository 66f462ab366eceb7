"""What a disk may hold after a power cut: pure reasoning on a list of operations, in the manner of ALICE (OSDI 2014).

A file's bytes last once the file is synced, a name in a directory once the directory is. Until then each may be there
or not, in any combination: POSIX promises no order. A rename is one step; its two names come and go together.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from integration.faults.faults import Op

Files = Mapping[str, bytes]
"""Relative path to content; a directory is a path that ends with `/`."""

_PAGE_BYTES = 4096
_TRUNCATE = -1


@dataclass(eq=False)
class _Inode:
    """A file: what is on the disk, and the writes (offset, bytes) that are in memory only."""

    durable: bytes
    pending: list[tuple[int, bytes]] = field(default_factory=list)


_Names = dict[str, _Inode]
_Change = list[tuple[str, _Inode | None]]
"""Names that come or go together."""
_Fate = Callable[[_Inode], bytes]


class Disk:
    """A disk and the memory in front of it.

    Args:
        files: What is on the disk for certain at the start.
    """

    def __init__(self, files: Files) -> None:
        self._durable: _Names = {path: _Inode(content) for path, content in files.items()}
        self._cached = dict(self._durable)
        self._pending: list[_Change] = []
        self._made: dict[tuple[_Inode, _Fate], bytes] = {}

    def apply(self, op: Op) -> None:
        """Do one operation."""
        self._made.clear()
        if op.kind == "create":
            self._create(op.path)
        elif op.kind == "write":
            self._cached[op.path].pending.append((op.offset, op.data))
        elif op.kind == "mkdir":
            self._change([(op.path + "/", _Inode(b""))])
        elif op.kind == "unlink":
            self._change([(op.path, None)])
        elif op.kind == "rename":
            self._change([(op.path, None), (op.target, self._cached[op.path])])
        elif op.kind == "fsync":
            self._sync(op.path)

    def states(self, seed: int, samples: int) -> Iterator[dict[str, bytes]]:
        """Yield what the disk may hold if the power fails now: the extremes, and a sample of what lies between."""
        changes, dirty = self._pending, self._dirty()
        prefixes = [changes[:count] for count in range(len(changes) + 1)]
        all_but_one = [changes[:number] + changes[number + 1 :] for number in range(len(changes))]
        for chosen in prefixes + all_but_one:
            for fate in _FATES:
                yield self._state(chosen, dict.fromkeys(dirty, fate))
        for inode in dirty:
            for fate in _FATES[1:]:
                yield self._state(changes, {inode: fate})
        chance = random.Random(seed)
        fates = (*_FATES, _holes(chance))
        for _ in range(samples if changes or dirty else 0):
            some = [change for change in changes if chance.random() < 0.5]
            yield self._state(some, {inode: chance.choice(fates) for inode in dirty})

    def _create(self, path: str) -> None:
        if path in self._cached:
            self._cached[path].pending.append((_TRUNCATE, b""))
        else:
            self._change([(path, _Inode(b""))])

    def _change(self, change: _Change) -> None:
        self._pending.append(change)
        _bind(self._cached, change)

    def _sync(self, path: str) -> None:
        if path in self._cached:
            inode = self._cached[path]
            inode.durable, inode.pending = _kept(inode), []
            return
        here = "" if path == "." else path + "/"
        for change in list(self._pending):
            if any(_parent(name) == here for name, _ in change):
                _bind(self._durable, change)
                self._pending.remove(change)

    def _dirty(self) -> list[_Inode]:
        """Return the files with bytes that are not synced, under whatever name."""
        named = [inode for change in self._pending for _, inode in change]
        inodes = dict.fromkeys([*self._durable.values(), *self._cached.values(), *filter(None, named)])
        return [inode for inode in inodes if inode.pending]

    def _state(self, chosen: Sequence[_Change], fates: Mapping[_Inode, _Fate]) -> dict[str, bytes]:
        names = dict(self._durable)
        for change in chosen:
            _bind(names, change)
        return {
            path: self._content(each, fates.get(each, _kept))
            for path, each in names.items()
            if _is_reachable(path, names)
        }

    def _content(self, inode: _Inode, fate: _Fate) -> bytes:
        if fate not in _FATES:
            return fate(inode)
        if (inode, fate) not in self._made:
            self._made[inode, fate] = fate(inode)
        return self._made[inode, fate]


def _bind(names: _Names, change: _Change) -> None:
    for name, inode in change:
        names.pop(name, None)
        if inode is not None:
            names[name] = inode


def _parent(path: str) -> str:
    head, separator, _ = path.rstrip("/").rpartition("/")
    return head + separator


def _is_reachable(path: str, names: _Names) -> bool:
    parent = _parent(path)
    return not parent or (parent in names and _is_reachable(parent, names))


def _kept(inode: _Inode) -> bytes:
    return _written(inode.durable, inode.pending)


def _lost(inode: _Inode) -> bytes:
    return inode.durable


def _torn(inode: _Inode) -> bytes:
    """Half of the bytes that were in memory arrived."""
    room, some = sum(len(data) for _, data in inode.pending) // 2, []
    for offset, data in inode.pending:
        some.append((offset, data[:room]))
        room = max(0, room - len(data))
    return _written(inode.durable, [(offset, data) for offset, data in some if data or offset == _TRUNCATE])


def _zeros(inode: _Inode) -> bytes:
    """The length arrived, the bytes did not."""
    return _written(inode.durable, [(offset, bytes(len(data))) for offset, data in inode.pending])


_FATES: tuple[_Fate, ...] = (_kept, _lost, _torn, _zeros)


def _holes(chance: random.Random) -> _Fate:
    """Some pages arrived."""

    def holes(inode: _Inode) -> bytes:
        content = bytearray(_kept(inode))
        for start in range(len(inode.durable) // _PAGE_BYTES * _PAGE_BYTES, len(content), _PAGE_BYTES):
            if chance.random() < 0.3:
                content[start : start + _PAGE_BYTES] = bytes(len(content[start : start + _PAGE_BYTES]))
        return bytes(content)

    return holes


def _written(content: bytes, writes: Sequence[tuple[int, bytes]]) -> bytes:
    file = bytearray(content)
    for offset, data in writes:
        if offset == _TRUNCATE:
            file.clear()
            continue
        file.extend(bytes(max(0, offset - len(file))))
        file[offset : offset + len(data)] = data
    return bytes(file)
