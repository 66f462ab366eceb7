"""Rounds in which every contestant saves and loads once, in turn."""

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from integration.bench.contestants import Contestant, Place, contestants
from integration.bench.results import Operation, Timing
from integration.bench.states import State, check_equal, like, poison, raw_bytes
from integration.bench.stores import LocalShelf, Shelf

T = TypeVar("T")


def run_cell(name: str, state: State, shelf: Shelf, rounds: int) -> Iterator[Timing]:
    """Yield every timing of one state at one store; round 0 comes on top and counts for nothing."""
    entrants = contestants(shelf.name)
    target = like(state)
    for number in range(rounds + 1):
        for entrant in rotate(entrants, number):
            turn = _Turn(entrant, state, target, shelf, check=number == 0)
            for operation, seconds, stored in turn.run():
                yield Timing(name, shelf.name, entrant.name, number, operation, seconds, raw_bytes(state), stored)


def rotate(entrants: Sequence[T], number: int) -> list[T]:
    """Return the order of a round: each in turn goes first, and every second round runs backwards.

    Rotation alone would always leave the same one in front of another.
    """
    step = -1 if number % 2 else 1
    return [entrants[(number + step * place) % len(entrants)] for place in range(len(entrants))]


class _Turn:
    """One contestant's turn in one round."""

    def __init__(self, entrant: Contestant, state: State, target: State, shelf: Shelf, *, check: bool) -> None:
        self._entrant = entrant
        self._state = state
        self._target = target
        self._shelf = shelf
        self._check = check

    def run(self) -> Iterator[tuple[Operation, float, int]]:
        """Save to a fresh place, load from it, and remove it; yield operation, seconds and stored bytes."""
        shelf, place = self._shelf, self._shelf.new_place()
        os.sync()  # nobody is to write what another left in the page cache
        seconds = _timed(lambda: self._entrant.save(self._state, place))
        stored = shelf.stored_bytes(place)
        yield "save", seconds, stored
        if isinstance(shelf, LocalShelf):
            shelf.warm(place)
            yield "load warm", self._load(place), stored
            shelf.chill(place)
            yield "load cold", self._load(place), stored
        else:
            yield "load warm", self._load(place), stored
        shelf.delete(place)

    def _load(self, place: Place) -> float:
        poison(self._target)
        seconds = _timed(lambda: self._entrant.load(self._target, place))
        if self._check:
            check_equal(self._target, self._state, self._entrant.name)
        return seconds


def _timed(work: Callable[[], None]) -> float:
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
