"""The terminal: a line a chapter, and a progress bar where somebody watches."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

_PIPED_WIDTH = 120


class Screen:
    """A terminal or a pipe on standard output; with `silent` only the bar, on standard error."""

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        file = sys.stderr if silent else sys.stdout
        watched = file.isatty()
        self._console = Console(file=file, width=None if watched else _PIPED_WIDTH, highlight=False)
        text = TextColumn("{task.description}")
        columns = (SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self._console, transient=True, disable=not watched)
        self._task = self._progress.add_task("Starting")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def expect(self, total: int) -> None:
        """Say how many advances will come."""
        self._progress.update(self._task, total=total)

    def advance(self, description: str) -> None:
        """Count one piece of work as done and say what runs now."""
        self._progress.update(self._task, advance=1, description=description)

    def tell(self, chapter: str, text: str) -> None:
        """Print one line of the story."""
        self.show(f"[bold]{chapter:<8}[/bold]{text}")

    def show(self, what: str | Table = "") -> None:
        """Print a line or a table."""
        if not self._silent:
            self._console.print(what, soft_wrap=isinstance(what, str))
