"""A place for a store under test, and shortcuts to use the store there."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dcp_storage.format.names import MANIFEST, ObjectName, data_object
from dcp_storage.store.base import Batch, Store
from dcp_storage.store.open import open_store

R = TypeVar("R")

NAMES = [
    data_object("0a1b2c3d4e5f6071", 0, 0, ".distcp.zst"),
    data_object("0a1b2c3d4e5f6071", 1023, 65535, ".distcp.zst"),
    MANIFEST,
    ObjectName("__3.metadata"),
]
"""Names of a checkpoint's objects."""
NAME = NAMES[0]
OTHER = ObjectName("other.distcp.zst")


@dataclass(frozen=True)
class Place:
    """An empty prefix, as arguments of `open_store`."""

    url: str
    storage_options: dict[str, Any] = field(default_factory=dict)

    def open(self, **config_kwargs: Any) -> Store:
        """Return the store; keyword arguments become botocore's settings."""
        extra = {"config_kwargs": config_kwargs} if config_kwargs else {}
        return open_store(self.url, self.storage_options | extra)

    def beside(self, url: str, **options: Any) -> "Place":
        """Return another place on the same server."""
        return Place(url, self.storage_options | options)


async def batches_of(*batches: Batch) -> AsyncIterator[Batch]:
    """Yield batches, each in a separate iteration of the event loop."""
    for batch in batches:
        await asyncio.sleep(0)
        yield batch


def run(place: Place, use: Callable[[Store], Awaitable[R]]) -> R:
    """Open the store in a fresh event loop, use it and close it."""

    async def main() -> R:
        async with place.open() as store:
            return await use(store)

    return asyncio.run(main(), debug=False)


async def put(store: Store, name: ObjectName, data: bytes) -> int:
    """Put an object of one batch."""
    return await store.put(name, batches_of(data))


async def sizes(store: Store) -> dict[ObjectName, int]:
    """Return the names of the objects that a store lists, and their sizes in bytes."""
    return {name: listed.size for name, listed in (await store.list()).items()}
