"""Observers, to which saves and loads report while they run. `progress.py` is one of them."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

logger = logging.getLogger(__name__)

Operation = Literal["save", "load", "verify"]

Advance = Callable[[int, int], None]
"""Called when blocks are done, with their size in bytes: in memory, before compression, and in the store."""

Observer = Callable[[Operation, str, int], AbstractContextManager[Advance]]
"""Called for each transfer of a rank, with its operation, its URL and the number of bytes to move, as in memory.

It returns a context manager, which is entered when the transfer begins and exited when it ends, with the exception if
it failed. The function that this yields is called in between. All calls happen on the thread that runs the transfer,
and must return quickly. An exception that an observer raises is logged once per transfer and does not fail it. Several
transfers may run at the same time, each with its own context manager.

    @contextmanager
    def log(operation, url, raw_bytes):
        began = time.monotonic()
        yield lambda raw_bytes, stored_bytes: None
        print(f"{operation} {url}: {raw_bytes / (time.monotonic() - began):.0f} bytes/s")
"""


@dataclass
class Moved:
    """Counts the bytes that transfers moved, in memory and in the store."""

    raw_bytes: int = 0
    stored_bytes: int = 0

    def counted(self, advance: Advance) -> Advance:
        """Return a function that counts, and then calls `advance`."""

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
    """Report a transfer to an observer. An exception that it raises is logged once, and the transfer goes on."""
    guarded = _Guarded(observer, operation, url, raw_bytes)
    failure: BaseException | None = None
    try:
        yield guarded.advance
    except BaseException as error:
        failure = error
        raise
    finally:
        guarded.end(failure)
        del failure  # else a reference cycle with its traceback keeps this frame alive


class _Guarded:
    """An observer of one transfer, until it raises."""

    def __init__(self, observer: Observer, *transfer: Any) -> None:
        self._manager: AbstractContextManager[Advance] | None = None
        self._advance: Advance | None = None
        with self._guarded():
            manager = observer(*transfer)
            self._advance = manager.__enter__()
            self._manager = manager

    def advance(self, raw_bytes: int, stored_bytes: int) -> None:
        if self._advance is not None:
            with self._guarded():
                self._advance(raw_bytes, stored_bytes)

    def end(self, failure: BaseException | None) -> None:
        if self._manager is not None:
            with self._guarded():
                self._manager.__exit__(type(failure) if failure else None, failure, None)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._advance = None
            logger.warning("an observer raised %r and is not called again for this transfer", error, exc_info=error)
