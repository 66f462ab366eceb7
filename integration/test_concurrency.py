"""Jobs of several ranks that save to and load from one path at the same time."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner, load
from dcp_storage.errors import CheckpointReplaced
from integration.demo.ranks import Ranks
from tests.hooks import On, hooked

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
        state, reader = state_of(-1), AsyncStorageReader(place["path"])
        try:
            if place["patient"]:
                load(state, reader)
            else:
                dcp.load(state, storage_reader=reader, planner=ShardedLoadPlanner())
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


@pytest.mark.parametrize(("readers", "patient"), [(1, False), (2, False), (2, True)])
def test_ranks_read_one_save_or_all_raise_while_two_jobs_overwrite_it(tmp_path, readers, patient):
    path, stop = tmp_path / "checkpoint", tmp_path / "stop"
    with Ranks(1, write, {"path": path, "base": 0}, limit_s=LIMIT_S) as first:
        assert [event.name for event in first.events()] == ["done"]
    with (
        Ranks(readers, read, {"path": path, "stop": stop, "patient": patient}, limit_s=LIMIT_S) as reading,
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


def load_overtaken(rank, place):
    """Load while rank 1, before it reads, lets so many saves happen, one before each range."""

    def save_another(_):
        step = overtaking.seen
        if step <= place["saves"]:
            another = {"sharded": torch.full((1003, 256), float(step)), "step": step}
            dcp.save(another, storage_writer=AsyncStorageWriter(place["path"], sync_files=False), no_dist=True)

    overtaking = On("get_range", save_another)
    overtaking.active = rank.rank == 1
    state = state_of(-1)
    try:
        load(state, AsyncStorageReader(hooked(place["path"], before=overtaking)))
    except CheckpointException as error:
        rank.report("raised", {type(cause) for cause, _ in error.failures.values()})
    else:
        rank.report("loaded", {*state["sharded"].full_tensor().unique().tolist(), state["step"]})


@pytest.mark.parametrize(
    ("saves", "report"), [(0, ("loaded", {0})), (4, ("loaded", {4})), (99, ("raised", {CheckpointReplaced}))]
)
def test_ranks_begin_anew_together(tmp_path, saves, report):
    with Ranks(2, write, {"path": tmp_path / "checkpoint", "base": 1 - SAVES}, limit_s=LIMIT_S) as first:
        assert {event.name for event in first.events()} == {"done"}
    with Ranks(2, load_overtaken, {"path": tmp_path / "checkpoint", "saves": saves}, limit_s=LIMIT_S) as loading:
        assert [(event.name, event.data) for event in loading.events()] == [report] * 2
