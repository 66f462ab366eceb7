"""What one process is enough to show: ways to lose state that look like a load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.geometry import Box
from tests.fake_ranks import Shards


class Contestant:
    """`ours` or `stock`: writer, reader and planners behind one pair of calls."""

    def __init__(self, name: str) -> None:
        self.ours = name == "ours"

    def save_planner(self, **options: Any) -> Any:
        return (ShardedSavePlanner if self.ours else DefaultSavePlanner)(**options)

    def save(self, state: dict[str, Any], place: Path, planner: Any = None) -> None:
        writer = AsyncStorageWriter if self.ours else dcp.FileSystemWriter
        dcp.save(state, storage_writer=writer(place), planner=planner or self.save_planner())

    def load(self, state: dict[str, Any], place: Path, **options: Any) -> None:
        reader, planner = (
            (AsyncStorageReader, ShardedLoadPlanner) if self.ours else (dcp.FileSystemReader, DefaultLoadPlanner)
        )
        dcp.load(state, storage_reader=reader(place), planner=planner(**options))


def number_keys(who: Contestant, place: Path) -> bool:
    who.save({"state": {0: {"step": 5}}}, place)
    state = {"state": {0: {"step": 0}}}
    who.load(state, place)
    return state == {"state": {0: {"step": 5}}}


def not_flattened(who: Contestant, place: Path) -> bool:
    who.save({"opt": {"lr": 0.5}}, place, who.save_planner(flatten_state_dict=False))
    state = {"opt": {"lr": 0.0}}
    who.load(state, place, flatten_state_dict=False)
    return state == {"opt": {"lr": 0.5}}


def partial_load_keeps_objects(who: Contestant, place: Path) -> bool:
    marker = object()
    who.save({"a": torch.ones(1)}, place)
    state = {"a": torch.zeros(1), "config": marker}
    who.load(state, place, allow_partial_load=True)
    return state["config"] is marker


def partial_load_keeps_meta(who: Contestant, place: Path) -> bool:
    """A tensor without memory that is not stored must not become one of chance values."""
    who.save({"a": torch.ones(1)}, place)
    state = {"a": torch.zeros(1), "head": torch.empty(3, device="meta")}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        who.load(state, place, allow_partial_load=True)
    finally:
        torch.distributed.destroy_process_group()
    return state["head"].is_meta


def shard_of_another_shape(who: Contestant, place: Path) -> bool:
    who.save({"t": torch.ones(4, 2)}, place)
    table = Shards((4, 2), [(Box((0, 0), (4, 2)), torch.zeros(9, 3))], torch.float32)
    who.load({"t": table}, place)
    return False  # there is nothing that it could have loaded rightly


def cached_plan_and_new_dtype(who: Contestant, place: Path) -> bool:
    planner = who.save_planner(enable_plan_caching=True)
    for step, dtype in enumerate((torch.float32, torch.float64)):
        who.save({"t": torch.arange(4, dtype=dtype)}, place / str(step), planner)
    reader = AsyncStorageReader(place / "1") if who.ours else dcp.FileSystemReader(place / "1")
    return reader.read_metadata().state_dict_metadata["t"].properties.dtype == torch.float64


TRAPS: dict[str, Callable[[Contestant, Path], bool]] = {
    "objects under keys that are numbers": number_keys,
    "flatten_state_dict=False": not_flattened,
    "partial load: objects that are not stored stay": partial_load_keeps_objects,
    "partial load: meta tensors that are not stored stay": partial_load_keeps_meta,
    "a hook's shard of another shape than its chunk": shard_of_another_shape,
    "cached plan, then another dtype": cached_plan_and_new_dtype,
}


def spring(name: str, contestant: str, place: Path) -> str:
    """Return `right`, `wrong` (and nothing was raised) or what was raised."""
    try:
        return "right" if TRAPS[name](Contestant(contestant), place) else "wrong"
    except CheckpointException as error:
        return f"raised {type(error.failures[0][0]).__name__}"
