"""`Checkpoints` on several ranks: what one rank finds, all are told; what one lacks, none waits for."""

import logging
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_storage import Checkpoints, KeepLatest, PerRank
from dcp_storage.errors import (
    BlockCorrupt,
    CheckpointExists,
    CheckpointNotFound,
    ConfigError,
    CoverageError,
    DcpStorageError,
    MissingKeys,
    StoreError,
)
from integration.demo.ranks import Ranks
from tests.hooks import Gate, On, fail, hooked

LIMIT_S = 100
ROWS = 1003


def state_of(value):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank = dist.get_rank()
    return {
        "weights": distribute_tensor(torch.full((ROWS, 64), float(value)), mesh, [Shard(0)]),
        "step": value,
        "own": {"rng": PerRank(torch.tensor([value, rank])), "place": PerRank({"rank": rank, "at": [value]})},
    }


def values_of(state):
    weights = {*state["weights"].to_local().unique().tolist()}
    own = state["own"]
    return weights | {state["step"], *own["place"].value["at"]}, own["rng"].value.tolist(), own["place"].value["rank"]


def run_ranks(count, task, config):
    """Run a task on ranks and return what each reported, by rank."""
    reported = {}
    with Ranks(count, task, config, limit_s=LIMIT_S) as ranks:
        for event in ranks.events():
            reported.setdefault(event.rank, []).append(event.data)
    return reported


def raised(call, *args, **kwargs):
    """Return the type of what a call raises, and its text."""
    try:
        call(*args, **kwargs)
    except DcpStorageError as error:
        return type(error), str(error)
    return None


def train():
    """What training does on its own gloo group, beside a save."""
    total = torch.ones(1000)
    dist.all_reduce(total)
    assert total.unique().item() == dist.get_world_size()


def save_steps(rank, config):
    with Checkpoints(config["root"], keep=KeepLatest(2), verify=config["verify"]) as checkpoints:
        for step in (1, 2, 3, 4, 5):
            state = state_of(step)
            if step % 2:
                checkpoints.save(step, state, metrics={"loss": 1 / step})
                continue
            future = checkpoints.async_save(step, state)
            state["weights"].to_local().fill_(-1)  # what training does next must not reach the checkpoint
            state["own"]["rng"].value.fill_(-1)
            state["own"]["place"].value["at"].append(-1)
            for _ in range(200):
                train()
            rank.report("saved", future.result())
        checkpoints.wait()
    rank.report("steps", [step.step for step in checkpoints.steps()] if rank.rank == 0 else None)


def load_steps(rank, config):
    state = state_of(-1)
    if config.get("regroup"):
        state["own"] = {
            "rng": PerRank(None, regroup=sum),
            "place": PerRank(None, regroup=lambda values: {"rank": [v["rank"] for v in values], "at": values[0]["at"]}),
        }
    if config.get("odd") == rank.rank:
        state["own"]["rng"].regroup = None
    with Checkpoints(config["root"]) as checkpoints:
        rank.report("step", raised(checkpoints.load, state, config.get("step")))
    if "odd" not in config:
        rank.report("values", values_of(state))


@pytest.mark.parametrize("verify", [None, "sizes", "full"])
def test_what_ranks_save_beside_training_comes_back_to_each(tmp_path, verify):
    saved = run_ranks(2, save_steps, {"root": str(tmp_path), "verify": verify})
    assert saved == {0: [2, 4, [4, 5]], 1: [2, 4, None]}
    loaded = run_ranks(2, load_steps, {"root": str(tmp_path)})
    assert loaded == {rank: [None, ({5.0}, [5, rank], rank)] for rank in range(2)}
    loaded = run_ranks(2, load_steps, {"root": str(tmp_path), "step": 4})
    assert loaded == {rank: [None, ({4.0}, [4, rank], rank)] for rank in range(2)}


