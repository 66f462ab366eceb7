"""What was tried, and what survived it, as rows of a table."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

EXAMPLES = 3
_OUTCOMES = ("old", "new", "none", "damaged")


@dataclass
class Row:
    """One kind of harm, done to one writer.

    Attributes:
        tried: How often.
        wrong: How often something was not as it has to be.
        found: What a fresh reader found, by outcome.
        examples: The first few things that were wrong.
    """

    tried: int = 0
    wrong: int = 0
    found: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)


@dataclass
class Tally:
    """Rows by part, writer and kind; the order is that in which they came."""

    rows: dict[tuple[str, str, str], Row] = field(default_factory=dict)

    def add(self, row_of: tuple[str, str, str], found: str, wrong: Sequence[str], where: object = "") -> None:
        row = self.rows.setdefault(row_of, Row())
        row.tried += 1
        row.found[found] += 1
        if wrong:
            row.wrong += 1
            row.examples += [f"{where}: {what}" for what in wrong][: max(0, EXAMPLES - len(row.examples))]

    def wrong(self, writer: str) -> list[str]:
        """Return what was wrong with one writer."""
        return [
            f"{part}, {kind}, {example}"
            for (part, who, kind), row in self.rows.items()
            for example in row.examples
            if who == writer
        ]

    def total(self, writer: str) -> int:
        return sum(row.tried for (_, who, _), row in self.rows.items() if who == writer)

    def writers(self) -> list[str]:
        return list(dict.fromkeys(who for _, who, _ in self.rows))


def show(console: Console, tally: Tally, notes: Iterable[str] = ()) -> None:
    """Print the table and, below it, what was wrong with the first writer."""
    table = Table(title="What was tried against a save, and what a fresh reader found afterwards", title_justify="left")
    for column in ("harm", "writer", "kind"):
        table.add_column(column, overflow="fold")
    for column in ("tried", "survived", *_OUTCOMES):
        table.add_column(column, justify="right")
    last = ""
    for (part, writer, kind), row in tally.rows.items():
        if last not in {"", part + writer}:
            table.add_section()
        last = part + writer
        table.add_row(part, writer, kind, *_figures([row]))
    for writer in tally.writers():
        table.add_section()
        rows = [row for (_, who, _), row in tally.rows.items() if who == writer]
        table.add_row("all", writer, "", *_figures(rows))
    console.print(table)
    for note in notes:
        console.print(note, markup=False)


def _figures(rows: Sequence[Row]) -> list[str]:
    tried, wrong = sum(row.tried for row in rows), sum(row.wrong for row in rows)
    found = sum((row.found for row in rows), Counter())
    return [f"{number:,}" for number in (tried, tried - wrong, *(found[outcome] for outcome in _OUTCOMES))]
