"""`Location`: where a checkpoint is and how to access it; every save, load, check and clean-up begins with one."""

import os
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, Protocol, TypeVar

from dcp_storage.config import require_type
from dcp_storage.errors import ConfigError
from dcp_storage.store.base import Store
from dcp_storage.store.open import open_store
from dcp_storage.store.redact import strip_userinfo
from dcp_storage.store.urls import Address, options_of, resolve
from dcp_storage.transfer.workers import run_async

R = TypeVar("R")


class Opener(Protocol):
    """Creates stores, like `open_store`. It must be picklable for `async_save` in a process."""

    def __call__(
        self, path: Address, storage_options: Mapping[str, Any] | None = None, *, sync_files: bool = True
    ) -> Store:
        """Return a store that is not yet open."""


@dataclass(frozen=True)
class Location:
    """Where one checkpoint is, or a directory of them. Plain values, so that it can be pickled.

    All functions that take a path also take a `Location`, and open its stores with `opener`.

    Attributes:
        path: A local path, made absolute, or a URL.
        storage_options: Options of the URL's fsspec file system, including those of a path object.
        sync_files: Whether local files are synced to the disk.
        opener: Creates the store.
        url: The URL as a string, without credentials, for messages.

    Raises:
        ConfigError: No store can be created for it: an unknown protocol, options for a local path.
    """

    path: Address
    storage_options: Mapping[str, Any] | None = None
    sync_files: bool = True
    opener: Opener = open_store
    url: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if self.storage_options is not None:
            require_type("storage_options", self.storage_options, Mapping)
        if carried := options_of(self.path):
            object.__setattr__(self, "storage_options", {**carried, **(self.storage_options or {})})
        object.__setattr__(self, "path", resolve(self.path))  # now: the program may change its directory
        # An unknown protocol is refused now, not when the first checkpoint is due.
        object.__setattr__(self, "url", self.store().url)

    def __repr__(self) -> str:
        return f"Location({self.url!r})"

    @classmethod
    def of(
        cls,
        place: "Address | Location",
        storage_options: Mapping[str, Any] | None = None,
        *,
        sync_files: bool = True,
    ) -> "Location":
        """Return the location of a path, or the given location.

        Raises:
            ConfigError: Options are given with a location, which has its own.
        """
        if not isinstance(place, Location):
            return cls(place, storage_options, sync_files)
        if storage_options or not sync_files:
            raise ConfigError(f"{place.url}: the Location has its own options; pass these to it")
        return place

    @property
    def shown(self) -> Address:
        """The path or URL, without credentials."""
        return self.path if isinstance(self.path, os.PathLike) else strip_userinfo(self.path)

    def child(self, name: str) -> "Location":
        """Return the location of a directory directly below this one."""
        below = self.path / name if isinstance(self.path, PurePath) else f"{str(self.path).rstrip('/')}/{name}"
        return replace(self, path=below)

    def store(self) -> Store:
        """Return the store at this location, not yet open."""
        return self.opener(self.path, self.storage_options, sync_files=self.sync_files)

    def run(self, call: Callable[[Store], Coroutine[Any, Any, R]]) -> R:
        """Run `call` with an open store, in a new event loop, and close both."""

        async def with_store() -> R:
            async with self.store() as store:
                return await call(store)

        return run_async(with_store())
