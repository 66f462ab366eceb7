"""What several ranks of a machine read is read through its page cache, and nothing else."""

import mmap
import os
from dataclasses import replace

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from dcp_storage.dcp.loads.sharing import mark_shared, shared_items, wanted_of
from dcp_storage.store import reads
from dcp_storage.store.base import PAGE_BYTES, Room, room_bytes
from dcp_storage.store.residency import cached_bytes


def item(fqn, number=0):
    index = MetadataIndex(fqn, torch.Size([0]), number)
    none = torch.Size([0])
    return ReadItem(LoadItemType.TENSOR, index, none, index, none, torch.Size([1]))


def plan(host, *items):
    made = LoadPlan([item(*each) for each in items])
    return replace(made, storage_data=wanted_of(made, "save")._replace(host=host))


def marks(*plans):
    return [list(shared_items(each)) for each in mark_shared(plans)]


def test_chunks_that_two_ranks_of_a_machine_read_are_shared():
    assert marks(plan("a", ("x",), ("y", 0)), plan("a", ("y", 1), ("x",)), plan("b", ("x",), ("y", 0))) == [
        [True, False],
        [False, True],
        [False, False],
    ]


def test_what_one_rank_reads_twice_is_not_shared():
    assert marks(plan("a", ("x",), ("x",)), plan("a", ("y",))) == [[False, False], [False]]


def test_ranks_that_read_nothing_share_nothing():
    assert marks(plan("a"), plan("a")) == [[], []]


def test_a_plan_that_the_planner_changed_shares_nothing():
    [marked, _] = mark_shared([plan("a", ("x",)), plan("a", ("x",))])
    assert list(shared_items(marked)) == [True]
    assert list(shared_items(replace(marked, items=[*marked.items, item("y")]))) == [False, False]
    assert list(shared_items(replace(marked, storage_data=None))) == [False]


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
