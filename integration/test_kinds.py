"""Kinds of tensors that need several ranks: FSDP1's and torchrec's, uneven ones, and staging that fails on one rank."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.errors import UnsupportedTensor
from integration.demo.ranks import Ranks

LIMIT_S = 100
WHOLE = torch.arange(12, dtype=torch.float32).view(6, 2)
HOWS = ["save", *AsyncCheckpointerType]


def rows_of(rank, world, rows=6):
    each = -(-rows // world)
    return min(rows, rank * each), min(rows, rank * each + each)


def sharded_tensor(fill):
    """Rows as FSDP1 deals them out: on four ranks the last one has none."""
    rank, world = dist.get_rank(), dist.get_world_size()
    first, stop = rows_of(rank, world)
    part = WHOLE[first:stop].clone() if fill else torch.zeros(stop - first, 2)
    place = ShardMetadata([first, 0], [stop - first, 2], f"rank:{rank}/cpu")
    return init_from_local_shards([LocalShard(part, place)] if stop > first else [], 6, 2)


def state_of(fill):
    return {
        "model": {"w": sharded_tensor(fill)},
        "optimizer": {"state": {0: {"m": sharded_tensor(fill)}}, "param_groups": [{"lr": 0.5 if fill else 0.0}]},
    }


def save(state, path, how, planner=None):
    writer = AsyncStorageWriter(path)
    if how == "save":
        dcp.save(state, storage_writer=writer, planner=planner)
        return
    future = dcp.async_save(state, storage_writer=writer, planner=planner, async_checkpointer_type=how)
    future.result(LIMIT_S)


def save_sharded(rank, place):
    for number, how in enumerate(HOWS):
        for planner in (ShardedSavePlanner(), None):
            save(state_of(fill=True), f"{place['path']}/{number}-{planner is None}", how, planner)
    rank.report("saved", True)


def load_sharded(rank, place):
    for path in sorted(Path(place["path"]).iterdir()):
        for partial in (False, True):
            state = state_of(fill=False)
            planner = ShardedLoadPlanner(allow_partial_load=partial)
            dcp.load(state, storage_reader=AsyncStorageReader(path), planner=planner)
            assert state["optimizer"]["param_groups"][0]["lr"] == 0.5, path
            assert not planner.skipped
            for value in (state["model"]["w"], state["optimizer"]["state"][0]["m"]):
                first, stop = rows_of(dist.get_rank(), dist.get_world_size())
                held = [shard.tensor for shard in value.local_shards()]
                assert torch.equal(torch.cat(held) if held else torch.empty(0, 2), WHOLE[first:stop]), path
    rank.report("loaded", True)


def test_sharded_tensors_resume_also_on_ranks_without_rows(tmp_path):
    """Saved by four ranks, one of which holds nothing, in every way; loaded by as many, more and fewer."""
    assert run_ranks(4, save_sharded, {"path": str(tmp_path)}) == dict.fromkeys(range(4), True)
    for count in (4, 1, 3):
        assert run_ranks(count, load_sharded, {"path": str(tmp_path)}) == dict.fromkeys(range(count), True)
    for path in tmp_path.iterdir():
        state = {"model": {"w": torch.zeros(6, 2)}}
        dcp.load(state, storage_reader=AsyncStorageReader(path), planner=ShardedLoadPlanner(allow_partial_load=True))
        assert torch.equal(state["model"]["w"], WHOLE)


def run_ranks(count, task, config):
    with Ranks(count, task, config, limit_s=LIMIT_S) as ranks:
        return {event.rank: event.data for event in ranks.events()}


def uneven(fill):
    """A DTensor of two equal halves that Megatron's hooks say lie the other way round."""
    from dcp_storage.dcp.kinds.boxes import Box, box_chunk, box_item

    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    box = Box((3 - 3 * rank, 0), (3, 2))
    local = WHOLE[box.slices].clone() if fill else torch.zeros(3, 2)
    value = DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size((6, 2)), stride=(2, 1))
    held = value._local_tensor
    held.__create_chunk_list__ = lambda: [box_chunk(box)]
    held.__create_write_items__ = lambda fqn, _: [box_item(fqn, box, (6, 2), torch.float32)]
    return value


def save_uneven(rank, place):
    for number, how in enumerate(HOWS):
        for planner in (ShardedSavePlanner(), None):
            save({"w": uneven(fill=True)}, f"{place['path']}/{number}-{planner is None}", how, planner)
    for path in sorted(Path(place["path"]).iterdir()):
        state = {"w": uneven(fill=False)}
        dcp.load(state, storage_reader=AsyncStorageReader(path), planner=ShardedLoadPlanner())
        assert torch.equal(state["w"]._local_tensor, WHOLE[3 - 3 * rank.rank :][:3]), path
    rank.report("done", True)


