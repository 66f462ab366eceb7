"""Several gloo ranks on this machine: every way to save, every rank's failure, and loads on other numbers of ranks."""

import io
import logging
import os
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, Codec, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.errors import DcpStorageError, ManifestCorrupt, StoreError
from dcp_storage.store.residency import cached_bytes
from integration.demo.ranks import Ranks
from tests.hooks import On, hooked
from tests.states import assert_same, blank_like

LIMIT_S = 100
ROWS = 1003  # no multiple of any number of ranks


def full_state(value):
    generator = torch.Generator().manual_seed(value)
    return {
        "sharded": torch.randn(ROWS, 64, generator=generator),
        "half": torch.randn(ROWS, 8, generator=generator).bfloat16(),
        "replicated": torch.randn(33, generator=generator),
        "step": value,
    }


def sharded_state(value, fill=True):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = full_state(value)
    for name in ("sharded", "half"):
        state[name] = distribute_tensor(state[name] if fill else torch.zeros_like(state[name]), mesh, [Shard(0)])
    return state if fill else state | {"replicated": torch.zeros(33), "step": None}


def run_ranks(count, task, config):
    """Run a task on ranks and return what each reported, by rank."""
    with Ranks(count, task, config, limit_s=LIMIT_S) as ranks:
        return {event.rank: event.data for event in ranks.events()}


def load_on(rank, place):
    state = sharded_state(place["value"], fill=False)
    reader = AsyncStorageReader(place["url"], storage_options=place.get("options"))
    dcp.load(state, storage_reader=reader, planner=ShardedLoadPlanner())
    whole = {name: value.full_tensor() if name in {"sharded", "half"} else value for name, value in state.items()}
    assert_same(whole, full_state(place["value"]))
    rank.report("loaded", True)


def save_on(rank, place):
    value, how = place["value"], place["how"]
    writer = AsyncStorageWriter(place["url"], storage_options=place.get("options"), codec=Codec(block_bytes=16_384))
    planner = ShardedSavePlanner() if place.get("sharded", True) else None
    state = sharded_state(value)
    if how == "sync":
        dcp.save(state, storage_writer=writer, planner=planner)
    elif how == "without_collectives":
        dcp.save(state, storage_writer=writer, planner=planner, use_collectives=False)
    else:
        kind = AsyncCheckpointerType(how)
        future = dcp.async_save(state, storage_writer=writer, planner=planner, async_checkpointer_type=kind)
        state["sharded"].to_local().fill_(0)  # what training does next must not reach the checkpoint
        future.result(timeout=LIMIT_S)
    rank.report("saved", True)


@pytest.mark.parametrize("sharded", [True, False], ids=["our_planners", "default_planners"])
@pytest.mark.parametrize("how", ["sync", "thread", "process", "without_collectives"])
def test_saves_of_two_ranks_load_on_one_three_and_alone(tmp_path, how, sharded):
    place = {"url": str(tmp_path), "value": 3, "how": how, "sharded": sharded}
    assert run_ranks(2, save_on, place) == {0: True, 1: True}
    for count in (1, 3):
        assert run_ranks(count, load_on, place) == dict.fromkeys(range(count), True)
    state = blank_like(full_state(3))
    dcp.load(state, storage_reader=AsyncStorageReader(tmp_path), planner=ShardedLoadPlanner())
    assert_same(state, full_state(3))


def test_s3(s3_server):
    place = {"url": f"s3://{s3_server.new_bucket()}/run/step-1", "options": s3_server.storage_options, "value": 5}
    assert run_ranks(2, save_on, place | {"how": "sync"}) == {0: True, 1: True}
    assert run_ranks(2, save_on, place | {"how": "thread", "value": 6}) == {0: True, 1: True}
    assert run_ranks(3, load_on, place | {"value": 6}) == dict.fromkeys(range(3), True)


def test_a_save_without_collectives_is_refused_when_a_rank_s_manifest_is_missing(tmp_path):
    place = {"url": str(tmp_path), "value": 3, "how": "without_collectives"}
    run_ranks(3, save_on, place)
    next(tmp_path.glob("__1-*.metadata")).unlink()
    with pytest.raises(ManifestCorrupt, match=r"by 3 ranks, of which these did not commit: \[1\]"):
        AsyncStorageReader(tmp_path).read_metadata()


def wait_for(path):
    while not path.exists():
        time.sleep(0.01)


def save_parts(rank, place):
    """Save values 1, 2, ... to one path; ranks that the step does not name die before their commit."""
    options = {"planner": ShardedSavePlanner(), "use_collectives": False}

    def die(commit):
        others = Path(place["url"]) / commit.name.replace(f"__{rank.rank}", f"__{1 - rank.rank}")
        wait_for(others)  # a rank that dies takes the other with it
        os._exit(9)

    dying = On("commit", die)
    for value, committing in enumerate(place["steps"], 1):
        dying.active = rank.rank not in committing
        rank.report("begun", value)
        writer = AsyncStorageWriter(hooked(place["url"], before=dying))
        dcp.save(sharded_state(value), storage_writer=writer, **options)
    rank.report("saved", True)


