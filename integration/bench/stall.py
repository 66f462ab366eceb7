"""What an asynchronous save costs the training beside it."""

import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from mmap import mmap
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save

from dcp_storage import AsyncStorageWriter, ShardedSavePlanner
from dcp_storage.config import MIB
from dcp_storage.store.files import NewFile
from integration.bench.contestants import OURS, STOCK, WRITES, Place
from integration.bench.options import Options
from integration.bench.processes import in_fresh_process, pin_torch_threads
from integration.bench.results import Stall
from integration.bench.rounds import rotate
from integration.bench.states import State, mixed, on
from integration.bench.stores import LocalShelf
from integration.servers import free_ports

_EXECUTORS = {
    "THREAD": AsyncCheckpointerType.THREAD,
    "PROCESS": AsyncCheckpointerType.PROCESS,
}

Variant = tuple[str, str]
"""A contestant and its executor."""

_WRITES: Variant = (WRITES, "")
"""Another process writes the bytes of our checkpoint: what the disk itself costs training (on virtual machines)."""
_WRITE_BYTES = 16 * MIB

_VARIANTS = [*((name, executor) for executor in _EXECUTORS for name in (OURS, STOCK)), _WRITES]

_Begin = Callable[[str], Future[Any]]
"""Begins to write to a new directory."""


@dataclass(frozen=True)
class Window:
    """Steps done in a stretch of time, in seconds each."""

    steps: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.steps)

    @property
    def p99(self) -> float:
        return sorted(self.steps)[int(0.99 * (len(self.steps) - 1))]


def measure(shelf: LocalShelf, options: Options) -> list[Stall]:
    """Return the stalls of every contestant and executor, in turn in every round."""
    places = [shelf.new_place() for _ in _VARIANTS]
    found = in_fresh_process(_measure, places, options)
    for place in places:
        shelf.delete(place)
    return found


def _measure(places: list[Place], options: Options) -> list[Stall]:
    warnings.simplefilter("ignore")
    pin_torch_threads()
    _join_alone()
    training = _Training(options.alone_seconds, options.device)
    state = on(mixed(options.sizes), options.device)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as writer:
        savers: dict[Variant, _Begin] = {each: partial(_begin, *each, state) for each in _VARIANTS[:-1]}
        # The process of PROCESS is started by its first save, and memory taken.
        stored = [_first(save, place) for save, place in zip(savers.values(), places, strict=False)]
        savers[_WRITES] = partial(writer.submit, _write, stored[0])
        _first(savers[_WRITES], places[-1])
        training.alone()
        found = [
            _one(variant, number, training, savers[variant], place)
            for number in range(options.rounds)
            for variant, place in rotate(list(zip(_VARIANTS, places, strict=True)), number)
        ]
    dist.destroy_process_group()
    return found


def _first(begin: _Begin, place: Place) -> int:
    """Save once, and return the size of the checkpoint."""
    url = f"{place.url}/first"
    begin(url).result()
    stored = sum(path.stat().st_size for path in Path(url).iterdir())
    shutil.rmtree(url)
    return stored


def _one(variant: Variant, number: int, training: "_Training", begin: _Begin, place: Place) -> Stall:
    os.sync()
    alone = training.alone()
    url = f"{place.url}/{number}"
    start = time.perf_counter()
    done = begin(url)
    called = time.perf_counter() - start
    beside = training.run(lambda _: done.done())
    lost = time.perf_counter() - start - len(beside.steps) * alone.mean
    done.result()
    shutil.rmtree(url)
    return Stall(*variant, number, alone.mean, alone.p99, beside.mean, beside.p99, len(beside.steps), called, lost)


class _Training:
    """AdamW on a small model; on a GPU a wider one, whose steps take about as long."""

    def __init__(self, alone_seconds: float, device: str) -> None:
        self._alone_seconds = alone_seconds
        width = 512 if device == "cpu" else 4096
        layers = nn.Linear(256, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        self._model = nn.Sequential(*layers).to(device)
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        self._inputs = torch.randn(64, 256, device=device)
        self._labels = torch.randint(10, (64,), device=device)

    def alone(self) -> Window:
        """Train for as long as nothing else is to run."""
        return self.run(lambda spent: spent > self._alone_seconds)

    def run(self, ended: Callable[[float], bool]) -> Window:
        """Do steps, one at least, until it is ended."""
        steps: list[float] = []
        start = before = time.perf_counter()
        while not steps or not ended(before - start):
            self._step()
            now = time.perf_counter()
            steps.append(now - before)
            before = now
        return Window(steps)

    def _step(self) -> None:
        self._optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self._model(self._inputs), self._labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        loss.item()  # as a loop that logs its loss: a GPU is waited for


def _begin(name: str, executor: str, state: State, url: str) -> Future[Any]:
    ours = name == OURS
    writer = AsyncStorageWriter(url) if ours else FileSystemWriter(url)
    response = dcp_async_save(
        state,
        storage_writer=writer,
        planner=ShardedSavePlanner() if ours else None,
        async_checkpointer_type=_EXECUTORS[executor],
    )
    return cast("Future[Any]", getattr(response, "upload_completion", response))


def _write(nbytes: int, url: str) -> None:
    """Write a file with direct I/O, which takes next to no time of a core."""
    Path(url).mkdir(parents=True)
    file, data = NewFile(Path(url) / "data", sync=True), mmap(-1, _WRITE_BYTES)
    for _ in range(0, nbytes, _WRITE_BYTES):
        file.append(memoryview(data))
    file.finish()


def _join_alone() -> None:
    """Make a process group of one, which the PROCESS executor needs."""
    (port,) = free_ports(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo")
