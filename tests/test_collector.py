import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.collector import gc_paused


@pytest.fixture(params=[True, False], ids=["collecting", "not collecting"])
def enabled(request):
    before = gc.isenabled()
    (gc.enable if request.param else gc.disable)()
    yield request.param
    (gc.enable if before else gc.disable)()


def test_is_off_while_the_function_runs_and_then_as_before(enabled):
    @gc_paused
    def inner():
        assert not gc.isenabled()
        return 1

    @gc_paused
    def outer():
        return inner() + (not gc.isenabled())

    assert outer() == 2
    assert gc.isenabled() == enabled


def test_is_let_be_in_other_threads(enabled):
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(gc_paused(gc.isenabled)).result() == enabled


def test_is_as_before_after_an_error(enabled):
    with pytest.raises(ZeroDivisionError):
        gc_paused(lambda: 1 / 0)()
    assert gc.isenabled() == enabled


def test_saves_and_loads_leave_it_as_it_was(tmp_path, enabled):
    state = {"weight": torch.rand(100, 100), "step": 3}
    dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path), planner=ShardedSavePlanner())
    assert gc.isenabled() == enabled
    dcp.load(state, storage_reader=AsyncStorageReader(tmp_path), planner=ShardedLoadPlanner())
    assert gc.isenabled() == enabled


@pytest.fixture
def nothing_frozen():
    assert gc.get_freeze_count() < 1000
    yield
    gc.unfreeze()


def make_many():
    return [[] for _ in range(100_000)]


def test_many_new_objects_are_not_young_afterwards(nothing_frozen):
    gc.enable()
    made = gc_paused(make_many)()
    assert gc.get_count()[0] < 1000
    assert (len(made), gc.get_freeze_count() < 1000) == (100_000, True)


def test_circles_among_them_are_still_collected(nothing_frozen):
    class Node:
        pass

    @gc_paused
    def make_circle():
        node = Node()
        node.itself = node
        made.append(weakref.ref(node))
        return make_many()

    made = []
    make_circle()
    gc.collect()
    assert made[0]() is None


def test_what_the_program_has_frozen_stays_frozen(nothing_frozen):
    gc.freeze()
    frozen = gc.get_freeze_count()
    gc_paused(make_many)()
    assert gc.get_freeze_count() >= frozen - 1000  # some have been freed
