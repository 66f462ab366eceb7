"""Medians and paired ratios of timings. Pure."""

import statistics
from collections.abc import Iterable, Sequence

from integration.bench.results import Operation, Timing


class Table:
    """Timings by state, store, contestant and operation, without the rounds that warmed up.

    A paired ratio compares two contestants within each round, and is the median of that over the rounds.
    """

    def __init__(self, timings: Iterable[Timing]) -> None:
        self._found: dict[tuple[str, str, str, str], dict[int, Timing]] = {}
        for timing in timings:
            if timing.round:
                key = timing.state, timing.store, timing.contestant, timing.operation
                self._found.setdefault(key, {})[timing.round] = timing

    def cells(self) -> list[tuple[str, str]]:
        """Return every state and store, in the order measured."""
        return list(dict.fromkeys((state, store) for state, store, _, _ in self._found))

    def contestants(self, state: str, store: str) -> list[str]:
        """Return who was measured in a cell."""
        names = [name for a, b, name, _ in self._found if (a, b) == (state, store)]
        return sorted(set(names))

    def speed(self, state: str, store: str, contestant: str, operation: Operation) -> float | None:
        """Return the median of raw bytes a second."""
        rounds = self._found.get((state, store, contestant, operation), {})
        return statistics.median(each.raw_bytes / each.seconds for each in rounds.values()) if rounds else None

    def stored(self, state: str, store: str, contestant: str) -> float | None:
        """Return stored bytes over raw bytes."""
        rounds = self._found.get((state, store, contestant, "save"), {})
        return statistics.median(each.stored_bytes / each.raw_bytes for each in rounds.values()) if rounds else None

    def ratio(self, state: str, store: str, operation: Operation, contestant: str, peer: str) -> float | None:
        """Return how many times as fast as a peer a contestant is, paired."""
        ours = self._found.get((state, store, contestant, operation), {})
        theirs = self._found.get((state, store, peer, operation), {})
        pairs = [theirs[number].seconds / ours[number].seconds for number in ours.keys() & theirs.keys()]
        return statistics.median(pairs) if pairs else None

    def least_ratio(
        self, state: str, store: str, operation: Operation, contestant: str, peers: Sequence[str]
    ) -> float | None:
        """Return the paired ratio to the fastest of several peers."""
        ratios = [self.ratio(state, store, operation, contestant, peer) for peer in peers]
        return min((ratio for ratio in ratios if ratio is not None), default=None)
