"""Saves and loads of several ranks at once, each of which holds a part of every tensor, or all of it."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from integration.bench.contestants import OURS, OURS_RAW, STOCK, STOCK_T2, Contestant, Place, contestants
from integration.bench.results import Operation, Timing
from integration.bench.rounds import rotate
from integration.bench.states import Sizes, State, check_equal, like, mixed, on, poison, raw_bytes
from integration.bench.stores import LocalShelf
from integration.demo.ranks import Rank, Ranks

_NAMES = (OURS, OURS_RAW, STOCK, STOCK_T2)
_LIMIT_S = 900


@dataclass(frozen=True)
class _Job:
    directory: Path
    sizes: Sizes
    rounds: int
    device: str
    replicated: bool


def measure(directory: Path, sizes: Sizes, rounds: int, counts: Iterable[int], device: str) -> Iterator[Timing]:
    """Yield every timing of each number of ranks, which together hold one training state, of parts or of copies."""
    for count, replicated in product(counts, (False, True)):
        part = directory / f"{count}-ranks"
        job = _Job(part, replace(sizes, training=sizes.training // count), rounds, device, replicated)
        with Ranks(count, _measure, job, limit_s=_LIMIT_S) as ranks:
            for event in ranks.events():
                yield event.data


def _measure(rank: Rank, job: _Job) -> None:
    state = on(mixed(job.sizes), job.device)
    mesh = init_device_mesh(job.device, (rank.world_size,))
    target = like(state)
    shelf = LocalShelf(job.directory)
    entrants = [each for each in contestants("local") if each.name in _NAMES]
    for number in range(job.rounds + 1):
        for entrant in rotate(entrants, number):
            saved, loaded = (each if job.replicated else _shards(each, mesh) for each in (state, target))
            for operation, seconds, stored in _turn(entrant, saved, loaded, shelf):
                if operation != "save":
                    check_equal(target, state, entrant.name)
                    poison(target)
                if not rank.rank:
                    raw = raw_bytes(state) * (1 if job.replicated else rank.world_size)
                    name = f"mixed, {rank.world_size} ranks{', replicated' * job.replicated}"
                    rank.report("timing", Timing(name, "local", entrant.name, number, operation, seconds, raw, stored))


def _turn(
    entrant: Contestant, saved: dict[str, Any], loaded: dict[str, Any], shelf: LocalShelf
) -> Iterator[tuple[Operation, float, int]]:
    place, first = shelf.new_place(), not dist.get_rank()
    seconds = _timed(lambda: entrant.save(saved, place))
    stored = shelf.stored_bytes(place)
    yield "save", seconds, stored
    loads: list[tuple[Operation, Callable[[Place], None] | None]] = [
        ("load after save", None),
        ("load again", None),
        ("load warm", shelf.warm),
        ("load cold", shelf.chill),
    ]
    for operation, prepare in loads:
        if prepare and first:
            prepare(place)
        yield operation, _timed(lambda: entrant.load(loaded, place)), stored
    dist.barrier()
    if first:
        shelf.delete(place)


def _shards(state: State, mesh: Any) -> dict[str, Any]:
    """Return a state dict of the rank's rows of tensors that are as many times as high."""
    return {name: DTensor.from_local(rows, mesh, [Shard(0)], run_check=False) for name, rows in state.items()}


def _timed(work: Callable[[], None]) -> float:
    """Return how long the slowest rank takes."""
    dist.barrier()
    start = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - start
