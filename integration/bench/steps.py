"""How long steps of a run keep training waiting: `Checkpoints`, and stock DCP with a directory a step."""

import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from dcp_storage import Checkpoints, KeepLatest
from integration.bench.contestants import OURS, STOCK, Place
from integration.bench.options import Options
from integration.bench.processes import in_fresh_process, pin_torch_threads
from integration.bench.results import Saved
from integration.bench.states import State, mixed, on
from integration.bench.stores import LocalShelf

if TYPE_CHECKING:
    from concurrent.futures import Future

_Begin = Callable[[int, State], "Future[Any] | None"]


def measure(shelf: LocalShelf, options: Options) -> list[Saved]:
    """Return how long saves of each kind blocked, and went on, each contestant in a fresh process."""
    found = []
    for name in (OURS, STOCK):
        place = shelf.new_place()
        found += in_fresh_process(_measure, name, place, options)
        shelf.delete(place)
    return found


def _measure(name: str, place: Place, options: Options) -> list[Saved]:
    warnings.simplefilter("ignore")
    pin_torch_threads()
    state = on(mixed(options.sizes), options.device)
    with _ours(place) if name == OURS else nullcontext(_stock(place)) as ways:
        # The first round takes memory, and is counted too: a run has it once.
        return [
            Saved(name, how, number, *_times(begin, 2 * number + odd, state))
            for number in range(options.rounds + 1)
            for odd, (how, begin) in enumerate(ways.items())
        ]


def _times(begin: _Begin, step: int, state: State) -> tuple[float, float]:
    start = time.perf_counter()
    future = begin(step, state)
    blocked = time.perf_counter() - start
    if future:
        future.result()
    return blocked, time.perf_counter() - start - blocked


@contextmanager
def _ours(place: Place) -> Iterator[dict[str, _Begin]]:
    with Checkpoints(place.url, keep=KeepLatest(1)) as checkpoints:

        def save(step: int, state: State) -> None:
            checkpoints.save(step, state)

        yield {"save": save, "async_save": checkpoints.async_save}


def _stock(place: Place) -> dict[str, _Begin]:
    def url(step: int) -> str:
        shutil.rmtree(f"{place.url}/{step - 1}", ignore_errors=True)
        return f"{place.url}/{step}"

    def save(step: int, state: State) -> None:
        dcp.save(state, storage_writer=FileSystemWriter(url(step)), no_dist=True)

    def async_save(step: int, state: State) -> "Future[Any]":
        response = dcp.async_save(state, storage_writer=FileSystemWriter(url(step)), no_dist=True)
        return cast("Future[Any]", getattr(response, "upload_completion", response))

    return {"save": save, "async_save": async_save}
