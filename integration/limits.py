"""`python -m integration.limits [--tensors 100000]`: time and memory of a checkpoint of very many small tensors."""

import argparse
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.verify import verify


def measure(tensors: int, path: Path) -> dict[str, tuple[float, float]]:
    """Save, load and verify so many tensors of 16 numbers; return seconds and growth of memory in MB of each.

    Raises:
        AssertionError: What was loaded is not what was saved, or `verify` finds damage.
    """
    state = {f"layers.{n // 10}.block.{n % 10}.weight": torch.full((16,), float(n)) for n in range(tensors)}
    blank = {name: torch.zeros(16) for name in state}
    found = {
        "save": _measured(
            lambda: dcp.save(state, storage_writer=AsyncStorageWriter(path), planner=ShardedSavePlanner())
        ),
        "load": _measured(
            lambda: dcp.load(blank, storage_reader=AsyncStorageReader(path), planner=ShardedLoadPlanner())
        ),
        "verify": _measured(lambda: _require_sound(path, tensors)),
    }
    assert all(torch.equal(blank[name], value) for name, value in state.items())
    return found


def _require_sound(path: Path, tensors: int) -> None:
    report = verify(path)
    assert report.sound
    assert report.tensors == report.blocks == tensors


def _measured(call: Callable[[], Any]) -> tuple[float, float]:
    memory, start = _peak_mb(), time.perf_counter()
    call()
    return time.perf_counter() - start, _peak_mb() - memory


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=100_000)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="dcp-storage-limits-") as directory:
        path = Path(directory)
        found = measure(args.tensors, path)
        sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    for step, (seconds, memory) in found.items():
        print(f"{step:<8}{args.tensors:>9,} tensors  {seconds:6.1f} s  peak of memory +{memory:.0f} MB")
    print(f".metadata is {sizes['.metadata'] / 1e6:.1f} MB, beside {len(sizes) - 1} data objects")
    return 0


if __name__ == "__main__":
    sys.exit(main())
