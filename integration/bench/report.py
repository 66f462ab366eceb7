"""Tables of what was measured, in the terminal."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table as Grid

from dcp_storage.config import MIB
from integration.bench.contestants import OURS
from integration.bench.results import OPERATIONS, Operation, Results
from integration.bench.summary import Table
from integration.bench.targets import Check, growth_bytes


def show(console: Console, results: Results, checks: list[Check]) -> None:
    """Print every table that has rows."""
    console.print(", ".join(f"{key}: {value}" for key, value in results.machine.items()))
    tables = (_speeds, _stalls, _reshards, _peaks, _repeats, _steps)
    for grid in [*(table(results) for table in tables), _targets(checks)]:
        if grid.row_count:
            console.print(grid)


def _speeds(results: Results) -> Grid:
    table = Table(results.timings)
    columns = ["state", "store", "contestant", *(f"{each} GB/s" for each in OPERATIONS), "stored"]
    grid = _grid("Speed, and how many times as fast dcp_storage (zstd) is: medians of paired rounds", columns)
    for state, store in table.cells():
        for name in table.contestants(state, store):
            speeds = [_speed(table, state, store, name, operation) for operation in OPERATIONS]
            grid.add_row(state, store, name, *speeds, _number(table.stored(state, store, name)))
        grid.add_section()
    return grid


def _speed(table: Table, state: str, store: str, name: str, operation: Operation) -> str:
    speed = table.speed(state, store, name, operation)
    if speed is None:
        return "-"
    ratio = table.ratio(state, store, operation, OURS, name)
    against = "" if name == OURS or ratio is None else f" ({ratio:.2f}x)"
    return f"{speed / 1e9:.2f}{against}"


def _stalls(results: Results) -> Grid:
    columns = ["contestant", "executor", "alone ms", "mean ms", "p99 ms", "mean of alone", "call s", "lost s", "steps"]
    grid = _grid("Training beside async_save, each round", columns)
    for each in results.stalls:
        times = [each.alone_mean * 1e3, each.mean * 1e3, each.p99 * 1e3]
        rest = [each.mean / each.alone_mean, each.call_seconds, each.lost_seconds]
        grid.add_row(each.contestant, each.executor, *map(_number, [*times, *rest]), str(each.steps))
    return grid


def _reshards(results: Results) -> Grid:
    columns = ["contestant", "case", "needed MiB", "in blocks MiB", "read MiB", "read of needed", "decodings"]
    grid = _grid("Loads into other shards, of one stored chunk", columns)
    for each in results.reshards:
        sizes = [size / MIB for size in (each.needed_bytes, each.block_bytes, each.read_bytes)]
        ratios = [each.read_bytes / each.needed_bytes, each.decoded_bytes / each.block_bytes or None]
        grid.add_row(each.contestant, each.case, *map(_number, [*sizes, *ratios]))
    return grid


def _peaks(results: Results) -> Grid:
    grid = _grid("Memory above the state", ["store", "contestant", "operation", "state MiB", "peak MiB"])
    for each in results.peaks:
        sizes = (_number(each.raw_bytes / MIB), _number(each.peak_bytes / MIB))
        grid.add_row(each.store, each.contestant, each.operation, *sizes)
    return grid


def _repeats(results: Results) -> Grid:
    grid = _grid("Repeated saves", ["contestant", "saves", "first s", "second s", "last s", "memory grown MiB"])
    for each in results.repeats:
        seconds = [each.seconds[0], each.seconds[1], each.seconds[-1]]
        numbers = map(_number, [*seconds, growth_bytes(each) / MIB])
        grid.add_row(each.contestant, str(len(each.seconds)), *numbers)
    return grid


def _steps(results: Results) -> Grid:
    grid = _grid("Steps of a run, each round; the first takes memory", ["contestant", "how", "blocked s", "beside s"])
    for each in results.steps:
        grid.add_row(each.contestant, each.how, _number(each.blocked_seconds), _number(each.background_seconds))
    return grid


def _targets(checks: list[Check]) -> Grid:
    words = {True: "[green]pass[/]", False: "[red]fail[/]"}
    grid = _grid("Targets", ["", "target", "measured", "bound", ""])
    for each in checks:
        if each.passed is not None:
            bound = f"{'>=' if each.at_least else '<='} {each.bound:g}{each.unit}"
            measured = f"{_number(each.value)}{each.unit}"
            grid.add_row(str(each.number), each.what, measured, bound, words[each.passed])
    return grid


def _grid(title: str, columns: Iterable[str]) -> Grid:
    grid = Grid(title=title, title_justify="left")
    for column in columns:
        grid.add_column(column, overflow="fold")
    return grid


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
