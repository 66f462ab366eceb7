"""What the writer and the reader share: one call's event loop, store and observer."""

import os
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from dcp_storage.errors import ConfigError
from dcp_storage.observe import Observer, silent
from dcp_storage.progress import progress_bar
from dcp_storage.store.base import Store
from dcp_storage.store.open import open_store
from dcp_storage.store.redact import strip_userinfo
from dcp_storage.store.urls import Address, options_of, resolve
from dcp_storage.transfer.workers import run_async

R = TypeVar("R")
Path = Address


@dataclass(frozen=True)
class Location:
    """Where a checkpoint is and how to get there: plain values, so that it pickles."""

    path: Path
    storage_options: Mapping[str, Any] | None
    sync_files: bool = True

    def __post_init__(self) -> None:
        if carried := options_of(self.path):
            object.__setattr__(self, "storage_options", {**carried, **(self.storage_options or {})})
        object.__setattr__(self, "path", resolve(self.path))  # once: the program may change its directory
        self.store()  # an unknown protocol is better refused now than when the first checkpoint is due

    def __repr__(self) -> str:
        return f"Location({self.store().url!r})"

    @property
    def shown(self) -> Path:
        """The path or URL, without credentials."""
        return self.path if isinstance(self.path, os.PathLike) else strip_userinfo(self.path)

    def store(self) -> Store:
        """Return the store at this place, not yet open."""
        return open_store(self.path, self.storage_options, sync_files=self.sync_files)

    def run(self, call: Callable[[Store], Coroutine[Any, Any, R]]) -> R:
        """Run `call` with an open store, in an event loop of its own, and close both."""

        async def with_store() -> R:
            async with self.store() as store:
                return await call(store)

        return run_async(with_store())


def choose_observer(observer: Observer | None, *, progress: bool) -> Observer:
    """Return the observer that a writer or reader is to tell.

    Raises:
        ConfigError: It cannot be called.
    """
    if observer is not None and not callable(observer):
        raise ConfigError(
            f"the observer {observer!r} cannot be called: give a function of operation, URL and bytes that returns a "
            "context manager"
        )
    return progress_bar(observer or silent) if progress else observer or silent
