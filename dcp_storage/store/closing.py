"""Closes the resources that an fsspec file system opened; fsspec has no common way to do that."""

import asyncio
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from functools import partial
from typing import Any

from fsspec import AbstractFileSystem


async def close_opened(fs: AbstractFileSystem, given: Mapping[str, Any]) -> None:
    """Close the clients, sessions, connections and threads that a file system opened, but not those that it was given.

    Raises:
        Exception: The first error of a close, after all were attempted.
    """
    errors = [error for close in _closes(fs, given) if (error := await _try(close)) is not None]
    if errors:
        raise errors[0]


def _closes(fs: AbstractFileSystem, given: Mapping[str, Any]) -> Iterator[Callable[[], Any]]:
    theirs = {id(value) for value in given.values()}
    for value in list(vars(fs).values()):
        if isinstance(value, AbstractFileSystem):
            yield from _closes(value, given)
        elif id(value) not in theirs and (close := _close_of(value)):
            yield close
    _forget_finalizers(fs)


def _close_of(held: Any) -> Callable[[], Any] | None:
    if isinstance(held, Executor):
        return partial(held.shutdown, wait=False)
    if isinstance(held, asyncio.AbstractEventLoop | type):
        return None
    if clear := getattr(held, "cache_clear", None):  # functools.cache, around a function that creates clients
        return clear  # type: ignore[no-any-return]
    # gRPC clients are closed through their transport.
    close = getattr(held, "aclose", None) or getattr(held, "close", None)
    close = close or getattr(getattr(held, "transport", None), "close", None)
    return close if inspect.ismethod(close) or inspect.isbuiltin(close) else None


def _forget_finalizers(fs: AbstractFileSystem) -> None:
    """Drop finalizers that would close it again at exit: some keep it in memory until then, and then fail."""
    for finalizer in list(getattr(weakref.finalize, "_registry", ())):
        if (found := finalizer.peek()) and found[0] is fs:
            finalizer.detach()


async def _try(close: Callable[[], Any]) -> Exception | None:
    """Call a close function, in a thread if it blocks."""
    try:
        closing = close() if inspect.iscoroutinefunction(close) else await asyncio.to_thread(close)
        if inspect.isawaitable(closing):
            await closing
    except Exception as error:  # noqa: BLE001 - raised once all are closed
        return error
    return None
