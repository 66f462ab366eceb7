"""An embedding collection as torchrec shards one: tables row-, column-, table-wise and in a grid, and their moments."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, Codec, ShardedLoadPlanner, ShardedSavePlanner
from integration.demo.ranks import Rank, Ranks
from integration.resharding.layouts import layouts, parts
from integration.resharding.matrix import RIGHT, blank, compare
from tests.states import random_bits

TABLES = {"users": (1013, 16), "items": (517, 32), "words": (257, 24), "tags": (5, 8)}
PLANS = {
    4: {"users": "rows even", "items": "columns, several a rank", "words": "table on rank 2", "tags": "grid"},
    3: {"users": "columns", "items": "rows, interleaved", "words": "rows uneven", "tags": "table on rank 0"},
    2: {"users": "table on rank 1", "items": "grid", "words": "columns uneven", "tags": "rows, last rank empty"},
    1: {"users": "rows even", "items": "grid", "words": "columns", "tags": "rows even"},
}
"""How each number of ranks shards the tables."""


@dataclass(frozen=True)
class Job:
    action: str
    wrap: str
    place: Path
    compression: str


def run_tables(world: int, action: str, wrap: str, place: Path, compression: str) -> list[str]:
    """Save or load the collection; return what is not right."""
    with Ranks(world, run_in_rank, Job(action, wrap, place, compression), limit_s=60) as ranks:
        return [fault for event in ranks.events() for fault in event.data]


def run_in_rank(rank: Rank, job: Job) -> None:
    state = collection(rank, job.wrap)
    if job.action == "save":
        writer = AsyncStorageWriter(job.place, codec=Codec(job.compression), sync_files=False)
        dcp.save(state, storage_writer=writer, planner=ShardedSavePlanner())
        rank.report("done", [])
        return
    loaded = {kind: {name: blank(value, meta=False) for name, value in of.items()} for kind, of in state.items()}
    dcp.load(loaded, storage_reader=AsyncStorageReader(job.place), planner=ShardedLoadPlanner(dtype_policy="error"))
    expected = collection(rank, job.wrap)
    outcomes = {
        f"{kind}.{name}": compare(parts(value), parts(expected[kind][name]))
        for kind, of in loaded.items()
        for name, value in of.items()
    }
    rank.report("done", [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome != RIGHT])


def collection(rank: Rank, wrap: str) -> dict[str, dict[str, Any]]:
    """Weights, Adam's moment of the same shape, and row-wise Adagrad's: one number a row, sharded as the rows are."""
    state: dict[str, dict[str, Any]] = {"weight": {}, "exp_avg": {}, "momentum": {}}
    for number, (name, shape) in enumerate(TABLES.items()):
        torch.manual_seed(number)
        plan = PLANS[rank.world_size][name]
        by_rows = plan if plan.startswith(("rows", "table")) else "rows, last rank empty"
        state["weight"][name] = _sharded(rank, wrap, plan, random_bits(torch.bfloat16, shape))
        state["exp_avg"][name] = _sharded(rank, wrap, plan, random_bits(torch.float32, shape))
        state["momentum"][name] = _sharded(rank, wrap, by_rows, random_bits(torch.float32, shape[:1]))
    return state


def _sharded(rank: Rank, wrap: str, plan: str, full: Tensor) -> Any:
    [layout] = [one for one in layouts(rank.world_size, full.dim()) if one.name == f"{wrap}: {plan}"]
    return layout.build(rank.rank, full)
