"""A quick slice of `python -m integration.faults`: saves broken at their operations, and disks that lose power."""

import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from dcp_storage.checkpoint.manifests import replaced_objects, write_manifest
from dcp_storage.dcp import writer
from dcp_storage.errors import StoreError
from integration.faults.disk import Disk
from integration.faults.faults import Fault, Op
from integration.faults.oracle import NOT_SYNCED, OURS
from integration.faults.parts import scratch
from integration.faults.places import Bucket, Directory
from integration.faults.points import Case, Laboratory, laboratory
from integration.faults.power import PowerCuts, without

TWO_RANKS = Case(OURS, "overwrite", 2, asynchronous=False)
HOUSE = {"run/": b"", "run/a": b"old"}


@pytest.fixture(params=[Directory, Bucket])
def lab(request: pytest.FixtureRequest) -> Iterator[Laboratory]:
    with scratch() as directory, laboratory(request.param(directory)) as opened:
        yield opened


def test_points_of_an_overwrite_by_two_ranks(lab):
    points = list(lab.points(TWO_RANKS, every=23))
    assert len(points) > 3
    assert [point for point in points if point.wrong] == []


def test_every_operation_that_matters_is_a_point(lab):
    kinds = {op.kind for ops in lab.record(TWO_RANKS).ops.values() for op in ops}
    if isinstance(lab.place, Directory):
        assert kinds - {"mkdir"} == {"open", "list", "create", "write", "fsync", "rename", "unlink"}
    else:
        assert kinds == {"get", "list", "put", "delete"}


def test_a_library_that_deletes_before_it_commits_is_found_out(lab, monkeypatch):
    async def hasty(store, draft, *, overwrite):
        await store.delete(await replaced_objects(store))
        await write_manifest(store, draft, over=None)

    monkeypatch.setattr(writer, "commit", hasty)
    assert "damaged" in {point.found for point in break_commit(lab)}


def test_a_library_that_swallows_an_error_is_found_out(lab, monkeypatch):
    async def careless(store, draft, *, overwrite):
        with suppress(StoreError):
            await write_manifest(store, draft, over=None)

    monkeypatch.setattr(writer, "commit", careless)
    assert "found save 1, not one of {8}" in {fault for point in break_commit(lab) for fault in point.wrong}


def break_commit(lab):
    """Break the operation that commits, in every way."""
    ops = lab.record(TWO_RANKS).ops[0]
    commit = max(at for at, op in enumerate(ops) if op.kind in lab.place.commits)
    for kind in lab.place.kinds:
        if kind.hits(ops[commit]):
            yield lab.break_at(TWO_RANKS, Fault(kind, 0, commit, frozenset({0, 1})), "")


def disk(*ops: Op) -> Disk:
    made = Disk(HOUSE)
    for op in ops:
        made.apply(op)
    return made


def contents(made: Disk, path: str) -> set[bytes | None]:
    return {files.get(path) for files in made.states(seed=0, samples=50)}


def test_what_is_synced_is_kept_and_what_is_not_may_be_anything():
    create, write = Op("create", "run/new"), Op("write", "run/new", offset=0, data=b"12345678")
    file, directory = Op("fsync", "run/new"), Op("fsync", "run")
    assert contents(disk(create, write), "run/new") == {None, b"", b"1234", b"12345678", bytes(8)}
    assert contents(disk(create, write, file), "run/new") == {None, b"12345678"}
    assert contents(disk(create, write, directory), "run/new") == {b"", b"1234", b"12345678", bytes(8)}
    assert contents(disk(create, write, file, directory), "run/new") == {b"12345678"}
    assert contents(disk(create, file, write, directory), "run/a") == {b"old"}


def test_renames_unlinks_and_directories_may_be_undone():
    made = disk(Op("create", "run/tmp"), Op("write", "run/tmp", data=b"new"), Op("fsync", "run/tmp"))
    assert contents(made, "run/a") == {b"old"}
    made.apply(Op("rename", "run/tmp", target="run/a"))
    assert contents(made, "run/a") == {b"old", b"new"}
    made.apply(Op("fsync", "run"))
    assert contents(made, "run/a") == {b"new"}
    assert contents(disk(Op("unlink", "run/a")), "run/a") == {b"old", None}
    inner = [Op("mkdir", "run/in"), Op("create", "run/in/x"), Op("fsync", "run/in")]
    assert contents(disk(*inner), "run/in/x") == {b"", None}
    assert contents(disk(*inner, Op("fsync", "run")), "run/in/x") == {b""}


def test_a_file_written_in_place_may_be_lost():
    made = disk(Op("create", "run/a"), Op("write", "run/a", data=b"newer"))
    assert {b"old", b"ne", b"newer", bytes(5)} <= contents(made, "run/a")


@pytest.fixture
def cut_power():
    with scratch() as directory, laboratory(Directory(directory)):
        yield lambda contestant=OURS: PowerCuts(directory / "power", contestant, 1)


def test_an_overwrite_survives_power_cuts(cut_power):
    cuts = cut_power()
    recording = cuts.record(overwrite=True)
    found = list(cuts.cuts(recording, samples=2, moments=lambda moment: moment > len(recording.ops) - 9))
    assert {cut.found for cut in found} == {"old", "new"}
    assert [cut for cut in found if cut.wrong] == []


def test_a_save_that_repairs_a_died_one_lasts(cut_power):
    """The died save made the directory, and did not live to sync the one around it."""
    cuts = cut_power()
    for recording, _ in zip(cuts.record_after_deaths(overwrite=False), range(4), strict=False):
        end = len(recording.ops)
        assert [cut for cut in cuts.cuts(recording, samples=1, moments=end.__eq__) if cut.wrong] == []


def test_the_simulation_finds_what_a_missing_sync_does(cut_power):
    cuts = cut_power(NOT_SYNCED)
    recording = cuts.record(overwrite=True)
    assert any(cut.wrong for cut in cuts.cuts(recording, samples=0, moments=len(recording.ops).__eq__))
    cuts = cut_power()
    recording = without(cuts.record(overwrite=True), lambda op: op.kind == "fsync" and op.path == "run/step-1")
    assert any(cut.wrong for cut in cuts.cuts(recording, samples=0, moments=len(recording.ops).__eq__))


def test_nothing_is_left_running(lab):
    before = threading.active_count()
    lab.record(TWO_RANKS)
    assert threading.active_count() <= before
