"""What planning, commits and manifests cost at many ranks: fake ranks in one process, through the public hooks.

`python -m integration.scale` prints a table for this package and for stock DCP, and the exponents in the ranks.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from xxhash import xxh32_hexdigest

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, Codec, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.dcp.saves.results import Results, index_items
from dcp_storage.format.codecs.digests import DIGEST_CHARS, digest_of
from dcp_storage.format.manifest.columns import Columns, numbers, texts
from dcp_storage.format.names import data_object

ROWS, COLUMNS = 2, 64
"""The shape of each rank's shard."""


@dataclass
class Measured:
    """Seconds of each step for one number of ranks, and bytes of the manifest."""

    seconds: dict[str, float] = field(default_factory=dict)
    manifest_bytes: int = 0

    def time(self, step: str, do: Callable[[], Any]) -> Any:
        gc.collect()
        begun = time.perf_counter()
        result = do()
        self.seconds[step] = time.perf_counter() - begun
        return result


def names(tensors: int) -> list[str]:
    return [f"model.layers.{number // 8}.part{number % 8}.weight" for number in range(tensors)]


def plan_of(rank: int, ranks: int, tensors: int) -> SavePlan:
    """Return what a rank's planner would plan for its shards."""
    chunk = ChunkStorageMetadata(torch.Size((rank * ROWS, 0)), torch.Size((ROWS, COLUMNS)))
    properties = TensorProperties(dtype=torch.float32)
    size = torch.Size((ranks * ROWS, COLUMNS))
    items = [
        WriteItem(
            MetadataIndex(name, chunk.offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, properties, size),
        )
        for name in names(tensors)
    ]
    return SavePlan(items, planner_data={name: tuple(name.split(".")) for name in names(tensors)})


def stored_by_us(plan: SavePlan, rank: int, token: str, codec: Codec) -> Results:
    """Return what a rank would tell of the items of its plan."""
    count = len(plan.items)
    lengths = numbers(400 + (rank * 31 + number * 17) % 97 for number in range(count))
    said = [f"{rank} {number}".encode() for number in range(count)]
    stored = Columns(
        segments=np.ones(count, np.int64),
        blocks=np.ones(count, np.int64),
        objects=np.zeros(count, np.int64),
        offsets=np.cumsum(lengths) - lengths,
        lengths=lengths,
        checks=texts([xxh32_hexdigest(each) for each in said], 8),
        digests=texts([digest_of(each, codec.digest) for each in said], DIGEST_CHARS[codec.digest])
        if codec.digest
        else texts([], 1),
    )
    names, items = index_items([item.index for item in plan.items], [ROWS * COLUMNS * 4] * count)
    return Results(names, items, [data_object(token, rank, 0, ".distcp.zst")], stored, codec)


def stored_by_stock(plan: SavePlan, rank: int) -> list[WriteResult]:
    size = ROWS * COLUMNS * 4
    return [
        WriteResult(item.index, size, _StorageInfo(f"__{rank}_0.distcp", number * size, size))
        for number, item in enumerate(plan.items)
    ]


def shards(mesh: DeviceMesh, ranks: int, tensors: int) -> dict[str, Any]:
    local = torch.zeros(ROWS, COLUMNS)
    return {
        name: DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=torch.Size((ranks * ROWS, COLUMNS)), stride=(COLUMNS, 1)
        )
        for name in names(tensors)
    }


def measure(ranks: int, tensors: int, *, stock: bool, codec: Codec, directory: Path) -> Measured:
    """Plan, commit, read and plan to load on one of so many ranks."""
    measured = Measured()
    dist.init_process_group("fake", store=FakeStore(), rank=ranks // 2, world_size=ranks)
    try:
        state = shards(init_device_mesh("cpu", (ranks,)), ranks, tensors)
        _save(measured, state, ranks, tensors, stock=stock, codec=codec, directory=directory)
        _load(measured, state, stock=stock, directory=directory)
    finally:
        dist.destroy_process_group()
    return measured


def _save(
    measured: Measured,
    state: dict[str, Any],
    ranks: int,
    tensors: int,
    *,
    stock: bool,
    codec: Codec,
    directory: Path,
) -> None:
    planner: Any = DefaultSavePlanner() if stock else ShardedSavePlanner()
    writer: Any = dcp.FileSystemWriter(directory) if stock else AsyncStorageWriter(directory, codec=codec)
    planner.set_up_planner(state, None, is_coordinator=True)
    measured.time("plan on one rank", planner.create_local_plan)
    writer.reset(directory)
    writer.storage_meta()
    writer.set_up_storage_writer(is_coordinator=True)
    plans = [plan_of(rank, ranks, tensors) for rank in range(ranks)]
    plans, metadata = measured.time("global plan", lambda: planner.create_global_plan(plans))
    results: list[Any]
    if stock:
        results = [stored_by_stock(plan, rank) for rank, plan in enumerate(plans)]
    else:
        results = [stored_by_us(plan, rank, "0123456789abcdef", codec) for rank, plan in enumerate(plans)]
    writer.prepare_local_plan(SavePlan([]))
    measured.time("commit", lambda: writer.finish(metadata, results))
    measured.manifest_bytes = (directory / ".metadata").stat().st_size


def _load(measured: Measured, state: dict[str, Any], *, stock: bool, directory: Path) -> None:
    reader: Any = dcp.FileSystemReader(directory) if stock else AsyncStorageReader(directory)
    planner: Any = DefaultLoadPlanner() if stock else ShardedLoadPlanner()
    metadata: Metadata = measured.time("read the manifest", reader.read_metadata)

    def plan() -> Any:
        planner.set_up_planner(state, metadata, is_coordinator=True)
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        return planner.create_local_plan()

    measured.time("plan a load on one rank", plan)


def exponent(ranks: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the power of the ranks that seconds grow by, fitted by least squares."""
    points = [(log(x), log(y)) for x, y in zip(ranks, seconds, strict=True)]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def rows(ranks: Sequence[int], tensors: int, codec: Codec) -> Iterator[str]:
    for stock in (False, True):
        found = []
        for number in ranks:
            with tempfile.TemporaryDirectory() as directory:
                found.append(measure(number, tensors, stock=stock, codec=codec, directory=Path(directory)))
        who = "stock DCP" if stock else "dcp_storage"
        for step in found[0].seconds:
            seconds = [each.seconds[step] for each in found]
            shown = " | ".join(f"{each:.2f}" for each in seconds)
            power = f"{exponent(ranks, seconds):.2f}" if len(ranks) > 1 else ""
            yield f"| {who}: {step}, s | {shown} | {power} |"
        yield f"| {who}: manifest, MB | {' | '.join(f'{each.manifest_bytes / 1e6:.2f}' for each in found)} | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 512, 1024])
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--digest", choices=["xxh3_128", "sha256", "none"], default="xxh3_128")
    arguments = parser.parse_args()
    codec = Codec(digest=None if arguments.digest == "none" else arguments.digest)
    print(f"| {arguments.tensors} tensors, ranks: | {' | '.join(map(str, arguments.ranks))} | exponent |")
    print("|---" * (len(arguments.ranks) + 2) + "|")
    for row in rows(arguments.ranks, arguments.tensors, codec):
        print(row, flush=True)


if __name__ == "__main__":
    main()
