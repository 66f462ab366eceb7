"""What several ranks of a machine read is read through its page cache, and nothing else."""

import mmap
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from dcp_storage import AsyncStorageWriter, Codec
from dcp_storage.checkpoint.manifests import read_manifest
from dcp_storage.checkpoint.place import Location
from dcp_storage.dcp.loads.sharing import Wanted, mark_shared, shared_items, wanted_of
from dcp_storage.store import reads
from dcp_storage.store.base import PAGE_BYTES, Room, room_bytes
from dcp_storage.store.residency import cached_bytes

ROWS, COLUMNS = 256, 1024  # of float32: a block of 64 KiB is 16 rows


@pytest.fixture
def contents(tmp_path, monkeypatch):
    state = {"x": torch.zeros(ROWS, COLUMNS), "y": torch.zeros(5), "\U0001f600": torch.zeros(3), "step": 3}
    dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path, codec=Codec(block_bytes=1 << 16)), no_dist=True)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    return Location(tmp_path).run(read_manifest)


def rows(start, stop):
    return read("x", (start, 0), (stop - start, COLUMNS))


def columns(start, stop):
    return read("x", (0, start), (ROWS, stop - start))


def read(fqn, offsets=(0,), sizes=(3,)):
    index, offsets = MetadataIndex(fqn, torch.Size([0] * len(offsets)), 0), torch.Size(offsets)
    return ReadItem(LoadItemType.TENSOR, index, offsets, index, offsets, torch.Size(sizes))


STEP = ReadItem(
    LoadItemType.BYTE_IO, MetadataIndex("step"), torch.Size([0]), MetadataIndex("step"), *[torch.Size([0])] * 2
)


def marks(contents, *plans):
    """Return the marks of the items of each plan, which is that of a rank of the machine that it begins with."""
    told = []
    for host, *items in plans:
        plan = LoadPlan(items)
        told.append(replace(plan, storage_data=wanted_of(plan, contents)._replace(host=host)))
    return [list(shared_items(each)) for each in mark_shared(told)]


def test_what_two_ranks_of_a_machine_read_is_shared(contents):
    found = marks(contents, ("a", rows(0, 256), read("y")), ("a", rows(0, 256), STEP), ("b", rows(0, 256), read("y")))
    assert found == [[True, False], [True, False], [False, False]]
    assert marks(contents, ("a", STEP), ("a", STEP)) == [[True], [True]]


def test_rows_that_differ_are_not_shared_and_columns_of_the_same_blocks_are(contents):
    assert marks(contents, ("a", rows(0, 128)), ("a", rows(128, 256))) == [[False], [False]]
    assert marks(contents, ("a", columns(0, 512)), ("a", columns(512, 1024))) == [[True], [True]]
    assert marks(contents, ("a", read("y", (0,), (2,))), ("a", read("y", (2,), (2,)))) == [[True], [True]]


@given(st.lists(st.lists(st.integers(0, 9), max_size=9), min_size=1, max_size=4))
def test_shared_is_what_more_than_one_rank_reads(ranks):
    plans = [
        LoadPlan([STEP] * len(read), storage_data=Wanted("save", "a", np.array(read, np.uint64))) for read in ranks
    ]
    found = [list(shared_items(plan)) for plan in mark_shared(plans)]
    assert found == [[sum(each in other for other in ranks) > 1 for each in read] for read in ranks]


def test_what_one_rank_reads_twice_is_not_shared(contents):
    assert marks(contents, ("a", read("y"), read("y")), ("a", STEP)) == [[False, False], [False]]


def test_ranks_that_read_nothing_share_nothing(contents):
    assert marks(contents, ("a",), ("a",)) == [[], []]


def test_a_rank_alone_compares_nothing(contents, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    assert not len(wanted_of(LoadPlan([rows(0, 256)]), contents).reads)
    assert marks(contents, ("a", rows(0, 256))) == [[False]]


def test_a_plan_that_the_planner_changed_shares_nothing(contents):
    plan = LoadPlan([read("y")])
    plan = replace(plan, storage_data=wanted_of(plan, contents))
    [marked, _] = mark_shared([plan, plan])
    assert list(shared_items(marked)) == [True]
    assert list(shared_items(replace(marked, items=[*marked.items, STEP]))) == [False, False]
    assert list(shared_items(replace(marked, storage_data=None))) == [False]


def test_ranks_agree_on_what_they_read(contents, tmp_path):
    """They are other processes, whose hashes of strings have other seeds."""
    code = (
        "import sys; sys.path.insert(0, '.'); from tests.test_load_sharing import *; "
        "dist.is_initialized, dist.get_world_size = lambda: True, lambda: 2; "
        f"contents = Location({str(tmp_path)!r}).run(read_manifest); "
        "print(wanted_of(LoadPlan([rows(3, 80), columns(1, 2), read(chr(0x1f600)), STEP]), contents).reads.tolist())"
    )
    command = [sys.executable, "-c", code]
    found = {
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    plan = LoadPlan([rows(3, 80), columns(1, 2), read(chr(0x1F600)), STEP])
    assert found == {f"{wanted_of(plan, contents).reads.tolist()}\n"}


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system does not tell what is cached")
@pytest.mark.parametrize("shared", [True, False])
def test_a_shared_read_leaves_its_bytes_to_the_others(tmp_path, shared):
    path, size = tmp_path / "file", 40 * PAGE_BYTES
    data = os.urandom(size)
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_bytes(descriptor, 0, size):
        pytest.skip("this file system is the page cache")
    room = Room(memoryview(mmap.mmap(-1, room_bytes(size))), shared=shared)
    assert reads.read_range(path, 0, size, room) == data
    assert cached_bytes(descriptor, 0, size) == (size if shared else 0)
    os.close(descriptor)