def run_to_death(task, config, count=2):
    """Run ranks that die."""
    with pytest.raises(DcpStorageError), Ranks(count, task, config, limit_s=LIMIT_S) as ranks:
        list(ranks.events())


def test_a_restart_after_a_rank_died_saves_at_the_same_path(tmp_path):
    run_to_death(save_parts, {"url": str(tmp_path), "steps": [[0]]})
    assert len(list(tmp_path.glob("__*.metadata"))) == 1
    assert run_ranks(2, save_parts, {"url": str(tmp_path), "steps": [[0, 1]]}) == {0: True, 1: True}
    assert run_ranks(3, load_on, {"url": str(tmp_path), "value": 1}) == dict.fromkeys(range(3), True)
    run_to_death(save_parts, {"url": str(tmp_path), "steps": [[0, 1], [0, 1], [1]]})
    assert run_ranks(1, load_on, {"url": str(tmp_path), "value": 2}) == {0: True}
    assert len(list(tmp_path.glob("__*.metadata"))) == 2 + 2, "the last complete one, and parts of those that died"


def save_by_some(rank, place):
    group = dist.new_group([1, 2])
    state = {"mine": torch.full((4,), rank.rank), f"of_{rank.rank}": rank.rank}
    options = {"planner": ShardedSavePlanner(), "use_collectives": False}
    if rank.rank in {1, 2}:
        dcp.save(state, storage_writer=AsyncStorageWriter(f"{place}/some"), process_group=group, **options)
    dcp.save(state, storage_writer=AsyncStorageWriter(f"{place}/{rank.rank}"), no_dist=True, **options)
    rank.report("saved", True)


def test_without_collectives_some_ranks_or_one_save_by_themselves(tmp_path):
    run_ranks(3, save_by_some, str(tmp_path))
    for number in range(3):
        state = {"mine": torch.zeros(4, dtype=torch.int64), f"of_{number}": None}
        dcp.load(state, storage_reader=AsyncStorageReader(tmp_path / str(number)), planner=ShardedLoadPlanner())
        assert state["mine"].tolist() == [number] * 4
        assert state[f"of_{number}"] == number
    state = {"of_1": None, "of_2": None}
    dcp.load(state, storage_reader=AsyncStorageReader(tmp_path / "some"), planner=ShardedLoadPlanner())
    assert state == {"of_1": 1, "of_2": 2}


def fail_on(rank, place):
    def fail(operation):
        raise StoreError(f"{operation.url}: rank {rank.rank} has no space left")

    full = On(place["method"], fail)
    full.active = rank.rank == place["rank"]
    writer = AsyncStorageWriter(hooked(place["url"], before=full))
    try:
        dcp.save(sharded_state(2), storage_writer=writer, planner=ShardedSavePlanner())
    except CheckpointException as error:
        rank.report("failed", [str(cause) for cause, _ in error.failures.values()])


@pytest.mark.parametrize(("rank", "method"), [(0, "put"), (1, "put"), (2, "put"), (0, "commit"), (0, "get")])
def test_a_failure_on_any_rank_fails_the_save_on_every_rank(tmp_path, rank, method):
    run_ranks(3, save_on, {"url": str(tmp_path), "value": 1, "how": "sync"})
    before = sorted(tmp_path.iterdir())
    reports = run_ranks(3, fail_on, {"url": str(tmp_path), "rank": rank, "method": method})
    assert len(reports) == 3
    for causes in reports.values():
        assert causes == [f"{tmp_path}: rank {rank} has no space left"]
    if method != "get":  # else nothing tells whether the manifest names them
        assert sorted(tmp_path.iterdir()) == before, "every rank deletes what it put: the next save needs the room"
    assert run_ranks(1, load_on, {"url": str(tmp_path), "value": 1}) == {0: True}


def load_nothing(rank, place):
    try:
        dcp.load(sharded_state(1, fill=False), storage_reader=AsyncStorageReader(place["url"]))
    except CheckpointException as error:
        rank.report("failed", [type(cause).__name__ for cause, _ in error.failures.values()])


def test_a_missing_checkpoint_raises_on_every_rank(tmp_path):
    expected = ["CheckpointNotFound"] * 2
    assert run_ranks(2, load_nothing, {"url": str(tmp_path / "none")}) == {0: expected, 1: expected}


def hang(rank, place):
    if rank.rank == 0:
        dist.barrier()
    time.sleep(10 * LIMIT_S)


def test_ranks_that_hang_are_ended(tmp_path):
    with pytest.raises(DcpStorageError, match="did not finish"), Ranks(2, hang, None, limit_s=15) as ranks:
        list(ranks.events())


