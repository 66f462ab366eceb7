"""`python -m integration.bench`: measure, print, write."""

import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from integration.bench import memory, ranks, repeats, report, reshard, stall, steps
from integration.bench.contestants import missing
from integration.bench.machine import describe
from integration.bench.options import Options, parse
from integration.bench.results import Results
from integration.bench.rounds import run_cell
from integration.bench.states import STATES, on
from integration.bench.stores import LocalShelf, open_shelf
from integration.bench.targets import check


def main() -> None:
    """Run the benchmark as the command line says."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    options, console = parse(), Console()
    for name in missing():
        console.print(f"{name} is not installed and does not take part")
    with tempfile.TemporaryDirectory(prefix="dcp-storage-bench-", dir=options.directory) as temporary:
        directory = Path(temporary)
        results = Results(describe(directory), {key: str(value) for key, value in asdict(options).items()})
        for part in options.parts:
            _PARTS[part](options, results, directory, console)
            _write(options, results)
    report.show(console, results, check(results))
    if options.plot and results.timings:
        from integration.bench.plot import draw

        draw(options.plot, results)


def _write(options: Options, results: Results) -> None:
    """Write what there is so far: a long run may be cut short."""
    if options.json:
        results.write(options.json, [{**asdict(each), "passed": each.passed} for each in check(results)])


def _speed(options: Options, results: Results, directory: Path, console: Console) -> None:
    for name, store in options.cells:
        console.print(f"speed: {name}, {store}")
        state = on(STATES[name](options.sizes), options.device)
        with open_shelf(store, directory) as shelf:
            results.timings.extend(run_cell(name, state, shelf, options.rounds))
        _write(options, results)


def _ranks(options: Options, results: Results, directory: Path, console: Console) -> None:
    console.print(f"speed of {' and '.join(map(str, options.ranks))} ranks")
    results.timings.extend(ranks.measure(directory, options.sizes, options.rounds, options.ranks, options.device))


def _stall(options: Options, results: Results, directory: Path, console: Console) -> None:
    console.print("training beside async_save")
    results.stalls = stall.measure(LocalShelf(directory), options)


def _reshard(options: Options, results: Results, directory: Path, console: Console) -> None:
    console.print("loads into other shards")
    results.reshards = reshard.measure(LocalShelf(directory), options.rows)


def _memory(options: Options, results: Results, directory: Path, console: Console) -> None:
    for store in options.memory_stores:
        console.print(f"memory: {store}")
        with open_shelf(store, directory) as shelf:
            results.peaks.extend(memory.measure(shelf, options.sizes))


def _repeats(options: Options, results: Results, directory: Path, console: Console) -> None:
    console.print("repeated saves")
    results.repeats = list(repeats.measure(LocalShelf(directory), options.sizes, options.saves))


def _steps(options: Options, results: Results, directory: Path, console: Console) -> None:
    console.print("steps of a run")
    results.steps = steps.measure(LocalShelf(directory), options)


_PARTS = {
    "speed": _speed,
    "ranks": _ranks,
    "stall": _stall,
    "reshard": _reshard,
    "memory": _memory,
    "repeats": _repeats,
    "steps": _steps,
}

if __name__ == "__main__":
    main()
