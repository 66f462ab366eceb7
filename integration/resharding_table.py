"""What resharding gives with DCP's own planners, writer and reader, and with this package's, side by side.

python -m integration.resharding_table
"""

import gc
import logging
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from dcp_storage import ShardedLoadPlanner, ShardedSavePlanner
from integration.resharding.matrix import Matrix, Outcomes, run_matrices
from integration.resharding.traps import TRAPS, spring

CONTESTANTS = ("stock", "ours")
KINDS = ("upstream", "wrapped", "bare")
TENSORS = 10_000


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as scratch:
        console.print(_cases(Path(scratch)))
        console.print(_traps(Path(scratch)))
    console.print(_planning())


def _cases(scratch: Path) -> Table:
    matrices = [Matrix(contestant, dims, scratch) for dims in (1, 2, 3) for contestant in CONTESTANTS]
    results = run_matrices(matrices, limit_s=1200)
    table = Table(title="Layouts of one tensor on 4 ranks, each saved and loaded into every other")
    columns = [f"{who} {what}" for who in CONTESTANTS for what in ("right", "raised", "wrong")]
    for column in ("dims", "from", "into", "cases", *columns):
        table.add_column(column, justify="left" if column in {"from", "into"} else "right")
    for stock, ours in zip(range(0, len(matrices), 2), range(1, len(matrices), 2), strict=True):
        counted = [_count(results[stock]), _count(results[ours])]
        for source, target in product(KINDS, KINDS):
            counts = [of[source, target] for of in counted]
            figures = [str(count[what]) for count in counts for what in ("right", "raised", "wrong")]
            table.add_row(f"{matrices[stock].dims}", source, target, str(counts[0].total()), *figures)
    totals = [_total(results[first::2]) for first in range(2)]
    figures = [str(count[what]) for count in totals for what in ("right", "raised", "wrong")]
    table.add_section()
    table.add_row("", "all", "all", str(totals[0].total()), *figures)
    return table


def _total(results: list[Outcomes]) -> Counter[str]:
    return sum((count for outcomes in results for count in _count(outcomes).values()), Counter())


def _count(outcomes: Outcomes) -> dict[tuple[str, str], Counter[str]]:
    counts: dict[tuple[str, str], Counter[str]] = {pair: Counter() for pair in product(KINDS, KINDS)}
    for (source, target), outcome in outcomes.items():
        counts[_kind(source), _kind(target)][outcome.partition(" ")[0].rstrip(":")] += 1
    return counts


def _kind(layout: str) -> str:
    kind = layout.partition(":")[0]
    return kind if kind in KINDS else KINDS[0]


def _traps(scratch: Path) -> Table:
    table = Table("in one process", *CONTESTANTS, title="Ways to lose state that look like a load")
    for number, name in enumerate(TRAPS):
        table.add_row(name, *(spring(name, who, scratch / f"trap-{number}-{who}") for who in CONTESTANTS))
    return table


def _planning() -> Table:
    table = Table(title=f"Planning {TENSORS:,} tensors, 4 ranks, seconds of processor time (median of 7, no gc)")
    state = {"model": {f"layers.{n}.weight": torch.zeros(4, 4) for n in range(TENSORS)}}
    planners = {"default": (DefaultSavePlanner, DefaultLoadPlanner), "ours": (ShardedSavePlanner, ShardedLoadPlanner)}
    seconds: dict[str, list[list[float]]] = {name: [] for name in planners}
    for _ in range(7):
        for name, (save, load) in planners.items():
            seconds[name].append(_plan(save, load, state))
    for column in ("planner", "save, a rank", "save, coordinator", "load, a rank"):
        table.add_column(column, justify="left" if column == "planner" else "right")
    for name, runs in seconds.items():
        table.add_row(name, *(f"{statistics.median(run):.3f}" for run in zip(*runs, strict=True)))
    return table


def _plan(make_save: Callable[[], Any], make_load: Callable[[], Any], state: dict[str, Any]) -> list[float]:
    gc.collect()
    gc.disable()  # as timeit does: which step a collection of everything falls into is chance
    planners, plans = [make_save() for _ in range(4)], []
    begin = time.thread_time()
    for rank, planner in enumerate(planners):
        planner.set_up_planner(state, None, is_coordinator=rank == 0)
        plans.append(planner.create_local_plan())
    local = time.thread_time()
    plans, metadata = planners[0].create_global_plan(plans)
    globally = time.thread_time()
    loading = make_load()
    loading.set_up_planner(dict(state), metadata, is_coordinator=True)
    loading.finish_plan(loading.create_local_plan())
    gc.enable()
    return [(local - begin) / 4, globally - local, time.thread_time() - globally]


if __name__ == "__main__":
    main()
