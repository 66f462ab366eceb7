"""Ranks that save alone (`no_dist=True`), each its part to a place of its own."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.cli import main
from dcp_storage.dcp.undocumented import LocalShardsWrapper
from dcp_storage.errors import CoverageError
from dcp_storage.verify import verify
from integration.demo.ranks import Ranks

LIMIT_S = 100
ROWS = 7
PLANNERS = {
    "own": (ShardedSavePlanner, ShardedLoadPlanner),
    "default": (dcp.DefaultSavePlanner, dcp.DefaultLoadPlanner),
}


def run_ranks(count, task, config):
    with Ranks(count, task, config, limit_s=LIMIT_S) as ranks:
        return {event.rank: event.data for event in ranks.events()}


def state_of(fill, value=0):
    """A sharded and a replicated tensor, a wrapper, a shard by its attributes, an object."""
    rank, world = dist.get_rank(), dist.get_world_size()
    full = torch.arange(ROWS * 2.0).view(ROWS, 2) + value
    state = {
        "sharded": distribute_tensor(
            full if fill else torch.zeros_like(full), init_device_mesh("cpu", (world,)), [Shard(0)]
        ),
        "replicated": torch.full((3,), 1.0 + value if fill else 0.0),
        "wrapper": LocalShardsWrapper([torch.full((2, 2), rank + 1.0 if fill else 0.0)], [(2 * rank, 0)]),
        "step": 5 + value if fill else 0,
    }
    shard = torch.full((2, 2), rank + 3.0 if fill else 0.0)
    shard.global_shape, shard.global_offsets = (2 * world, 2), [(2 * rank, 0)]
    shard.local_offsets, shard.local_sizes = [(0, 0)], [(2, 2)]
    return state | {"attributes": shard}


def without_ours(state, planners):
    """DCP's planners know neither wrappers nor attributes."""
    return state if planners == "own" else {name: state[name] for name in ("sharded", "replicated", "step")}


def locals_of(state):
    parts = {**state, "sharded": state["sharded"].to_local()}
    if "wrapper" in parts:
        parts["wrapper"] = parts["wrapper"].local_shards()[0]
    return {name: part.tolist() if isinstance(part, torch.Tensor) else part for name, part in parts.items()}


def save(state, place, planners, how):
    writer, planner = AsyncStorageWriter(place), PLANNERS[planners][0]()
    if how == "sync":
        dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    elif how == "without collectives":
        dcp.save(state, storage_writer=writer, planner=planner, no_dist=True, use_collectives=False)
    else:
        kind = AsyncCheckpointerType(how)
        future = dcp.async_save(
            state, storage_writer=writer, planner=planner, no_dist=True, async_checkpointer_type=kind
        )
        future.result(LIMIT_S)


def save_and_load(rank, config):
    place = f"{config['path']}/{rank.rank}"
    for value in (0, 1):
        state = without_ours(state_of(True, value), config["planners"])
        save(state, place, config["planners"], config["how"])
        loaded = without_ours(state_of(False), config["planners"])
        planner = PLANNERS[config["planners"]][1]()
        dcp.load(loaded, storage_reader=AsyncStorageReader(place), planner=planner, no_dist=True)
        assert locals_of(loaded) == locals_of(state)
    rank.report("done", True)


@pytest.mark.parametrize("planners", PLANNERS)
@pytest.mark.parametrize(
    ("how", "count"), [("sync", 1), ("sync", 2), ("sync", 4), ("thread", 2), ("without collectives", 2)]
)
def test_every_rank_has_its_part_back(tmp_path, how, count, planners):
    config = {"path": str(tmp_path), "how": how, "planners": planners}
    assert run_ranks(count, save_and_load, config) == dict.fromkeys(range(count), True)
    for rank in range(count):
        found = verify(tmp_path / str(rank))
        assert found.sound
        assert found.part == ((rank, count) if count > 1 else None)
        assert not found.orphans, "what the first save stored is deleted"


def save_alone(rank, config):
    save(state_of(True), f"{config['path']}/{rank.rank}", "own", "sync")
    rank.report("done", True)


def test_what_a_part_holds_and_lacks(tmp_path, capsys):
    run_ranks(2, save_alone, {"path": str(tmp_path)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {"replicated": torch.zeros(3), "step": 0}
        dcp.load(state, storage_reader=AsyncStorageReader(tmp_path / "1"), planner=ShardedLoadPlanner())
        assert state == {"replicated": state["replicated"], "step": 5}
        assert state["replicated"].tolist() == [1, 1, 1]
        for planner in (ShardedLoadPlanner(), dcp.DefaultLoadPlanner()):
            with pytest.raises(CheckpointException) as raised:
                dcp.load(
                    {"sharded": torch.zeros(ROWS, 2)},
                    storage_reader=AsyncStorageReader(tmp_path / "1"),
                    planner=planner,
                )
            error = raised.value.failures[0][0]
            assert isinstance(error, CoverageError)
            assert "the part of rank 1 of 2, which saved it alone (no_dist=True)" in str(error)
    assert main(["verify", str(tmp_path / "1")]) == 0
    assert "the part of rank 1 of 2, which saved it alone" in capsys.readouterr().out.replace("\n", " ")
    assert main(["verify", "--json", str(tmp_path / "1")]) == 0
    assert json.loads(capsys.readouterr().out)["part"] == [1, 2]


def save_whole(rank, config):
    if rank.rank == 1:
        dcp.save({"w": torch.ones(3)}, storage_writer=AsyncStorageWriter(config["path"]), no_dist=True)
    rank.report("done", True)


def test_one_rank_that_saves_what_is_whole(tmp_path):
    """As is usual: then it is a checkpoint like any other."""
    run_ranks(2, save_whole, {"path": str(tmp_path)})
    assert verify(tmp_path).part is None
    state = {"w": torch.zeros(3)}
    dcp.load(state, storage_reader=AsyncStorageReader(tmp_path))
    assert state["w"].tolist() == [1, 1, 1]


def save_overlap(rank, config):
    state = {"w": LocalShardsWrapper([torch.ones(2, 2), torch.ones(2, 2)], [(0, 0), (1, 0)])}
    with pytest.raises(CheckpointException) as raised:
        save(state, f"{config['path']}/{rank.rank}", "own", "sync")
    rank.report("done", str(next(iter(raised.value.failures.values()))[0]))


def test_shards_that_overlap_are_still_refused(tmp_path):
    assert all("overlap" in says for says in run_ranks(2, save_overlap, {"path": str(tmp_path)}).values())


def save_to_one_place(rank, config):
    for _ in range(5):
        save(state_of(True), config["path"], "own", "sync")
    rank.report("done", True)


def test_all_ranks_to_one_place(tmp_path):
    """One rank's part stands, whole, and says whose it is."""
    run_ranks(2, save_to_one_place, {"path": str(tmp_path)})
    found = verify(tmp_path)
    assert found.sound
    assert found.part in {(0, 2), (1, 2)}
    assert len(list(Path(tmp_path).glob(".metadata"))) == 1