def test_another_number_of_ranks_is_told_which_entries_were_a_rank_s_own_or_regroups_them(tmp_path):
    run_ranks(2, save_steps, {"root": str(tmp_path), "verify": None})
    told = run_ranks(3, load_steps, {"root": str(tmp_path)})
    for rank in range(3):
        kind, text = told[rank][0]
        assert kind is CoverageError
        assert "own.rng, own.place: saved by 2 ranks, but 3 ranks load" in text
    told = run_ranks(3, load_steps, {"root": str(tmp_path), "regroup": True, "odd": 1})
    assert [told[rank][0][0] for rank in range(3)] == [CoverageError] * 3, "one rank cannot, so none does"
    told = run_ranks(3, load_steps, {"root": str(tmp_path), "regroup": True})
    assert told == {rank: [None, ({5.0}, [10, 1], [0, 1])] for rank in range(3)}
    told = run_ranks(1, load_steps, {"root": str(tmp_path), "regroup": True})
    assert told == {0: [None, ({5.0}, [10, 1], [0, 1])]}


class Raising:
    """A `Stateful` that fails on one rank."""

    def __init__(self, rank):
        self._rank = rank

    def state_dict(self):
        return self._fail() or {"x": 1}

    def load_state_dict(self, state):
        self._fail()

    def _fail(self):
        if dist.get_rank() == self._rank:
            raise CoverageError("no state")


def make_mistakes(rank, config):
    odd, mine = config["odd"], rank.rank == config["odd"]
    with Checkpoints(config["root"]) as checkpoints:
        state = state_of(1)
        for save in (checkpoints.save, checkpoints.async_save):
            for bad in (True, -1, 1.5, "1", None, 2):
                rank.report("step", raised(save, bad if mine else 1, state)[0])
            rank.report("metrics", raised(save, 1, state, metrics={"loss": "low"} if mine else {"loss": 1})[0])
            rank.report("names", raised(save, 1, state | {"more": PerRank(1)} if mine else state)[0])
            rank.report("state", raised(save, 1, state | {"failing": Raising(odd)})[0])
        rank.report("nothing", checkpoints.load({"x": 1}))
        checkpoints.save(1, {"failing": Raising(None), "x": 1})
        rank.report("exists", raised(checkpoints.save, 1, state)[0])
        rank.report("load", raised(checkpoints.load, {"x": 1}, "1" if mine else 1)[0])
        rank.report("load", raised(checkpoints.load, {"x": 1}, None if mine else 1)[0])
        rank.report("absent", raised(checkpoints.load, {"x": 1}, 2)[0])
        rank.report("keys", raised(checkpoints.load, {"x": 1, "y": 1})[0])
        rank.report("state", raised(checkpoints.load, {"failing": Raising(odd)})[0])
        rank.report("should_save", raised(checkpoints.should_save, 3 if mine else 4)[0])
        rank.report("loaded", checkpoints.load({"x": None}))


@pytest.mark.parametrize("odd", [0, 1])
def test_a_mistake_on_one_rank_is_raised_on_both_and_the_next_call_works(tmp_path, odd):
    saves = [ConfigError] * 6 + [ConfigError, ConfigError, CoverageError]
    loads = [CheckpointExists, ConfigError, ConfigError, CheckpointNotFound, MissingKeys, CoverageError, ConfigError]
    expected = [*saves, *saves, None, *loads, 1]
    assert run_ranks(2, make_mistakes, {"root": str(tmp_path), "odd": odd}) == {0: expected, 1: expected}


def fail_in_the_background(rank, config):
    states = [state_of(value) for value in range(5)]
    full = On("put", fail)
    root = hooked(config["root"], before=full)

    def begin(step):
        full.active = rank.rank == config["odd"]
        future = checkpoints.async_save(step, states[step])
        wait_until(future.done)
        full.active = False
        return future

    with Checkpoints(root) as checkpoints:
        begin(1)
        rank.report("next", raised(checkpoints.save, 2, states[2])[0])
        checkpoints.save(2, states[2])
        begin(3)
        rank.report("wait", raised(checkpoints.wait)[0])
        checkpoints.wait()
        future = begin(3)
        if rank.rank == 0:  # the other one is not told yet, so that both are
            assert raised(future.result)[0] is StoreError
        rank.report("load", raised(checkpoints.load, {"step": 0})[0])
        rank.report("loaded", checkpoints.load({"step": 0}))
        begin(4)
        rank.report("close", raised(checkpoints.close)[0])
        checkpoints.close()
    with Checkpoints(root, on_error="log") as checkpoints:
        rank.report("logged", begin(3).result())
        full.active = rank.rank == config["odd"]
        rank.report("logged", checkpoints.save(3, states[3]))
        full.active = False
        rank.report("saved", checkpoints.save(4, states[4]))
        rank.report("failed", checkpoints.failed_saves)


