"""`python -m integration.damage [--mutations 2000]`: damaged checkpoints, and what loads and `verify` make of them.

Each mutation damages a checkpoint of this package, of each codec in turn; those of data objects a stock checkpoint too,
which DCP's own reader then loads. Exits with 1 where anything of this package was silent, untyped, unnamed or missed.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table

from tests.damages import (
    CODECS,
    DAMAGES,
    TO_OBJECTS,
    Outcome,
    check,
    damaged,
    load,
    load_stock,
    make_pair,
    save,
    some_names,
)

OURS, VERIFY, STOCK = "load", "verify", "stock load"


@dataclass
class Tally:
    """Verdicts by damage and by who met it, and every failure of this package."""

    counts: dict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    failures: list[str] = field(default_factory=list)

    def add(self, damage: str, who: str, outcome: Outcome, where: str) -> None:
        self.counts[damage, who][outcome.verdict] += 1
        if who != STOCK and not outcome.is_right:
            self.failures.append(f"{where}, {damage}: {who}: {outcome.verdict} {outcome.detail}")

    def total(self, who: str) -> Counter[str]:
        return sum((counts for (_, one), counts in self.counts.items() if one == who), Counter())


def run(mutations: int, directory: Path) -> Tally:
    """Damage checkpoints `mutations` times, every kind of damage on every codec in turn."""
    pairs = {name: make_pair(directory / name, partial(save, codec=codec)) for name, codec in CODECS.items()}
    stock = make_pair(directory / "stock", _save_stock)
    tally = Tally()
    for seed, (codec, damage) in zip(range(mutations), _turns(), strict=False):
        case, state = damaged(pairs[codec], directory / "damaged", DAMAGES[damage], seed), pairs[codec].state
        outcome = load(case.path, state, some_names(case, state))
        tally.add(damage, OURS, outcome, f"seed {seed}, {codec}")
        tally.add(damage, VERIFY, check(case.path, outcome), f"seed {seed}, {codec}")
        if damage in TO_OBJECTS:
            case = damaged(stock, directory / "damaged", DAMAGES[damage], seed)
            tally.add(damage, STOCK, load_stock(case.path, stock.state), "")
    return tally


def _save_stock(path: Path, state: dict[str, object]) -> None:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path, thread_count=3, sync_files=False))


def _turns() -> Iterator[tuple[str, str]]:
    while True:
        yield from ((codec, damage) for damage in DAMAGES for codec in CODECS)


def table_of(tally: Tally) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("Damage")
    for column in (
        "Done",
        "Error, named",
        "Exact",
        "Silent or untyped",
        "verify finds",
        "Stock: error",
        "Exact",
        "SILENT",
    ):
        table.add_column(column, justify="right")
    for damage in DAMAGES:
        by_who = (tally.counts[damage, who] for who in (OURS, VERIFY, STOCK))
        table.add_row(damage, *_cells(*by_who))
    table.add_section()
    table.add_row("all", *_cells(tally.total(OURS), tally.total(VERIFY), tally.total(STOCK)), style="bold")
    return table


def _cells(ours: Counter[str], verified: Counter[str], stock: Counter[str]) -> list[str]:
    wrong = ours.total() - ours["named"] - ours["exact"]
    cells = [ours.total(), ours["named"], ours["exact"], wrong, verified["named"]]
    known = [stock["raised"], stock["exact"], stock["SILENT"]] if stock else ["", "", ""]
    return [str(cell) for cell in (*cells, *known)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mutations", type=int, default=2000)
    args = parser.parse_args()
    logging.disable(logging.ERROR)  # torch logs every failure that it raises
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="dcp-storage-damage-") as directory:
        tally = run(args.mutations, Path(directory))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table_of(tally))
    for failure in tally.failures:
        console.print(failure, markup=False, soft_wrap=True)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
