"""Bars of every speed."""

from pathlib import Path
from typing import Any

from integration.bench.results import OPERATIONS, Operation, Results
from integration.bench.summary import Table


def draw(path: Path, results: Results) -> None:
    """Write one row of bars for each state and store. Needs matplotlib."""
    from matplotlib.figure import Figure

    table = Table(results.timings)
    cells = table.cells()
    figure = Figure(figsize=(12, 0.5 + 2.4 * len(cells)), layout="constrained")
    rows = figure.subplots(len(cells), len(OPERATIONS), squeeze=False)
    for (state, store), axes in zip(cells, rows, strict=True):
        for operation, axis in zip(OPERATIONS, axes, strict=True):
            _bars(axis, table, state, store, operation)
    figure.suptitle(f"GB/s, {results.machine['cpu']}, {results.machine['cores']} cores")
    figure.savefig(path)


def _bars(axis: Any, table: Table, state: str, store: str, operation: Operation) -> None:
    speeds = {name: table.speed(state, store, name, operation) for name in table.contestants(state, store)}
    measured = {name: speed / 1e9 for name, speed in speeds.items() if speed is not None}
    axis.set_visible(bool(measured))
    axis.set_title(f"{state}, {store}: {operation}", fontsize="small")
    axis.barh(list(measured), list(measured.values()))
    axis.invert_yaxis()
