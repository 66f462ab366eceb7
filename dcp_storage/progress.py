"""A progress bar on standard error: one observer of saves and loads."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from dcp_storage.errors import ConfigError
from dcp_storage.observe import Advance, Moved, Observer, Operation, silent
from dcp_storage.words import transfer_text


def choose_observer(observer: Observer | None, *, progress: bool) -> Observer:
    """Return the observer that a writer or reader reports to.

    Raises:
        ConfigError: It is not callable.
    """
    if observer is not None and not callable(observer):
        raise ConfigError(
            f"the observer {observer!r} is not callable: pass a function of operation, URL and bytes that returns a "
            "context manager"
        )
    return progress_bar(observer or silent) if progress else observer or silent


def progress_bar(then: Observer = silent) -> Observer:
    """Return an observer that shows a bar for each transfer, and also reports to `then`.

    Local rank 0 draws the bar if standard error is a terminal. At the end of a transfer it always prints one line that
    says what was moved and how fast.
    """
    return partial(_show, then)


@contextmanager
def _show(then: Observer, operation: Operation, url: str, raw_bytes: int) -> Iterator[Advance]:
    with then(operation, url, raw_bytes) as tell:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            yield tell
            return
        moved, begun = Moved(), time.monotonic()
        with _bar(operation, url, raw_bytes, tell) if sys.stderr.isatty() else nullcontext(tell) as advance:
            yield moved.counted(advance)
        text = transfer_text(moved.raw_bytes, moved.stored_bytes, time.monotonic() - begun)
        print(f"{operation} {url}: {text}", file=sys.stderr)


@contextmanager
def _bar(operation: Operation, url: str, raw_bytes: int, tell: Advance) -> Iterator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{operation} {url}", total=raw_bytes)

        def advance(raw_bytes: int, stored_bytes: int) -> None:
            tell(raw_bytes, stored_bytes)
            bar.advance(task, raw_bytes)

        yield advance
