"""The same tensors saved by so many ranks and loaded by so many others; each call is a process group of its own."""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.geometry import Box
from integration.demo.ranks import Rank, Ranks
from integration.resharding.layouts import layouts, parts
from integration.resharding.matrix import RIGHT, blank, compare, whole_tensor
from tests.fake_ranks import Shards
from tests.states import bits

DIMS = (1, 2, 3)


@dataclass(frozen=True)
class Job:
    """What the ranks do at which place, and how: `sync`, `thread`, `process` or `alone` (without collectives)."""

    action: str
    place: Path
    how: str = "sync"
    first: int = 0  # which layouts to load into: this one and every `step`-th after it
    step: int = 1


def run_jobs(world: int, jobs: list[Job], limit_s: float = 120) -> list[dict[str, str]]:
    """Run them in one set of ranks, and return of each job what is not right, by case and rank."""
    faults: list[dict[str, str]] = [{} for _ in jobs]
    with Ranks(world, run_in_rank, jobs, limit_s=limit_s) as ranks:
        for event in ranks.events():
            number, found = event.data
            faults[number] |= {f"rank {event.rank}: {case}": fault for case, fault in found.items()}
    return faults


def run_in_rank(rank: Rank, jobs: list[Job]) -> None:
    for number, job in enumerate(jobs):
        rank.report("done", (number, _ACTIONS[job.action](rank, job)))


def state_of(rank: Rank) -> dict[str, Any]:
    """Every layout of every tensor, by name, and an entry that is not a tensor."""
    full = {dims: whole_tensor(dims) for dims in DIMS}
    state = {
        f"{dims}-D {layout.name}": layout.build(rank.rank, full[dims])
        for dims in DIMS
        for layout in layouts(rank.world_size, dims)
    }
    return {**state, "epoch": 3}


def _save(rank: Rank, job: Job) -> dict[str, str]:
    state = state_of(rank)
    writer, planner = AsyncStorageWriter(job.place, sync_files=False), ShardedSavePlanner()
    if job.how == "sync":
        dcp.save(state, storage_writer=writer, planner=planner)
    elif job.how == "alone":
        dcp.save(state, storage_writer=writer, planner=planner, use_collectives=False)
    else:
        kind = AsyncCheckpointerType(job.how)
        state = {name: value for name, value in state.items() if not isinstance(value, Shards)}  # no copy, no pickle
        # The saving process is a child of the rank, which is itself a daemon of the tests.
        multiprocessing.current_process()._config["daemon"] = False
        saved = dcp.async_save(state, storage_writer=writer, planner=planner, async_checkpointer_type=kind)
        for value in state.values():  # what training does next must not reach the checkpoint
            if isinstance(value, torch.Tensor):
                blank(value, meta=False)
        saved.result(timeout=100)
    return {}


def _load(rank: Rank, job: Job) -> dict[str, str]:
    """Load what was saved in every layout of that number of ranks into some layouts of this one: the job's."""
    stored = AsyncStorageReader(job.place).read_metadata().state_dict_metadata
    full = {dims: whole_tensor(dims) for dims in DIMS}
    by_dims = {dims: layouts(rank.world_size, dims) for dims in DIMS}
    faults: dict[str, str] = {}
    for number in range(job.first, max(map(len, by_dims.values())), job.step):
        targets = {dims: known[number % len(known)] for dims, known in by_dims.items()}
        state: dict[str, Any] = {"epoch": None}
        for name in stored:
            if name != "epoch":
                dims = int(name[0])
                state[name] = blank(targets[dims].build(rank.rank, full[dims]), meta=False)
        dcp.load(state, storage_reader=AsyncStorageReader(job.place), planner=ShardedLoadPlanner())
        expected = {dims: parts(target.build(rank.rank, full[dims])) for dims, target in targets.items()}
        outcomes = {name: compare(parts(state[name]), expected[int(name[0])]) for name in stored if name != "epoch"}
        outcomes["epoch"] = RIGHT if state["epoch"] == 3 else "wrong"
        names = {dims: target.name for dims, target in targets.items()}
        faults |= {f"{name} -> {names}": outcome for name, outcome in outcomes.items() if outcome != RIGHT}
    return faults


def _load_refused(rank: Rank, job: Job) -> dict[str, str]:
    """Return what a load is refused with."""
    state = {"2-D full": torch.zeros(13, 9)}
    try:
        dcp.load(state, storage_reader=AsyncStorageReader(job.place), planner=ShardedLoadPlanner())
    except CheckpointException as error:
        cause = error.failures[rank.rank][0]
        return {"load": f"{type(cause).__name__}: {cause}"}
    return {"load": RIGHT if bits(state["2-D full"]).equal(bits(whole_tensor(2))) else "wrong"}


def _nonsense(rank: Rank, job: Job) -> dict[str, str]:
    """Return, for each way that only the last rank's part is wrong, what this rank is told; nothing may hang."""
    last = rank.rank == rank.world_size - 1
    told: dict[str, str] = {}
    table = table_of(rank)
    for name, spoilt in _spoilt(rank).items():
        told[f"save: {name}"] = _told(_save_table, job.place / "never", spoilt if last else table)
    _save_table(job.place, table)
    for name, spoilt in _spoilt(rank).items():
        told[f"load: {name}"] = _told(_load_table, job.place, spoilt if last else table_of(rank))
    told["afterwards"] = _told(_load_table, job.place, table)
    return told


def table_of(rank: Rank, rows: int = 2, extra: int = 0, start: int = 0) -> Shards:
    """A table of two rows a rank; `rows`, `extra` rows in memory and `start` spoil this rank's part."""
    box = Box((2 * rank.rank + start, 0), (rows, 3))
    return Shards((2 * rank.world_size, 3), [(box, torch.ones(rows + extra, 3))], torch.float32)


def _spoilt(rank: Rank) -> dict[str, Any]:
    [(part, _)] = table_of(rank).shards
    return {
        "out of bounds": table_of(rank, start=1),
        "negative offset": table_of(rank, start=-2 * rank.world_size),
        "shard of another shape": table_of(rank, extra=1),
        "another dtype": Shards((2 * rank.world_size, 3), [(part, torch.ones(2, 3).half())], torch.half),
        "another shape": torch.ones(7),
        "no tensor": "text",
    }


def _save_table(place: Path, table: Any) -> None:
    dcp.save({"m": {"t": table}}, storage_writer=AsyncStorageWriter(place), planner=ShardedSavePlanner())


def _load_table(place: Path, table: Any) -> None:
    planner = ShardedLoadPlanner(dtype_policy="error")
    dcp.load({"m": {"t": table}}, storage_reader=AsyncStorageReader(place), planner=planner)


def _told(call: Callable[[Path, Any], None], place: Path, table: Any) -> str:
    try:
        call(place, table)
    except CheckpointException as error:
        [cause, *_] = [failure[0] for failure in error.failures.values()]
        return f"{type(cause).__name__}: {cause}"
    return RIGHT


_ACTIONS = {"save": _save, "load": _load, "load refused": _load_refused, "nonsense": _nonsense}
