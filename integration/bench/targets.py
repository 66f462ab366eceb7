"""The targets, as checks of what was measured. Pure."""

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from dcp_storage.config import MIB
from integration.bench.contestants import (
    FSSPEC,
    OURS,
    OURS_RAW,
    S3_CONNECTOR,
    STOCK,
    STOCK_T2,
    STOCK_ZSTD,
    TORCH_CHECKPOINTING,
    WRITES,
)
from integration.bench.results import Operation, Peak, Repeats, Reshard, Results, Stall
from integration.bench.summary import Table


@dataclass(frozen=True)
class Check:
    """One target and what was measured; `value` is `None` where it was not."""

    number: int
    what: str
    value: float | None
    bound: float
    at_least: bool
    unit: str = "x"

    @property
    def passed(self) -> bool | None:
        """Whether the target is met; `None` where nothing was measured."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound


class _Speed(NamedTuple):
    """How many times as fast as the fastest of the peers, at least."""

    number: int
    state: str
    store: str
    operation: Operation
    ours: str
    peers: tuple[str, ...]
    bound: float


DISK = f"disk: {OURS}"
_UNCOMPRESSED = (STOCK, STOCK_T2)
_SPEEDS = (
    _Speed(1, "mixed", "local", "save", OURS, (STOCK,), 5.0),
    _Speed(1, "mixed", "local", "save", OURS, (*_UNCOMPRESSED, STOCK_ZSTD), 2.0),
    _Speed(1, "mixed", "local", "save", OURS, (OURS_RAW,), 1 / 1.15),
    _Speed(2, "mixed", "local", "load warm", OURS, _UNCOMPRESSED, 1.0),
    _Speed(2, "mixed", "local", "load warm", OURS, (STOCK_ZSTD,), 3.0),
    _Speed(2, "mixed", "local", "load cold", OURS, _UNCOMPRESSED, 1.3),
    _Speed(2, "mixed", "local", "load after save", OURS, _UNCOMPRESSED, 0.7),
    _Speed(2, "mixed", "local", "load again", OURS, _UNCOMPRESSED, 0.7),
    _Speed(2, "mixed", "local", "load after save", OURS, (DISK,), 1 / 1.2),
    _Speed(2, "mixed", "local", "load cold", OURS, (DISK,), 1 / 1.2),
    _Speed(2, "mixed, 4 ranks", "local", "load after save", OURS, _UNCOMPRESSED, 1.1),
    _Speed(2, "mixed, 4 ranks", "local", "load cold", OURS, _UNCOMPRESSED, 1.1),
    _Speed(3, "mixed", "local", "load after save", OURS_RAW, _UNCOMPRESSED, 0.6),
    _Speed(3, "mixed", "local", "save", OURS_RAW, _UNCOMPRESSED, 1.2),
    _Speed(3, "mixed", "local", "load warm", OURS_RAW, _UNCOMPRESSED, 2.0),
    _Speed(4, "mixed", "s3", "save", OURS, (S3_CONNECTOR,), 1.4),
    _Speed(4, "mixed", "s3", "save", OURS, (FSSPEC,), 2.5),
    _Speed(4, "mixed", "s3", "load after save", OURS, (S3_CONNECTOR,), 1.2),
    _Speed(4, "mixed", "s3", "load after save", OURS, (FSSPEC,), 2.5),
    _Speed(5, "mixed", "far", "save", OURS, (FSSPEC,), 5.0),
    _Speed(5, "mixed", "far", "save", OURS, (S3_CONNECTOR,), 1.4),
    _Speed(5, "mixed", "far", "load after save", OURS, (FSSPEC,), 20.0),
    _Speed(5, "mixed", "far", "load after save", OURS, (S3_CONNECTOR,), 1.2),
    _Speed(6, "tiny", "local", "save", OURS, _UNCOMPRESSED, 1 / 1.2),
    _Speed(6, "tiny", "local", "load after save", OURS, _UNCOMPRESSED, 1 / 1.2),
    _Speed(6, "few", "local", "save", OURS, _UNCOMPRESSED, 1 / 1.2),
    _Speed(6, "few", "local", "load after save", OURS, _UNCOMPRESSED, 1 / 1.2),
    _Speed(6, "small", "local", "save", OURS, _UNCOMPRESSED, 4.0),
    _Speed(6, "small", "local", "load after save", OURS, _UNCOMPRESSED, 4.0),
    _Speed(6, "small", "local", "save", OURS, (TORCH_CHECKPOINTING,), 1.0),
    _Speed(6, "huge", "local", "save", OURS, _UNCOMPRESSED, 1.2),
    _Speed(6, "huge", "local", "load after save", OURS, _UNCOMPRESSED, 2.5),
    _Speed(6, "huge", "local", "load cold", OURS, _UNCOMPRESSED, 2.5),
)
_STORED = 0.81
_PEAK_MIB = {"local": 128, "s3": 640}
_STEP = {"THREAD": 1.15, "PROCESS": 1.1}
_NOISE = 1.1
"""What two saves that are alike may differ by."""
_GROWTH_MIB = 16
_SETTLED = 10
"""Saves until the allocator has what it needs."""


def check(results: Results) -> list[Check]:
    """Return every target with what was measured."""
    table = Table(results.timings)
    stored = Check(1, f"{OURS}: stored of raw, mixed", table.stored("mixed", "local", OURS), _STORED, at_least=False)
    groups = (
        [stored, *(_speed(table, target) for target in _SPEEDS)],
        _reshards(results.reshards),
        _peaks(results.peaks),
        _stalls(results.stalls),
        _repeats(results.repeats),
    )
    return sorted(chain.from_iterable(groups), key=lambda each: each.number)


def _speed(table: Table, target: _Speed) -> Check:
    value = table.least_ratio(target.state, target.store, target.operation, target.ours, target.peers)
    peers = " or ".join(target.peers)
    what = f"{target.ours}: {target.operation}, {target.state}, {target.store}, against {peers}"
    return Check(target.number, what, value, target.bound, at_least=True)


def _reshards(reshards: Iterable[Reshard]) -> Iterator[Check]:
    for each in reshards:
        if each.contestant in {OURS, OURS_RAW}:
            what = f"{each.contestant}: {each.case}"
            yield Check(7, f"{what}, read of allowed", each.read_bytes / each.allowed_bytes, 1.0, at_least=False)
            yield Check(7, f"{what}, decodings a block", each.decoded_bytes / each.block_bytes, 1.0, at_least=False)


def _peaks(peaks: Iterable[Peak]) -> Iterator[Check]:
    for peak in peaks:
        if peak.contestant == OURS:
            what = f"{OURS}: {peak.operation}, {peak.store}, memory above the state"
            yield Check(8, what, peak.peak_bytes / MIB, _PEAK_MIB[peak.store], at_least=False, unit=" MiB")


def _stalls(stalls: list[Stall]) -> Iterator[Check]:
    for executor, bound in _STEP.items():
        ours, stock = ([s for s in stalls if (s.contestant, s.executor) == (n, executor)] for n in (OURS, STOCK))
        if ours and stock:
            mean, floor = _slowdown(ours), _slowdown(s for s in stalls if s.contestant == WRITES)
            p99 = _paired([s.p99 for s in ours], [s.p99 for s in stock])
            lost = _paired([s.lost_seconds for s in ours], [s.lost_seconds for s in stock])
            yield Check(9, f"{OURS}: {executor}, mean step of alone", mean, bound, at_least=False)
            yield Check(9, f"{OURS}: {executor}, of beside writes alone", mean / floor, bound, at_least=False)
            yield Check(9, f"{OURS}: {executor}, p99 step of stock's", p99, 1.0, at_least=False)
            yield Check(9, f"{OURS}: {executor}, step-seconds lost of stock's", lost, 1.0, at_least=False)


def _slowdown(stalls: Iterable[Stall]) -> float:
    return statistics.median(each.mean / each.alone_mean for each in stalls)


def _paired(ours: list[float], stock: list[float]) -> float:
    return statistics.median(one / max(other, 1e-9) for one, other in zip(ours, stock, strict=True))


def _repeats(repeats: Iterable[Repeats]) -> Iterator[Check]:
    for each in repeats:
        if each.contestant == OURS:
            later = statistics.median(each.seconds[1:]) / each.seconds[0]
            yield Check(10, f"{OURS}: later saves' time of the first's", later, _NOISE, at_least=False)
            what = f"{OURS}: memory grown over {len(each.seconds)} saves"
            yield Check(10, what, growth_bytes(each) / MIB, _GROWTH_MIB, at_least=False, unit=" MiB")


def growth_bytes(repeats: Repeats) -> float:
    """Return the memory held after the last saves beyond that after the first ones that had settled."""
    settled = repeats.rss_bytes[min(_SETTLED, len(repeats.rss_bytes) // 2) :]
    part = max(1, len(settled) // 4)
    return statistics.median(settled[-part:]) - statistics.median(settled[:part])
