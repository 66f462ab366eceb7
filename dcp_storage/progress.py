"""A progress bar on standard error: one observer of saves and loads."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from dcp_storage.errors import ConfigError
from dcp_storage.observe import Advance, Observer, Operation, silent
from dcp_storage.words import transfer_text


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


def progress_bar(then: Observer = silent) -> Observer:
    """Return an observer that shows a bar for each transfer, and tells everything to `then` as well.

    Local rank 0 draws it where standard error is a terminal, and at its end a line says what was moved and how fast,
    also where it is not one.
    """
    return partial(_show, then)


@contextmanager
def _show(then: Observer, operation: Operation, url: str, raw_bytes: int) -> Iterator[Advance]:
    with then(operation, url, raw_bytes) as tell:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            yield tell
            return
        moved, begun = _Moved(tell), time.monotonic()
        with _bar(operation, url, raw_bytes) if sys.stderr.isatty() else nullcontext() as bar:
            moved.bar = bar
            yield moved.advance
        print(f"{operation} {url}: {transfer_text(moved.raw, moved.stored, time.monotonic() - begun)}", file=sys.stderr)  # noqa: T201


class _Moved:
    """Counts what is moved, and tells of it."""

    def __init__(self, tell: Advance) -> None:
        self._tell = tell
        self.raw = self.stored = 0
        self.bar: Callable[[int], None] | None = None

    def advance(self, raw_bytes: int, stored_bytes: int) -> None:
        self._tell(raw_bytes, stored_bytes)
        self.raw, self.stored = self.raw + raw_bytes, self.stored + stored_bytes
        if self.bar:
            self.bar(raw_bytes)


@contextmanager
def _bar(operation: Operation, url: str, raw_bytes: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{operation} {url}", total=raw_bytes)
        yield partial(bar.advance, task)
