"""`Store`: the few operations that a checkpoint needs from a storage system, below one prefix."""

import builtins
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, Mapping, Sequence
from typing import NamedTuple, Self

from dcp_storage.config import KIB
from dcp_storage.errors import ObjectNotFound, StoreError
from dcp_storage.format.names import ObjectName

Batch = bytes | memoryview
"""Bytes of an object, in order. Their memory is reused once the next batch is requested."""

ABSENT = ""
"""The version of an object that does not exist."""

PAGE_BYTES = 4 * KIB
"""Batches that begin and end at page boundaries, in memory and in the object, reach local disks without a copy."""


class Room(NamedTuple):
    """Memory for a read.

    Attributes:
        pages: Page-aligned memory, at least as large as `room_bytes` of the size of the read.
        final: The destination of the bytes, if they go there unchanged; as long as the read.
        shared: Whether other processes on this machine read the same bytes at about the same time.
    """

    pages: memoryview
    final: memoryview | None = None
    shared: bool = False


class ObjectInfo(NamedTuple):
    """An object in a listing.

    Attributes:
        size: Size in bytes.
        modified: When it was last written, in seconds since the epoch by the store's clock, or `None` if the storage
            system does not report it.
    """

    size: int
    modified: float | None


def times_of(url: str, listed: Mapping[ObjectName, ObjectInfo]) -> dict[ObjectName, float]:
    """Return when each object of a listing was last written.

    Raises:
        StoreError: The storage system does not report it.
    """
    times: dict[ObjectName, float] = {}
    for name, each in listed.items():
        if each.modified is None:
            raise StoreError(
                f"cannot find the age of {url.rstrip('/')}/{name}: this file system does not report write times",
                url=url,
                object_name=name,
            )
        times[name] = each.modified
    return times


def room_bytes(nbytes: int) -> int:
    """Return the size of the pages that a read of this many bytes needs, at any offset."""
    return nbytes + 2 * PAGE_BYTES


class Store(ABC):
    """The objects below one prefix (a directory, an S3 key prefix).

    Object names (`ObjectName`) are flat: no `/`. A store is opened for one call and one event loop, as an async context
    manager that closes its connections; it is never pickled and never shared between loops. Operations may run
    concurrently.

    A method that fails raises `StoreError`, or its subclasses `ObjectNotFound` if an object does not exist and
    `AccessDenied` if permissions are missing; the error names the URL. It leaves no partly written object under the
    given name: local files are removed, and a PUT is atomic.

    Attributes:
        url: The URL of the prefix, for messages; never with credentials.
        put_bytes: The preferred maximum size of an object.
        read_bytes: The preferred maximum size of a single read.
        remote: Whether operations wait for a network, whose latency more operations in flight hide.
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

    async def is_link(self) -> bool:
        """Return whether this prefix is a symbolic link to a directory, which belongs to something else."""
        return False

    async def remove_directory(self) -> None:  # noqa: B027 - not every store has directories
        """Remove this prefix's directory if it is empty; do nothing if prefixes are only names."""

    @abstractmethod
    async def put(self, name: ObjectName, batches: AsyncIterable[Batch]) -> int:
        """Write a new object from its batches, in order, and return its size in bytes.

        The object is durable when this returns (on local disk except for its directory entry, which `commit` syncs).
        No object of that name may exist yet; callers use unique names.
        """

    @abstractmethod
    async def commit(self, name: ObjectName, data: bytes, over: str | None = None) -> None:
        """Atomically create or replace an object, and make it durable with everything put before it.

        A concurrent reader sees the whole old object or the whole new one. `over` is the only version that may be
        replaced, or `ABSENT`; if several callers give the same one, only one succeeds.

        Raises:
            ObjectExists: Another version exists, with different bytes.
        """

    async def probe(self, name: ObjectName) -> bool:
        """Return whether an object exists, before data moves; raise an error if a commit could not replace it.

        It finds what it can without writing anything. If the storage system does not reveal whether an object exists
        (S3, without permission to list), the object counts as absent, and the commit's condition decides.
        """
        try:
            await self.get_range(name, 0, 1)
        except ObjectNotFound:
            return False
        return True

    async def version(self, name: ObjectName) -> str | None:  # noqa: ARG002 - not every store has versions
        """Return the version of an object, for `commit`; `None` if the system has no versions."""
        return None

    @abstractmethod
    async def get(self, name: ObjectName) -> bytes:
        """Return a whole object."""

    @abstractmethod
    async def get_range(self, name: ObjectName, start: int, stop: int, room: Room | None = None) -> bytes | memoryview:
        """Return bytes `start` to `stop` (exclusive) of an object, or fewer if the object ends before `stop`.

        `0 <= start < stop`. The result is empty if the object ends before `start`. A store that has to copy reads into
        `room` and returns the part that it filled, of `room.final` if that is given. Other stores ignore `room`.
        """

    @abstractmethod
    async def size(self, name: ObjectName) -> int:
        """Return the size of an object in bytes."""

    @abstractmethod
    async def list(self) -> dict[ObjectName, ObjectInfo]:
        """Return every object directly below the prefix, by name; an empty dict if there is none."""

    async def directories(self) -> builtins.list[str]:
        """Return the names of the prefixes directly below this one, if the storage system has such prefixes."""
        return []

    async def modified(self) -> dict[ObjectName, float]:
        """Return when each object that `list` returns was last written; see `times_of`."""
        return times_of(self.url, await self.list())

    @abstractmethod
    async def delete(self, names: Sequence[ObjectName]) -> None:
        """Delete objects; it is not an error if one does not exist."""
