"""Jobs of several ranks that save to and load from one path at the same time."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.demo.ranks import Ranks
from dcp_storage.errors import CheckpointReplaced

LIMIT_S = 100
SAVES = 12


def state_of(value):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return {"sharded": distribute_tensor(torch.full((1003, 256), float(value)), mesh, [Shard(0)]), "step": value}


def write(rank, place):
    for number in range(SAVES):
        writer = AsyncStorageWriter(place["path"], sync_files=False)
        dcp.save(state_of(place["base"] + number), storage_writer=writer, planner=ShardedSavePlanner())
    rank.report("done")


def read(rank, place):
    """Load until a file says stop; after each load the ranks compare what they got."""
    seen, replaced = [], 0
    while not all_agree(Path(place["stop"]).exists()):
        state = state_of(-1)
        try:
            dcp.load(state, storage_reader=AsyncStorageReader(place["path"]), planner=ShardedLoadPlanner())
        except CheckpointException as error:
            assert {type(cause) for cause, _ in error.failures.values()} == {CheckpointReplaced}, error
            replaced += 1
        else:
            values = {*state["sharded"].full_tensor().unique().tolist(), state["step"]}
            assert len(values) == 1, f"a mix of saves: {values}"
            seen.append(state["step"])
    rank.report("seen", (seen, replaced))


def all_agree(here):
    """Whether rank 0 says so: the ranks may look at different times."""
    flag = torch.tensor([here])
    torch.distributed.broadcast(flag, src=0)
    return bool(flag)


@pytest.mark.parametrize("readers", [1, 2])
def test_ranks_read_one_save_or_all_raise_while_two_jobs_overwrite_it(tmp_path, readers):
    path, stop = tmp_path / "checkpoint", tmp_path / "stop"
    with Ranks(1, write, {"path": path, "base": 0}, limit_s=LIMIT_S) as first:
        assert [event.name for event in first.events()] == ["done"]
    with (
        Ranks(readers, read, {"path": path, "stop": stop}, limit_s=LIMIT_S) as reading,
        Ranks(2, write, {"path": path, "base": 100}, limit_s=LIMIT_S) as writing,
        Ranks(1, write, {"path": path, "base": 200}, limit_s=LIMIT_S) as also_writing,
    ):
        for job in (writing, also_writing):
            assert {event.name for event in job.events()} == {"done"}
        stop.touch()
        reports = [event.data for event in reading.events()]
    assert len(reports) == readers
    assert all(report == reports[0] for report in reports)
    with Ranks(2, read_last, {"path": path}, limit_s=LIMIT_S) as last:
        assert {event.data for event in last.events()} <= {100 + SAVES - 1, 200 + SAVES - 1}


def read_last(rank, place):
    state = state_of(-1)
    dcp.load(state, storage_reader=AsyncStorageReader(place["path"]), planner=ShardedLoadPlanner())
    rank.report("value", state["step"])
