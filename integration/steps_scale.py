"""What it takes to list the steps of a run, to find the newest one and to resume from it, among few and many.

`python -m integration.steps_scale` prints a table for local disk, an S3 server (SeaweedFS) and the same one far away.
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dcp_storage import Checkpoints
from dcp_storage.checkpoint.place import Location
from dcp_storage.format.names import MANIFEST
from dcp_storage.steps.names import directory_of
from dcp_storage.store.base import Store
from dcp_storage.transfer.workers import for_each
from integration.bench.stores import STORES, Place, open_shelf


def fill(location: Location, steps: Sequence[int], source: int) -> None:
    """Make steps of which only the manifest is there, a copy of another step's: nobody loads them."""

    async def copy(root: Store) -> None:
        data = await root.child(directory_of(source)).get(MANIFEST)

        async def make(step: int) -> None:
            await root.child(directory_of(step)).commit(MANIFEST, data)

        await for_each(64, steps, make)

    location.run(copy)


def seconds(do: Callable[[], Any]) -> tuple[float, Any]:
    """Return the least of three, and what was returned."""
    spent = []
    for _ in range(3):
        begun = time.perf_counter()
        result = do()
        spent.append(time.perf_counter() - begun)
    return min(spent), result


def measure(place: Place, counts: Sequence[int]) -> Iterator[tuple[int, list[float]]]:
    """Yield, for each number of steps, the seconds of `steps`, `latest` and a load of the newest."""
    state = {"w": torch.arange(1000.0), "step": 0}
    made = 0
    for count in counts:
        with Checkpoints(place.url, storage_options=place.storage_options) as checkpoints:
            checkpoints.save(count, {**state, "step": count})
            fill(Location(place.url, place.storage_options), range(made + 1, count), count)
            made = count
            listing, steps = seconds(checkpoints.steps)
            assert len(steps) == count
            finding, newest = seconds(checkpoints.latest)
            resuming, resumed = seconds(lambda: checkpoints.load(state))
            assert newest == resumed == state["step"] == count
            yield count, [listing, finding, resuming]


@contextlib.contextmanager
def opened(name: str) -> Iterator[Place]:
    """Yield an empty place in a store."""
    with tempfile.TemporaryDirectory() as directory, open_shelf(name, Path(directory)) as shelf:
        yield shelf.new_place()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES))
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 100, 1000, 10_000])
    arguments = parser.parse_args()
    print(
        "| store | steps | list them, with metrics, s | find the newest, s | resume from it, s |\n|---|---|---|---|---|"
    )
    for name in arguments.stores:
        with opened(name) as place:
            for count, spent in measure(place, sorted(arguments.steps)):
                print(f"| {name} | {count:,} | {' | '.join(f'{each:.3f}' for each in spent)} |", flush=True)


if __name__ == "__main__":
    main()
