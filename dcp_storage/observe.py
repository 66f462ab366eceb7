"""Observers: what a save or a load reports while it runs. `progress.py` is one of them."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

logger = logging.getLogger(__name__)

Operation = Literal["save", "load", "verify"]

Advance = Callable[[int, int], None]
"""Is told of blocks that are done: their size in memory, before compression, and in the store, in bytes."""

Observer = Callable[[Operation, str, int], AbstractContextManager[Advance]]
"""Is called for each transfer of a rank, with its operation, its URL and the bytes that it will move, in memory.

What it raises is logged once for a transfer, and fails nothing. It returns a context manager, which is entered when the
transfer begins and left when it ends, with the error that failed it. What that yields is called in between. All of it
happens on the thread that runs the transfer, and has to return at once. Several transfers may run at the same time,
each with a context manager of its own.

    @contextmanager
    def log(operation, url, raw_bytes):
        began = time.monotonic()
        yield lambda raw_bytes, stored_bytes: None
        print(f"{operation} {url}: {raw_bytes / (time.monotonic() - began):.0f} bytes/s")
"""


@dataclass
class Moved:
    """Counts what transfers moved, in memory and in the store, in bytes."""

    raw_bytes: int = 0
    stored_bytes: int = 0

    def counted(self, advance: Advance) -> Advance:
        """Return what counts, and then tells `advance`."""

        def count(raw_bytes: int, stored_bytes: int) -> None:
            self.raw_bytes += raw_bytes
            self.stored_bytes += stored_bytes
            advance(raw_bytes, stored_bytes)

        return count


@contextmanager
def silent(operation: Operation, url: str, raw_bytes: int) -> Iterator[Advance]:  # noqa: ARG001 - an `Observer`
    """Do nothing: the default observer."""
    yield lambda raw_bytes, stored_bytes: None  # noqa: ARG005


@contextmanager
def observed(observer: Observer, operation: Operation, url: str, raw_bytes: int) -> Iterator[Advance]:
    """Report a transfer to an observer. What it raises is logged once, and the transfer goes on."""
    told = _Told(observer, operation, url, raw_bytes)
    failure: BaseException | None = None
    try:
        yield told.advance
    except BaseException as error:
        failure = error
        raise
    finally:
        told.end(failure)
        del failure  # else a circle with its traceback holds this frame


class _Told:
    """An observer of one transfer, until it raises."""

    def __init__(self, observer: Observer, *transfer: Any) -> None:
        self._manager: AbstractContextManager[Advance] | None = None
        self._advance: Advance | None = None
        with self._leaving_out():
            manager = observer(*transfer)
            self._advance = manager.__enter__()
            self._manager = manager

    def advance(self, raw_bytes: int, stored_bytes: int) -> None:
        if self._advance is not None:
            with self._leaving_out():
                self._advance(raw_bytes, stored_bytes)

    def end(self, failure: BaseException | None) -> None:
        if self._manager is not None:
            with self._leaving_out():
                self._manager.__exit__(type(failure) if failure else None, failure, None)

    @contextmanager
    def _leaving_out(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._advance = None
            logger.warning("an observer raised %r and is told no more of this transfer", error, exc_info=error)
