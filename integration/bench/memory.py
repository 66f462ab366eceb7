"""The most memory that a save and a load take on top of the state."""

import warnings
from collections.abc import Iterator

import torch

from integration.bench.contestants import OURS, S3_CONNECTOR, STOCK, Contestant, Place, contestants
from integration.bench.processes import in_fresh_process, peak_bytes, start_peak
from integration.bench.results import Peak
from integration.bench.states import Sizes, State, huge, like, raw_bytes
from integration.bench.stores import Shelf

_NAMES = (OURS, STOCK, S3_CONNECTOR)


def measure(shelf: Shelf, sizes: Sizes) -> Iterator[Peak]:
    """Yield the peaks of saving and loading one huge contiguous tensor: a copy of it would show as all of its size."""
    for name in [entrant.name for entrant in contestants(shelf.name) if entrant.name in _NAMES]:
        place, spare = shelf.new_place(), shelf.new_place()
        yield in_fresh_process(_save, shelf.name, name, place, spare, sizes)
        yield in_fresh_process(_load, shelf.name, name, place, spare, sizes)
        shelf.delete(place)
        shelf.delete(spare)


def _save(store: str, name: str, place: Place, spare: Place, sizes: Sizes) -> Peak:
    entrant, state = _entrant(store, name), huge(sizes)
    entrant.save(_tiny(), spare)  # modules and clients are loaded once in a process's life
    before = start_peak()
    entrant.save(state, place)
    return Peak(store, name, "save", raw_bytes(state), peak_bytes() - before)


def _load(store: str, name: str, place: Place, spare: Place, sizes: Sizes) -> Peak:
    entrant, target = _entrant(store, name), like(huge(sizes))
    entrant.load(_tiny(), spare)
    before = start_peak()
    entrant.load(target, place)
    return Peak(store, name, "load", raw_bytes(target), peak_bytes() - before)


def _tiny() -> State:
    return {"tensor": torch.zeros(1000)}


def _entrant(store: str, name: str) -> Contestant:
    warnings.simplefilter("ignore")
    return next(entrant for entrant in contestants(store) if entrant.name == name)
