"""Many saves, one after the other, in place of the last."""

import gc
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace

from integration.bench.contestants import OURS, STOCK, Place, contestants
from integration.bench.processes import in_fresh_process, rss_bytes
from integration.bench.results import Repeats
from integration.bench.states import Sizes, mixed
from integration.bench.stores import LocalShelf


def measure(shelf: LocalShelf, sizes: Sizes, saves: int) -> Iterator[Repeats]:
    """Yield times and memory of this package's saves and of stock's."""
    for name in (OURS, STOCK):
        place = shelf.new_place()
        yield in_fresh_process(_repeat, name, place, replace(sizes, training=sizes.training // 16), saves)
        shelf.delete(place)


def _repeat(name: str, place: Place, sizes: Sizes, saves: int) -> Repeats:
    warnings.simplefilter("ignore")
    entrant = next(entrant for entrant in contestants("local") if entrant.name == name)
    state = mixed(sizes)
    seconds, rss = [], []
    for _ in range(saves):
        start = time.perf_counter()
        entrant.save(state, place)
        seconds.append(time.perf_counter() - start)
        gc.collect()
        rss.append(rss_bytes())
    return Repeats(name, seconds, rss)