def save_with_cached_plans(rank, place):
    planner = ShardedSavePlanner(enable_plan_caching=True)
    writer = AsyncStorageWriter(place["url"])
    for step, dtype in enumerate([torch.float32, torch.float32, torch.float64, torch.float64]):
        state = sharded_state(step)
        state["sharded"] = state["sharded"].to(dtype)
        if step == 3:
            state["new"] = torch.ones(5)
        future = dcp.async_save(
            state,
            storage_writer=writer,
            planner=planner,
            checkpoint_id=f"{place['url']}/{step}",
            async_checkpointer_type=AsyncCheckpointerType(place["how"]),
        )
        future.result(timeout=LIMIT_S)
    rank.report("saved", True)


@pytest.mark.parametrize("how", ["thread", "process"])
def test_cached_plans_are_right_across_changed_paths_dtypes_and_keys(tmp_path, how):
    run_ranks(2, save_with_cached_plans, {"url": str(tmp_path), "how": how})
    for step, dtype in enumerate([torch.float32, torch.float32, torch.float64, torch.float64]):
        expected = full_state(step) | ({"new": torch.ones(5)} if step == 3 else {})
        expected["sharded"] = expected["sharded"].to(dtype)
        state = blank_like(expected)
        planner = ShardedLoadPlanner(dtype_policy="error")
        dcp.load(state, storage_reader=AsyncStorageReader(tmp_path / str(step)), planner=planner)
        assert_same(state, expected)


def save_stock_without_collectives(rank, place):
    dcp.save(sharded_state(place["value"]), storage_writer=dcp.FileSystemWriter(place["url"]), use_collectives=False)
    rank.report("saved", True)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_stock_saves_without_collectives_load_on_any_number_of_ranks(tmp_path, world):
    place = {"url": str(tmp_path), "value": 4}
    assert run_ranks(world, save_stock_without_collectives, place) == dict.fromkeys(range(world), True)
    assert not (tmp_path / ".metadata").exists()
    for count in (1, 2, 4):
        assert run_ranks(count, load_on, place) == dict.fromkeys(range(count), True)
    if world > 1:
        (tmp_path / "__0.metadata").unlink()
        with pytest.raises(CheckpointException, match=r"and lacks the parts of ranks \[0\]"):
            dcp.load(blank_like(full_state(4)), storage_reader=AsyncStorageReader(tmp_path))


def count_lines_on(rank, place):
    """Fail to load, to save and to match, and report the lines that each prints: DCP's warnings, and the traceback."""
    stock, path = place["stock"], place["path"]
    if stock:
        reader, writer, planner = dcp.FileSystemReader, dcp.FileSystemWriter, None
    else:
        reader, writer, planner = AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner()
    lines = {}
    for what, fail in {
        "nothing there": lambda: dcp.load({"w": torch.zeros(3)}, storage_reader=reader(path + "/no"), planner=planner),
        "another shape": lambda: dcp.load({"w": torch.zeros(4)}, storage_reader=reader(path), planner=planner),
        "not to be written": lambda: dcp.save({"w": torch.zeros(3)}, storage_writer=writer("/proc/no/step-1")),
    }.items():
        printed = io.StringIO()
        handler = logging.StreamHandler(printed)
        logging.getLogger().addHandler(handler)
        try:
            fail()
        except CheckpointException as error:
            traceback.print_exception(error, file=printed)
        logging.getLogger().removeHandler(handler)
        lines[what] = printed.getvalue().count("\n")
    rank.report("failed", lines)


@pytest.mark.parametrize("count", [1, 3])
def test_tracebacks_are_no_longer_than_stock_s(tmp_path, count):
    lines = {}
    for stock in (True, False):
        path = tmp_path / str(stock)
        writer = dcp.FileSystemWriter(path) if stock else AsyncStorageWriter(path)
        dcp.save({"w": torch.zeros(3)}, storage_writer=writer, no_dist=True)
        lines[stock] = run_ranks(count, count_lines_on, {"stock": stock, "path": str(path)})
    for rank in range(count):
        for what, ours in lines[False][rank].items():
            assert ours <= lines[True][rank][what], (what, rank)
        assert lines[False][rank].keys() == lines[True][rank].keys()


def load_cold(rank, config):
    place, replicated = config
    mesh = init_device_mesh("cpu", (rank.world_size,))
    full = torch.arange(1 << 20, dtype=torch.float32)
    state = {"w": full if replicated else distribute_tensor(full, mesh, [Shard(0)])}
    dcp.save(state, storage_writer=AsyncStorageWriter(place), planner=ShardedSavePlanner())
    dcp.load(state, storage_reader=AsyncStorageReader(place), planner=ShardedLoadPlanner())
    loaded = state["w"] if replicated else state["w"].full_tensor()
    assert torch.equal(loaded, full)


@pytest.mark.parametrize("replicated", [True, False])
def test_what_all_ranks_of_a_machine_read_is_read_from_its_disk_once(tmp_path, replicated):
    run_ranks(2, load_cold, (tmp_path, replicated))
    objects = [path for path in tmp_path.iterdir() if path.name.endswith(".distcp.zst")]
    cached = 0
    for path in objects:
        with path.open("rb") as file:
            cached += cached_bytes(file.fileno(), 0, path.stat().st_size)
    assert cached == (sum(path.stat().st_size for path in objects) if replicated else 0)
