"""Stores that fail on demand, like a full disk, missing permissions or a broken network."""

import builtins
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeVar

from dcp_storage.checkpoint.place import Opener
from dcp_storage.format.names import ObjectName
from dcp_storage.store.base import Batch, ObjectInfo, Room, Store
from dcp_storage.store.open import open_store
from dcp_storage.store.urls import Address

R = TypeVar("R")


class Operation(NamedTuple):
    """An operation of a store: its method, the prefix, and the object (empty for the whole prefix)."""

    method: str
    url: str
    name: str


Hook = Callable[[Operation], Awaitable[None]]
"""Called around operations; the operation raises whatever it raises."""


async def _nothing(operation: Operation) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Faulty:
    """Opens stores that call hooks around their operations.

    ```python
    async def full(operation):
        if operation.method == "put":
            raise StoreError(f"{operation.url}: no space left on device")

    writer = AsyncStorageWriter(Location("/runs/step-1", opener=Faulty(before=full)))
    ```

    Attributes:
        before: Called before each operation.
        after: Called after each operation that succeeded.
        opener: Opens the stores that do the work.
    """

    before: Hook = _nothing
    after: Hook = _nothing
    opener: Opener = open_store

    def __call__(
        self, path: Address, storage_options: Mapping[str, Any] | None = None, *, sync_files: bool = True
    ) -> "FaultyStore":
        """Open a store: an instance is an `Opener`."""
        return FaultyStore(self.opener(path, storage_options, sync_files=sync_files), self)


class FaultyStore(Store):
    """A store that calls the hooks of a `Faulty` around each operation, and leaves the work to another store."""

    def __init__(self, store: Store, faulty: Faulty) -> None:
        self._store = store
        self._faulty = faulty
        self.url = store.url
        self.remote, self.put_bytes, self.read_bytes = store.remote, store.put_bytes, store.read_bytes

    async def __aenter__(self) -> Self:
        await self._store.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._store.__aexit__(*exc_info)

    def child(self, name: str) -> "FaultyStore":
        """Return the store of a prefix below, with the same hooks."""
        return FaultyStore(self._store.child(name), self._faulty)

    async def _told(self, method: str, name: str, work: Callable[[], Awaitable[R]]) -> R:
        operation = Operation(method, self.url, name)
        await self._faulty.before(operation)
        done = await work()
        await self._faulty.after(operation)
        return done

    async def is_link(self) -> bool:
        """Call the hooks and the store."""
        return await self._told("is_link", "", self._store.is_link)

    async def remove_directory(self) -> None:
        """Call the hooks and the store."""
        await self._told("remove_directory", "", self._store.remove_directory)

    async def put(self, name: ObjectName, batches: AsyncIterable[Batch]) -> int:
        """Call the hooks and the store."""
        return await self._told("put", name, lambda: self._store.put(name, batches))

    async def commit(self, name: ObjectName, data: bytes, over: str | None = None) -> None:
        """Call the hooks and the store."""
        await self._told("commit", name, lambda: self._store.commit(name, data, over))

    async def probe(self, name: ObjectName) -> bool:
        """Call the hooks and the store."""
        return await self._told("probe", name, lambda: self._store.probe(name))

    async def version(self, name: ObjectName) -> str | None:
        """Call the hooks and the store."""
        return await self._told("version", name, lambda: self._store.version(name))

    async def get(self, name: ObjectName) -> bytes:
        """Call the hooks and the store."""
        return await self._told("get", name, lambda: self._store.get(name))

    async def get_range(self, name: ObjectName, start: int, stop: int, room: Room | None = None) -> bytes | memoryview:
        """Call the hooks and the store."""
        return await self._told("get_range", name, lambda: self._store.get_range(name, start, stop, room))

    async def size(self, name: ObjectName) -> int:
        """Call the hooks and the store."""
        return await self._told("size", name, lambda: self._store.size(name))

    async def list(self) -> dict[ObjectName, ObjectInfo]:
        """Call the hooks and the store."""
        return await self._told("list", "", self._store.list)

    async def directories(self) -> builtins.list[str]:
        """Call the hooks and the store."""
        return await self._told("directories", "", self._store.directories)

    async def delete(self, names: Sequence[ObjectName]) -> None:
        """Call the hooks and the store for each object."""
        for name in names:
            await self._told("delete", name, lambda name=name: self._store.delete([name]))  # type: ignore[misc]
