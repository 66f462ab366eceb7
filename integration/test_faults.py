"""A bounded run of `python -m integration.faults`, which does the same at every point."""

import os
import signal
from collections import Counter

import pytest
import torch.distributed.checkpoint as dcp

from integration.demo.ranks import RankError, Ranks
from integration.faults import full, strace
from integration.faults.faults import Injector
from integration.faults.http import try_requests
from integration.faults.oracle import NOT_SYNCED, OURS, STOCK, find, states
from integration.faults.parts import MUTANTS, scratch, try_mutants, try_points, try_power, try_power_after_deaths
from integration.faults.places import Bucket, Directory
from integration.faults.points import Case, laboratory
from integration.faults.ranks import ranks_are_threads, save_on_ranks
from integration.faults.soak import try_kills
from integration.faults.tally import Tally
from tests.hooks import On, hooked


@pytest.fixture
def tally():
    return Tally()


@pytest.mark.parametrize(("place", "every", "least"), [(Directory, 101, 40), (Bucket, 23, 50)])
def test_saves_broken_at_their_operations(tally, place, every, least):
    try_points(tally, place, OURS, every=every)
    assert tally.wrong(OURS.name) == []
    assert tally.total(OURS.name) > least
    assert {kind for _, _, kind in tally.rows} >= {"dies before", "dies after", "one rank dies"}


def test_power_cuts(tally):
    try_power(tally, OURS, samples=2)
    try_power_after_deaths(tally, OURS, samples=1, every=60)
    assert tally.wrong(OURS.name) == []
    assert tally.total(OURS.name) > 600


def test_the_simulation_of_power_cuts_has_teeth(tally):
    try_mutants(tally, samples=0)
    for writer in (NOT_SYNCED.name, *(f"{OURS.name}, {name}" for name in MUTANTS)):
        assert tally.wrong(writer), f"{writer}: nothing was found wrong with it"


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
def test_the_points_have_teeth(tally):
    """DCP's own writer overwrites files in place."""
    try_points(tally, Directory, STOCK, worlds=(1,), every=5)
    assert any("PytorchStreamReader" in fault or "EOFError" in fault for fault in tally.wrong(STOCK.name))


@pytest.mark.skipif(not strace.is_possible(), reason="needs strace, and to be let trace")
def test_real_system_calls_broken_by_strace(tally):
    strace.try_system_calls(tally, every=9)
    assert tally.wrong(OURS.name) == []
    assert {kind for _, _, kind in tally.rows} == {"SIGKILL", "EIO", "ENOSPC"}


@pytest.mark.skipif(not strace.is_possible(), reason="needs strace, and to be let trace")
def test_the_hooks_miss_no_system_call():
    with strace.tracer() as tracer:
        traced = Counter(name for name, _ in tracer.calls())
    with scratch() as directory, laboratory(Directory(directory)) as lab:
        ops = lab.record(Case(OURS, "overwrite", 1, asynchronous=False)).ops[0]
    recorded = Counter(op.kind for op in ops if op.path.startswith("run/step-1"))
    changes = ("write", "fsync", "rename", "unlink")
    assert {name: recorded[name] for name in changes} == {name: traced[name] for name in changes}


@pytest.mark.skipif(not full.is_possible(), reason="needs to mount a tmpfs")
def test_disks_that_really_fill_up(tally):
    full.try_full_disks(tally, every=5)
    assert tally.wrong(OURS.name) == []
    [row] = tally.rows.values()
    assert row.found["old"]
    assert row.found["new"]


def test_kills_at_random_moments(tally):
    try_kills(tally, 20)
    assert tally.wrong(OURS.name) == []


def test_kills_of_clients_of_a_server(tally, seaweedfs_server):
    """`python -m integration.faults soak-s3` kills and restarts the server, too."""
    try_kills(tally, 2, server=seaweedfs_server)
    assert tally.wrong(OURS.name) == []


def test_requests_broken_on_their_way(tally, seaweedfs_server):
    try_requests(tally, server=seaweedfs_server, every=31)
    assert tally.wrong(OURS.name) == []
    assert tally.total(OURS.name) > 1


def save_and_die(rank, place):
    """Overwrite a checkpoint with real ranks, of which one kills itself at an operation of its store."""
    dying = On(place["method"], lambda _: os.kill(os.getpid(), signal.SIGKILL), place["at"])
    dying.active = rank.rank == place["victim"]
    writer = OURS.writer(hooked(place["url"], **{place["when"]: dying}))
    try:
        dcp.save(states(2, 2)[rank.rank], storage_writer=writer, planner=OURS.save_planner())
    except BaseException as error:  # noqa: BLE001 - DCP's is no Exception
        rank.report("failed", type(error).__name__)
    else:
        rank.report("saved")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("victim", "method"), [(0, "put"), (1, "put"), (0, "commit"), (0, "delete")])
def test_the_death_of_a_real_rank_fails_the_other_and_harms_nothing(tmp_path, victim, method, when):
    url = str(tmp_path)
    with ranks_are_threads():
        old = states(1, 2)
        outcomes = save_on_ranks(old, lambda: OURS.writer(url), OURS.save_planner, Injector(), asynchronous=False)
    assert outcomes == [None, None]
    replaced = len(list(tmp_path.glob("*.distcp.zst")))
    at = replaced if (method, when) == ("delete", "after") else 1  # all are deleted, or none
    place = {"url": url, "victim": victim, "method": method, "when": when, "at": at}
    with Ranks(2, save_and_die, place, limit_s=60) as ranks:
        reports, ends = _hear(ranks)
    assert reports == {1 - victim: "failed"}
    assert f"rank {victim} of 2 ended by itself with exit code -9" in ends
    is_committed = method == "delete" or (method, when) == ("commit", "after")
    assert find(OURS, url, 2) == (2 if is_committed else 1)


def _hear(ranks):
    """Listen until every rank has ended, however it did."""
    reports, ends = {}, []
    while True:
        try:
            for event in ranks.events():
                reports[event.rank] = event.name
        except RankError as error:
            ends.append(str(error))
        else:
            return reports, ends
