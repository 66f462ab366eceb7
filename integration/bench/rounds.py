"""Rounds in which every contestant saves and loads once, in turn."""

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from integration.bench.contestants import OURS, OURS_RAW, Contestant, Place, contestants
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
            turn = _Turn(entrant, state, target, shelf, number)
            for who, operation, seconds, stored in turn.run():
                yield Timing(name, shelf.name, who, number, operation, seconds, raw_bytes(state), stored)


def rotate(entrants: Sequence[T], number: int) -> list[T]:
    """Return the order of a round: each in turn goes first, and every second round runs backwards.

    Rotation alone would always leave the same one in front of another.
    """
    step = -1 if number % 2 else 1
    return [entrants[(number + step * place) % len(entrants)] for place in range(len(entrants))]


class _Turn:
    """One contestant's turn in one round."""

    def __init__(self, entrant: Contestant, state: State, target: State, shelf: Shelf, number: int) -> None:
        self._entrant = entrant
        self._state = state
        self._target = target
        self._shelf = shelf
        self._number = number

    def run(self) -> Iterator[tuple[str, Operation, float, int]]:
        """Save to a fresh place, load from it, and remove it; yield who it was, operation, seconds and stored bytes."""
        shelf, place, name = self._shelf, self._shelf.new_place(), self._entrant.name
        os.sync()  # nobody is to write what another left in the page cache
        seconds = _timed(lambda: self._entrant.save(self._state, place))
        stored = shelf.stored_bytes(place)
        yield name, "save", seconds, stored
        if isinstance(shelf, LocalShelf):
            for who, seconds in self._with_disk(shelf, place):
                yield who, "load after save", seconds, stored
            yield name, "load again", self._load(place), stored
            shelf.warm(place)
            yield name, "load warm", self._load(place), stored
            shelf.chill(place)
            for who, seconds in self._with_disk(shelf, place):
                yield who, "load cold", seconds, stored
        else:
            yield name, "load after save", self._load(place), stored
        shelf.delete(place)

    def _with_disk(self, shelf: LocalShelf, place: Place) -> Iterator[tuple[str, float]]:
        """Load, and by turns before and after that only read what ours stored, past the page cache."""
        if self._entrant.name not in {OURS, OURS_RAW}:
            yield self._entrant.name, self._load(place)
            return
        both = [(self._entrant.name, self._load), (f"disk: {self._entrant.name}", shelf.read_past_cache)]
        for who, read in rotate(both, self._number):
            yield who, read(place)

    def _load(self, place: Place) -> float:
        poison(self._target)
        seconds = _timed(lambda: self._entrant.load(self._target, place))
        if not self._number:
            check_equal(self._target, self._state, self._entrant.name)
        return seconds


def _timed(work: Callable[[], None]) -> float:
    gc.collect()
    start = time.perf_counter()
    work()
    if torch.cuda.is_initialized():  # a load may return while copies to the GPU still run
        torch.cuda.synchronize()
    return time.perf_counter() - start
