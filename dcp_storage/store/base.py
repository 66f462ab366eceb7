"""`Store`: the few operations below one prefix that a checkpoint needs of a storage system."""

import builtins
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, Mapping, Sequence
from typing import NamedTuple, Self

from dcp_storage.config import KIB
from dcp_storage.errors import ObjectNotFound, StoreError

Batch = bytes | memoryview
"""Bytes of an object, in order. Their memory is used again once the next batch is asked for."""

ABSENT = ""
"""The version of an object that is not there."""

PAGE_BYTES = 4 * KIB
"""Batches that begin and end at pages, in memory and in the object, reach local disks without a copy."""


class Room(NamedTuple):
    """Memory for a read.

    Attributes:
        pages: Begins at a page, and holds at least `room_bytes` of the bytes that are read.
        final: Where they belong as they are, if anywhere; as long as the read.
        shared: Whether other processes of this machine read the same at about the same time.
    """

    pages: memoryview
    final: memoryview | None = None
    shared: bool = False


class ObjectInfo(NamedTuple):
    """An object in a listing.

    Attributes:
        size: In bytes.
        modified: When it was last written, in seconds since the epoch by the store's clock, or `None` where the storage
            system does not tell.
    """

    size: int
    modified: float | None


def times_of(url: str, listed: Mapping[str, ObjectInfo]) -> dict[str, float]:
    """Return when each object of a listing was last written.

    Raises:
        StoreError: The storage system does not tell.
    """
    times: dict[str, float] = {}
    for name, each in listed.items():
        if each.modified is None:
            raise StoreError(
                f"cannot find the age of {url.rstrip('/')}/{name}: this file system does not tell when it was written",
                url=url,
                object_name=name,
            )
        times[name] = each.modified
    return times


def room_bytes(nbytes: int) -> int:
    """Return the size of the pages that a read of so many bytes needs, wherever it begins."""
    return nbytes + 2 * PAGE_BYTES


class Store(ABC):
    """The objects below one prefix (a directory, an S3 key prefix).

    Object names are flat: no `/`. A store is opened for one call and one event loop, as an async context manager that
    closes its connections; it is never pickled and never shared between loops. Operations may run concurrently.

    Every method raises `StoreError`, or its subclasses `ObjectNotFound` where an object is absent and `AccessDenied`
    where rights are missing, and names the URL in it. No method leaves a partly written object under the name it was
    given when it fails: local files are removed, and a PUT is atomic.

    Attributes:
        url: Where the prefix is, for messages; never with credentials.
        put_bytes: The largest size that objects are best put in.
        read_bytes: The largest size that is best read at once.
        remote: Whether operations wait for a network, which more of them in flight hide.
    """

    url: str
    put_bytes: int
    read_bytes: int
    remote: bool

    @abstractmethod
    async def __aenter__(self) -> Self: ...

    @abstractmethod
    async def __aexit__(self, *exc_info: object) -> None: ...

    @abstractmethod
    def child(self, name: str) -> "Store":
        """Return the store of a prefix directly below this one, which is open as long as this one is."""

    async def remove_directory(self) -> None:  # noqa: B027 - where there are directories
        """Remove this prefix's directory if it is empty; do nothing where prefixes are only names."""

    @abstractmethod
    async def put(self, name: str, batches: AsyncIterable[Batch]) -> int:
        """Write a new object from its batches, in order, and return its size in bytes.

        The object is durable when this returns (on local disk: but for its directory entry, which `commit` syncs).
        An object of that name must not exist yet; the caller's names are unique.
        """

    @abstractmethod
    async def commit(self, name: str, data: bytes, over: str | None = None) -> None:
        """Atomically create or replace an object, durable together with everything put before it.

        A concurrent reader sees the whole old object or the whole new one. `over` is the only version that may be
        replaced, or `ABSENT`; of several callers that name the same one, one succeeds.

        Raises:
            ObjectExists: There is another version, of other bytes.
        """

    async def probe(self, name: str) -> bool:
        """Return whether an object is there, before data moves; raise what would keep a commit from replacing it.

        As far as that can be told without writing anything. Where the storage system does not say whether something is
        there (S3, to those who may not list), it is taken for absent, and the commit's condition decides.
        """
        try:
            await self.get_range(name, 0, 1)
        except ObjectNotFound:
            return False
        return True

    async def version(self, name: str) -> str | None:  # noqa: ARG002 - where there are versions
        """Return the version of an object, for `commit`; `None` where the system has none."""
        return None

    @abstractmethod
    async def get(self, name: str) -> bytes:
        """Return a whole object."""

    @abstractmethod
    async def get_range(self, name: str, start: int, stop: int, room: Room | None = None) -> bytes | memoryview:
        """Return bytes `start` to `stop` (exclusive) of an object, or fewer where the object ends before `stop`.

        `0 <= start < stop`. An object that ends before `start` gives nothing. A store that has to copy reads into
        `room`, and returns what it filled: of `room.final`, if that is given. Any other store leaves it alone.
        """

    @abstractmethod
    async def size(self, name: str) -> int:
        """Return the size of an object in bytes."""

    @abstractmethod
    async def list(self) -> dict[str, ObjectInfo]:
        """Return every object directly below the prefix, by name; nothing where there is none."""

    async def directories(self) -> builtins.list[str]:
        """Return the names of the prefixes directly below this one, as far as the storage system knows any."""
        return []

    async def modified(self) -> dict[str, float]:
        """Return when each object that `list` returns was last written; see `times_of`."""
        return times_of(self.url, await self.list())

    @abstractmethod
    async def delete(self, names: Sequence[str]) -> None:
        """Delete objects; one that is absent already is not an error."""
