"""Hooks of `Faulty`: what happens before or after the operations of one method of a store."""

import errno
import threading
from collections import Counter

from dcp_storage.checkpoint.place import Location
from dcp_storage.errors import StoreError
from dcp_storage.store.local import LocalStore
from dcp_storage.testing.faulty import Faulty

LIMIT_S = 60


def hooked(path, storage_options=None, **hooks):
    """Return the location of a path whose operations are told to hooks, `before` or `after`."""
    return Location(path, storage_options, opener=Faulty(**hooks))


def fail(operation):
    """Raise what a full disk makes a store raise."""
    cause = OSError(errno.ENOSPC, "no space left")
    raise StoreError(f"{operation.url}: no space left", url=operation.url) from cause


class On:
    """Acts on each operation of a method, or on those of some numbers (from 1), as long as it is active."""

    def __init__(self, method, act, *numbers):
        self.active, self.seen = True, 0
        self._method, self._act, self._numbers = method, act, numbers

    async def __call__(self, operation):
        if self.active and operation.method == self._method:
            self.seen += 1
            if not self._numbers or self.seen in self._numbers:
                self._act(operation)


class Gate(On):
    """Holds back the operations of a method until it is opened."""

    def __init__(self, method="commit", *numbers):
        super().__init__(method, self._wait, *numbers)
        self.reached, self.opened = threading.Event(), threading.Event()

    def _wait(self, _):
        self.reached.set()
        self.opened.wait(LIMIT_S)


class _Flaky(LocalStore):
    def __init__(self, path, reads):
        super().__init__(path)
        self._reads, self._seen = reads, Counter()

    async def get_range(self, name, start, stop, room=None):
        data = await super().get_range(name, start, stop, room)
        if ".distcp" not in name:
            return data
        bad = memoryview(bytearray(data) if isinstance(data, bytes) else data)
        for at in range(-start % 97, len(bad), 97):
            self._seen[name, start + at] += 1
            bad[at] ^= self._seen[name, start + at] <= self._reads
        return bad


def flaky(path, reads=1):
    """Return the location of a directory where every 97th byte of an object is damaged in its first reads."""
    return Location(path, opener=lambda path, *_, **__: _Flaky(path, reads))