@pytest.mark.parametrize("odd", [0, 1])
def test_what_fails_in_the_background_is_raised_once_by_the_next_call(tmp_path, odd):
    expected = [StoreError] * 3 + [2, StoreError, None, None, 4, 2]
    assert run_ranks(2, fail_in_the_background, {"root": str(tmp_path), "odd": odd}) == {0: expected, 1: expected}


def resume_from_damage(rank, config):
    logging.getLogger("dcp_storage").setLevel(logging.ERROR)
    with Checkpoints(config["root"]) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step))
        state = state_of(-1)
        if rank.rank == 0:
            damage(Path(config["root"]) / "step-3", config["odd"])
        dist.barrier()
        rank.report("strict", raised(checkpoints.load, state, strict=True)[0])
        rank.report("given", raised(checkpoints.load, state, 3)[0])
        rank.report("loaded", (checkpoints.load(state), values_of(state)[0]))
        checkpoints.save(3, state_of(3))  # it is known to be damaged
        rank.report("again", checkpoints.load(state))


def damage(step, rank):
    """Flip a byte in the middle of what a rank wrote: its shard of the weights."""
    [largest] = sorted(step.glob(f"*-{rank}-*"), key=lambda path: path.stat().st_size)[-1:]
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


@pytest.mark.parametrize("odd", [0, 1])
def test_damage_that_one_rank_reads_sends_all_to_the_step_before(tmp_path, odd):
    told = run_ranks(2, resume_from_damage, {"root": str(tmp_path), "odd": odd})
    assert told == {rank: [BlockCorrupt, BlockCorrupt, (2, {2.0}), 3] for rank in range(2)}


def load_from_a_failing_store(rank, config):
    failing = set()

    async def fail_some(operation):
        if operation.method in failing:
            fail(operation)

    with Checkpoints(hooked(config["root"], before=fail_some)) as checkpoints:
        checkpoints.save(1, state_of(1))
        if rank.rank == 0:
            failing.add("directories")
        rank.report("listing", raised(checkpoints.load, state_of(-1))[0])
        failing.clear()
        if rank.rank == config["odd"]:
            failing.add("get_range")
        rank.report("reading", raised(checkpoints.load, state_of(-1))[0])
        failing.clear()
        rank.report("loaded", checkpoints.load(state_of(-1)))


@pytest.mark.parametrize("odd", [0, 1])
def test_a_store_that_fails_is_never_no_checkpoints(tmp_path, odd):
    told = run_ranks(2, load_from_a_failing_store, {"root": str(tmp_path), "odd": odd})
    assert told == {rank: [StoreError, StoreError, 1] for rank in range(2)}


def leave_alone(rank, config):
    """One rank raises in the block, while its save goes on; the other closes, or trains on."""
    try:
        with Checkpoints(config["root"]) as checkpoints:
            checkpoints.async_save(1, state_of(1))
            if rank.rank == config["odd"]:
                raise KeyError("a mistake of training's")
    except KeyError:
        rank.report("left", "alone")
    except DcpStorageError as error:
        rank.report("left", "left its Checkpoints with an error" in str(error))
    else:
        rank.report("left", None)
    rank.report("saved", checkpoints.latest())