def test_hooks_of_local_tensors_survive_every_way_to_save(tmp_path):
    assert run_ranks(2, save_uneven, {"path": str(tmp_path)}) == {0: True, 1: True}
    for path in tmp_path.iterdir():
        state = {"w": torch.zeros(6, 2)}
        dcp.load(state, storage_reader=AsyncStorageReader(path), planner=ShardedLoadPlanner())
        assert torch.equal(state["w"], WHOLE), path


def shard_by_attributes(fill):
    """This rank's rows at the beginning of a buffer, with two rows of padding after them."""
    first, stop = rows_of(dist.get_rank(), dist.get_world_size())
    local = torch.full((stop - first + 2, 2), torch.nan)
    if fill:
        local[: stop - first] = WHOLE[first:stop]
    local.global_shape, local.global_offsets = (6, 2), ((first, 0),)
    local.local_offsets, local.local_sizes = ((0, 0),), ((stop - first, 2),)
    return local


def dtensor(fill):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(WHOLE if fill else torch.zeros(6, 2), mesh, [Shard(0)])


def save_attributes_and_dtensors(rank, place):
    for name, make in (("attributes", shard_by_attributes), ("dtensor", dtensor)):
        for number, how in enumerate(HOWS):
            save({"w": make(fill=True)}, f"{place['path']}/{name}-{number}", how, ShardedSavePlanner())
    rank.report("saved", True)


def load_attributes_and_dtensors(rank, place):
    first, stop = rows_of(dist.get_rank(), dist.get_world_size())
    for path in sorted(Path(place["path"]).iterdir()):
        state = {"w": dtensor(fill=False)}
        dcp.load(state, storage_reader=AsyncStorageReader(path), planner=ShardedLoadPlanner())
        assert torch.equal(state["w"].full_tensor(), WHOLE), path
        state = {"w": shard_by_attributes(fill=False)}
        dcp.load(state, storage_reader=AsyncStorageReader(path), planner=ShardedLoadPlanner())
        assert torch.equal(state["w"][: stop - first], WHOLE[first:stop]), path
        assert state["w"][stop - first :].isnan().all(), "padding was written to"
    rank.report("loaded", True)


@pytest.mark.parametrize("world", [1, 3, 4])
def test_shards_by_attributes_and_dtensors_load_into_each_other(tmp_path, world):
    place = {"path": str(tmp_path)}
    assert run_ranks(world, save_attributes_and_dtensors, place) == dict.fromkeys(range(world), True)
    for count in (1, 2, 4):
        assert run_ranks(count, load_attributes_and_dtensors, place) == dict.fromkeys(range(count), True)


def fail_staging(rank, place):
    fine = {"w": torch.ones(3), "mine": torch.ones(2)}
    odd = fine | {"mine": TwoTensor(torch.ones(2), torch.ones(2))}
    for kind in AsyncCheckpointerType:
        for planner in (ShardedSavePlanner(), None):
            state = odd if rank.rank == place["rank"] else fine
            began = time.monotonic()
            writer = AsyncStorageWriter(f"{place['path']}/failed")
            future = dcp.async_save(state, storage_writer=writer, planner=planner, async_checkpointer_type=kind)
            with pytest.raises(CheckpointException, match="mine is a TwoTensor") as failure:
                future.result(LIMIT_S)
            assert {number: type(cause) for number, (cause, _) in failure.value.failures.items()} == {
                place["rank"]: UnsupportedTensor
            }
            assert time.monotonic() - began < 60, "the others waited for the time-out"
            save(fine, f"{place['path']}/{kind.name}-{planner is None}", kind, planner)
    rank.report("done", True)


@pytest.mark.parametrize("failing", [0, 1])
def test_staging_that_fails_on_one_rank_fails_the_save_on_all(tmp_path, failing):
    assert run_ranks(2, fail_staging, {"path": str(tmp_path), "rank": failing}) == {0: True, 1: True}
    assert not (tmp_path / "failed").exists()
    assert len(list(tmp_path.iterdir())) == 4


def save_often(rank, place):
    """What one rank holds beyond the state after many saves, in MiB."""
    state = {f"w{n}": torch.randn(1 << 20) for n in range(20)}
    held = []
    for step in range(place["saves"]):
        writer = AsyncStorageWriter(f"{place['path']}/{step % 2}", sync_files=False)
        dcp.async_save(state, storage_writer=writer, planner=ShardedSavePlanner()).result(LIMIT_S)
        if step % 5 == 4:
            held.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20)
    rank.report("memory", held)


def test_memory_does_not_grow_from_save_to_save(tmp_path):
    for held in run_ranks(2, save_often, {"path": str(tmp_path), "saves": 40}).values():
        assert max(held[4:]) - min(held[1:4]) < 100, held
