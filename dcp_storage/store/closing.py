"""Closes what an fsspec file system opened: its classes have no one way to be asked for that."""

import asyncio
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from fsspec import AbstractFileSystem


async def close_opened(fs: AbstractFileSystem, given: Mapping[str, Any]) -> None:
    """Close the clients, sessions and connections that a file system holds, but for those that it was given.

    Raises:
        Exception: The first that a close raised, after all were tried.
    """
    errors = [error for held in _held(fs, given) if (error := await _close(held)) is not None]
    if errors:
        raise errors[0]


def _held(fs: AbstractFileSystem, given: Mapping[str, Any]) -> Iterator[Any]:
    theirs = {id(value) for value in given.values()}
    for value in list(vars(fs).values()):
        if isinstance(value, AbstractFileSystem):
            yield from _held(value, given)
        elif id(value) not in theirs and not isinstance(value, asyncio.AbstractEventLoop | type):
            yield value


async def _close(held: Any) -> Exception | None:
    """Close what can be closed; a blocking call runs in a thread."""
    close = getattr(held, "aclose", None) or getattr(held, "close", None)
    if not inspect.ismethod(close) and not inspect.isbuiltin(close):
        return None
    try:
        closing = close() if inspect.iscoroutinefunction(close) else await asyncio.to_thread(close)
        if inspect.isawaitable(closing):
            await closing
    except Exception as error:  # noqa: BLE001 - raised once all are closed
        return error
    return None
