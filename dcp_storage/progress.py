"""A progress bar on standard error: one observer of saves and loads."""

import os
import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from dcp_storage.observe import Observer, Operation


class ProgressBar:
    """Shows a bar while a transfer runs, where standard error is a terminal and this is local rank 0; else nothing.

    Everything is told to `then` as well.
    """

    def __init__(self, then: Observer) -> None:
        self._then = then
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def start(self, operation: Operation, url: str, raw_bytes: int) -> None:
        """Draw the bar."""
        self._then.start(operation, url, raw_bytes)
        if sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0":
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(f"{operation} {url}", total=raw_bytes)
            self._bar.start()

    def advance(self, raw_bytes: int, stored_bytes: int) -> None:
        """Move the bar."""
        self._then.advance(raw_bytes, stored_bytes)
        if self._bar:
            self._bar.advance(self._task, raw_bytes)

    def finish(self, error: BaseException | None) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.stop()
            self._bar = None
        self._then.finish(error)
