"""The command line."""

import argparse
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from dcp_storage.config import MIB
from integration.bench.states import QUICK, STATES, Sizes
from integration.bench.stores import STORES

PARTS = ("speed", "ranks", "stall", "reshard", "memory", "repeats", "steps")
_CELLS = [*product(STATES, ["local"]), *product(["mixed", "minilm", "small", "zeros"], ["s3"]), ("mixed", "far")]
_QUICK_CELLS = [*product(["mixed", "small", "huge"], ["local"]), ("mixed", "s3"), ("mixed", "far")]


@dataclass(frozen=True)
class Options:
    """What to measure and how long.

    Attributes:
        cells: States and stores to measure the speed of.
        rounds: Counted rounds; one more comes first.
        ranks: How many of them save and load together.
        device: Where states are: `cpu` or `cuda`.
        memory_stores: Where to measure the memory of saves and loads.
        saves: How often to save in a row.
        alone_seconds: How long to train alone before each save.
        rows: Of the matrix that is resharded; it has half as many columns.
    """

    cells: list[tuple[str, str]]
    parts: list[str]
    rounds: int
    sizes: Sizes
    ranks: list[int]
    device: str
    memory_stores: list[str]
    saves: int
    alone_seconds: float
    rows: int
    directory: Path | None
    json: Path | None
    plot: Path | None


def parse(arguments: list[str] | None = None) -> Options:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(prog="python -m integration.bench", description="Benchmark of dcp_storage")
    parser.add_argument("--quick", action="store_true", help="small sizes and one round: a test of the benchmark")
    parser.add_argument("--states", nargs="+", choices=STATES, help="speed of these states only")
    parser.add_argument("--stores", nargs="+", choices=STORES, help="speed at these stores only")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="measure these only")
    parser.add_argument("--rounds", type=int, help="rounds after the one that warms up (5)")
    parser.add_argument("--training-mib", type=int, help="size of a training state (1024); a huge one has twice that")
    parser.add_argument("--ranks", nargs="+", type=int, default=[4], help="numbers of ranks that work together (4)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where states are, and training is")
    parser.add_argument("--directory", type=Path, help="where local checkpoints go (a temporary directory)")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--plot", type=Path, help="draw the speeds in this file; needs matplotlib")
    found = parser.parse_args(arguments)
    quick = found.quick
    return Options(
        cells=_cells(_QUICK_CELLS if quick else _CELLS, found.states, found.stores),
        parts=found.parts,
        rounds=found.rounds or (1 if quick else 5),
        sizes=_sizes(quick, found.training_mib),
        ranks=found.ranks,
        device=found.device,
        memory_stores=["local"] if quick else ["local", "s3"],
        saves=6 if quick else 50,
        alone_seconds=0.2 if quick else 3.0,
        rows=4096 if quick else 16384,
        directory=found.directory,
        json=found.json,
        plot=found.plot,
    )


def _cells(default: list[tuple[str, str]], states: list[str] | None, stores: list[str] | None) -> list[tuple[str, str]]:
    """Return the product of what was asked for, or the part of the default that fits what was asked for."""
    if states and stores:
        return list(product(states, stores))
    return [(a, b) for a, b in default if a in (states or STATES) and b in (stores or STORES)]


def _sizes(quick: bool, training_mib: int | None) -> Sizes:
    if training_mib is None:
        return QUICK if quick else Sizes()
    small = QUICK.small_tensors if quick else Sizes.small_tensors
    return Sizes(training_mib * MIB, 2 * training_mib * MIB, small)
