"""A progress bar on standard error: one observer of saves and loads."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from dcp_storage.observe import Advance, Observer, Operation, silent


def progress_bar(then: Observer = silent) -> Observer:
    """Return an observer that shows a bar for each transfer, and tells everything to `then` as well.

    The bar is drawn where standard error is a terminal and this is local rank 0; else nothing is.
    """
    return partial(_show, then)


@contextmanager
def _show(then: Observer, operation: Operation, url: str, raw_bytes: int) -> Iterator[Advance]:
    with then(operation, url, raw_bytes) as tell:
        if not sys.stderr.isatty() or os.environ.get("LOCAL_RANK", "0") != "0":
            yield tell
            return
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"{operation} {url}", total=raw_bytes)

            def advance(raw_bytes: int, stored_bytes: int) -> None:
                tell(raw_bytes, stored_bytes)
                bar.advance(task, raw_bytes)

            yield advance