@pytest.mark.parametrize("odd", [0, 1])
def test_a_rank_that_leaves_by_an_error_waits_for_nobody_and_keeps_nobody_waiting(tmp_path, odd):
    begun = time.monotonic()
    told = run_ranks(2, leave_alone, {"root": str(tmp_path), "odd": odd})
    assert told == {odd: ["alone", 1], 1 - odd: [True, 1]}
    assert time.monotonic() - begun < LIMIT_S / 2


def be_signalled(rank, config):
    before = []
    signal.signal(signal.SIGTERM, lambda *_: before.append("called"))
    with Checkpoints(config["root"]) as checkpoints:
        assert not checkpoints.should_save(0)
        if rank.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        rank.report("told", [checkpoints.should_save(step) for step in (1, 2, 3)])
        rank.report("preempted", checkpoints.preempted)
        if rank.rank == 0:
            checkpoints.request_save()
        rank.report("told", [checkpoints.should_save(step) for step in (4, 5)])
        begun = time.monotonic()
        for step in range(1000):
            checkpoints.should_save(step)
        if rank.rank == 0:
            print(f"should_save takes {(time.monotonic() - begun) * 1000:.0f} us on {rank.world_size} ranks")
    os.kill(os.getpid(), signal.SIGTERM)
    rank.report("before", len(before))


def test_a_signal_to_one_rank_is_told_to_all_at_the_same_step(tmp_path):
    told = run_ranks(2, be_signalled, {"root": str(tmp_path)})
    assert told == {rank: [[True, False, False], True, [True, False], 1 + rank] for rank in range(2)}


def find_damage(rank, config):
    """Damage what a rank wrote of step 2 as soon as it is committed, before it is checked."""
    odd = config["odd"]

    def damage_once(operation):
        if operation.url.endswith("step-2"):
            checks.active = False
            damage(Path(operation.url), odd)

    checks = On("size", damage_once)
    checks.active = rank.rank == odd
    root = hooked(config["root"], before=checks)
    with Checkpoints(root, keep=KeepLatest(1), verify="full") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step))
            checkpoints.wait()
        checkpoints.save(3, state_of(3))
        checkpoints.wait()
        if rank.rank == 0:
            rank.report("kept", [step.step for step in checkpoints.steps()])
        dist.barrier()
    if rank.rank == 0:
        rank.report("kept", [step.step for step in checkpoints.steps()])


@pytest.mark.parametrize("odd", [0, 1])
def test_old_steps_go_only_for_a_step_that_every_rank_found_sound(tmp_path, odd):
    told = run_ranks(2, find_damage, {"root": str(tmp_path), "odd": odd})
    assert 1 in told[0][0]
    assert told[0][1] == [3]


def save_in_part_of_the_ranks(rank, config):
    group = dist.new_group([1, 2], timeout=timedelta(seconds=LIMIT_S))
    if rank.rank:
        with Checkpoints(config["root"], process_group=group) as checkpoints:
            own = PerRank(rank.rank)
            checkpoints.async_save(1, {"own": own, "x": 1}).result()
            own.value = None
            checkpoints.load({"own": own, "x": 2})
            rank.report("own", own.value)
    dist.barrier()


def test_a_process_group_of_some_ranks(tmp_path):
    told = run_ranks(3, save_in_part_of_the_ranks, {"root": str(tmp_path)})
    assert told == {1: [1], 2: [2]}


def wait_until(true):
    while not true():
        time.sleep(0.01)


def skip_while_busy(rank, config):
    gate = Gate("put")
    gate.active = rank.rank == 1
    with Checkpoints(hooked(config["root"], before=gate)) as checkpoints:
        future = checkpoints.async_save(1, state_of(1))
        rank.report("skipped", checkpoints.async_save(2, state_of(2), skip_if_busy=True).result())
        gate.opened.set()
        rank.report("saved", future.result())
        rank.report("saved", checkpoints.async_save(3, state_of(3), skip_if_busy=True).result())


def test_a_save_is_skipped_on_all_ranks_where_one_is_busy(tmp_path):
    told = run_ranks(2, skip_while_busy, {"root": str(tmp_path)})
    assert told == {rank: [None, 1, 3] for rank in range(2)}
