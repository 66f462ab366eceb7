"""What `async_save` copies before it returns: the elements and nothing else, into memory that is used again."""

import collections
import dataclasses
import gc
import os
import pickle
import threading
import types
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.testing._internal.two_tensor import TwoTensor
from torch.torch_version import TorchVersion

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner, Transfer
from dcp_storage.dcp.staging import pool, staged
from dcp_storage.dcp.staging.stage import stage
from dcp_storage.errors import StagingError, UnsupportedEntry, UnsupportedTensor
from tests.fake_ranks import Shards
from tests.states import assert_same, blank_like, every_dtype

MIB = 1 << 20
async_save = partial(dcp.async_save, no_dist=True)
keeping = partial(stage, keep=True)


@pytest.fixture(autouse=True)
def a_pool_of_its_own(monkeypatch):
    gc.collect()
    monkeypatch.setattr(staged, "POOL", fresh := pool.Pool())
    monkeypatch.setattr("dcp_storage.dcp.staging.stage.POOL", fresh)
    return fresh


def odd_tensors():
    """Tensors whose storage is not what they hold."""
    torch.manual_seed(1)
    wide = torch.randn(MIB)
    weight = torch.nn.Parameter(torch.randn(4, 4))
    weight.lock = threading.Lock()
    graph = torch.randn(3, requires_grad=True) * 2
    tied = torch.randn(7, 7)
    return {
        **every_dtype(),
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "neg": torch.randn(3, dtype=torch.complex128).conj().imag,
        "few of many": wide[5:9],
        "overlapping": wide.as_strided((3, 4), (1, 2), 7),
        "a lock": weight,
        "not a leaf": graph,
        "tied": [tied, tied, tied.t(), tied[0]],
        "tuple": (torch.randn(2), {"deep": torch.ones(1)[0]}, "text"),
    }


@pytest.mark.parametrize("sharded", [True, False], ids=["our_planners", "default_planners"])
@pytest.mark.parametrize("kind", AsyncCheckpointerType, ids=lambda kind: kind.name)
def test_a_state_is_saved_as_it_was(tmp_path, process_group, kind, sharded):
    state = odd_tensors()
    writer, planner = AsyncStorageWriter(tmp_path), ShardedSavePlanner() if sharded else None
    future = dcp.async_save(state, storage_writer=writer, planner=planner, async_checkpointer_type=kind)
    with torch.no_grad():
        state["float32"].fill_(0)  # what training does next
        state["a lock"].fill_(0)
        state["tuple"][0].fill_(0)
    state["objects"]["list"].append("later")
    future.result(100)
    expected = odd_tensors()
    loaded = blank_like(expected)
    planner = ShardedLoadPlanner() if sharded else None
    dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path), planner=planner)
    pairs = [(state.pop("tuple"), list) for state in (loaded, expected)]
    assert_same(*[kind(value) for value, kind in pairs])
    assert_same(loaded, expected)


def test_dcp_takes_the_writer_for_its_stager(tmp_path):
    assert isinstance(AsyncStorageWriter(tmp_path), AsyncStager)


def test_elements_are_copied_and_not_their_storages(lent):
    wide = torch.randn(64 * MIB)
    assert keeping({f"w{n}": wide[n * 4 : n * 4 + 4] for n in range(100)}).error is None
    assert lent == [100 * 64]
    tied = torch.randn(1000)
    keeping({"a": tied, "b": [tied, torch.nn.Parameter(tied)]})
    assert lent[1:] == [4032]


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [tensor for inner in values for tensor in tensors(inner)]


@pytest.fixture
def lent(monkeypatch):
    """The sizes of all loans."""
    sizes, real = [], pool.Pool.lend

    def lend(self, nbytes, **options):
        sizes.append(nbytes)
        return real(self, nbytes, **options)

    monkeypatch.setattr(pool.Pool, "lend", lend)
    return sizes


def test_staged_tensors_have_storages_of_their_own_size():
    """Else an entry that is pickled whole would hold all of the state."""
    state = keeping({"a": torch.randn(100), "b": (torch.randn(10), torch.randn(3, 3).bfloat16())})
    sizes = [tensor.untyped_storage().nbytes() for tensor in tensors(state)]
    assert sizes == [400, 40, 18]


def address(state):
    return min(tensor.data_ptr() for tensor in tensors(state) if tensor.numel())


def test_memory_is_used_again_once_nothing_refers_to_it():
    state = {"w": torch.randn(MIB), "v": torch.ones(3)}
    first = keeping(state)
    place = address(first)
    second = keeping(state)
    assert address(second) != place, "the first is still there"
    kept = first["w"][5:]
    del first
    third = keeping(state)
    assert address(third) not in {place, address(second)}, "a view of the first is still there"
    assert torch.equal(kept, state["w"][5:])
    del kept
    assert address(keeping(state)) == place


def test_at_most_one_state_is_kept_and_a_much_smaller_one_does_not_keep_it(a_pool_of_its_own):
    states = [keeping({"w": torch.randn(MIB)}) for _ in range(3)]
    states.clear()
    assert [len(memory.array) for memory in a_pool_of_its_own._kept] == [4 * MIB]
    keeping({"w": torch.randn(MIB // 2)})
    assert [len(memory.array) for memory in a_pool_of_its_own._kept] == [4 * MIB]
    keeping({"w": torch.randn(100)})
    assert [len(memory.array) for memory in a_pool_of_its_own._kept] == [448]


def test_nothing_is_kept_where_that_is_asked_for(tmp_path, a_pool_of_its_own):
    writer = AsyncStorageWriter(tmp_path, transfer=Transfer(keep_staging=False))
    async_save({"w": torch.randn(MIB)}, storage_writer=writer).result(100)
    gc.collect()
    assert not a_pool_of_its_own._kept


@pytest.mark.parametrize("planner", [ShardedSavePlanner(), None], ids=["a kept planner", "default planners"])
def test_saves_that_follow_one_another_use_one_memory(tmp_path, planner, monkeypatch):
    if planner is None and TorchVersion(torch.__version__) < "2.13":
        pytest.skip("DCP's own planner leaves the state to the garbage collector")
    made, real = [], pool._make

    def make(nbytes, where, *, pinned):
        made.append(nbytes)
        return real(nbytes, where, pinned=pinned)

    monkeypatch.setattr(pool, "_make", make)
    monkeypatch.setattr(pool, "_RETURNING_S", 1)
    state = {"w": torch.randn(17 * MIB)}
    for step in range(6):
        async_save(state, storage_writer=AsyncStorageWriter(tmp_path / str(step % 2)), planner=planner).result(100)
    assert len(made) == 1


@pytest.mark.parametrize("kind", AsyncCheckpointerType, ids=lambda kind: kind.name)
@pytest.mark.parametrize("sharded", [True, False], ids=["our_planners", "default_planners"])
@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: TwoTensor(torch.ones(3), torch.ones(3)), UnsupportedTensor, "odd.one is a TwoTensor"),
        (lambda: torch.eye(3).to_sparse(), UnsupportedTensor, "odd.one is a Tensor of layout torch.sparse_coo"),
        (lambda: torch.empty(3, device="meta"), UnsupportedTensor, "odd.one is a Tensor .* on device meta"),
        (threading.Lock, UnsupportedEntry, "odd.one holds a lock that cannot be copied"),
    ],
    ids=["wrapper", "sparse", "meta", "lock"],
)
@pytest.mark.usefixtures("process_group")
def test_what_cannot_be_staged_fails_the_save_by_name(tmp_path, make, error, says, sharded, kind):  # noqa: PLR0917
    planner = ShardedSavePlanner() if sharded else None
    writer = AsyncStorageWriter(tmp_path / "x")
    state = {"fine": torch.ones(3), "odd": {"one": make()}}
    future = dcp.async_save(state, storage_writer=writer, planner=planner, async_checkpointer_type=kind)
    with pytest.raises(CheckpointException, match=says) as failure:
        future.result(100)
    assert isinstance(failure.value.failures[0][0], error)
    assert not (tmp_path / "x").exists()
    fine = {"fine": torch.ones(3)}
    dcp.async_save(fine, storage_writer=writer, planner=planner, async_checkpointer_type=kind).result(100)


@pytest.mark.parametrize("sharded", [True, False], ids=["our_planners", "default_planners"])
def test_wrapper_subclasses_are_refused_by_a_save_that_is_not_asynchronous_too(tmp_path, sharded):
    planner = ShardedSavePlanner() if sharded else None
    state = {"two": TwoTensor(torch.ones(3), torch.ones(3))}
    with pytest.raises(CheckpointException, match="two is a TwoTensor") as failure:
        dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path / "x"), planner=planner)
    assert isinstance(failure.value.failures[0][0], UnsupportedTensor)
    assert not list(tmp_path.glob("x/*"))


def test_an_error_that_nobody_thought_of_is_typed_and_keeps_its_cause():
    def nested(depth):
        value = "leaf"
        for _ in range(depth):
            value = [value]
        return {"deep": value}

    failed = keeping(nested(3000))
    assert isinstance(failed.error, StagingError)
    assert isinstance(failed.error.__cause__, RecursionError)
    assert str(pickle.loads(pickle.dumps(failed.error))) == str(failed.error)


def test_no_memory_of_the_host_is_said(monkeypatch):
    def none(*args, **kwargs):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(pool.torch, "empty", none)
    assert "the host has no memory for a copy of the state (64 bytes)" in str(keeping({"w": torch.ones(3)}).error)


def test_hooks_are_asked_once_and_their_answers_kept(tmp_path):
    from dcp_storage.geometry import Box

    boxes = [(Box((0, 0), (2, 3)), torch.randn(2, 3)), (Box((2, 0), (1, 3)), torch.randn(1, 3))]
    state = {"own": Shards((3, 3), boxes, torch.float32)}
    future = async_save(state, storage_writer=AsyncStorageWriter(tmp_path), planner=ShardedSavePlanner())
    expected = torch.cat([tensor.clone() for _, tensor in boxes])
    for _, tensor in boxes:
        tensor.zero_()
    future.result(100)
    loaded = {"own": torch.zeros(3, 3)}
    dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path), planner=ShardedLoadPlanner())
    assert torch.equal(loaded["own"], expected)


def test_a_stager_of_the_users_own_keeps_working(tmp_path):
    stager = DefaultStager(StagingOptions(False, False, False, False))
    state = {"w": torch.randn(100), "turned": torch.randn(3, 4).t()}
    for step in range(3):
        state["w"].fill_(step)
        future = async_save(state, storage_writer=AsyncStorageWriter(tmp_path / str(step)), async_stager=stager)
        expected = {name: value.clone() for name, value in state.items()}
        state["w"].fill_(-1)
        future.result(100)
        loaded = blank_like(state)
        dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path / str(step)))
        assert_same(loaded, expected)
    stager.close()


def test_other_writers_do_not_store_what_could_not_be_staged(tmp_path):
    options = {"storage_writer": dcp.FileSystemWriter(tmp_path), "async_stager": AsyncStorageWriter(tmp_path / "no")}
    future = async_save({"odd": TwoTensor(torch.ones(3), torch.ones(3))}, **options)
    with pytest.raises(CheckpointException, match="odd is a TwoTensor"):
        future.result(100)
    assert not (tmp_path / ".metadata").exists()
    async_save({"w": torch.arange(3)}, **options).result(100)
    loaded = {"w": torch.zeros(3, dtype=torch.int64)}
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(tmp_path))
    assert loaded["w"].tolist() == [0, 1, 2]


def receive(pipe):
    state = pipe.recv()
    pipe.send(
        [(name, value.sum().item() if isinstance(value, torch.Tensor) else value) for name, value in state.items()]
    )
    pipe.recv()


@pytest.mark.parametrize("memfd", [True, False])
def test_a_state_reaches_another_process_in_shared_memory(monkeypatch, memfd, a_pool_of_its_own):
    if not memfd:
        monkeypatch.delattr(os, "memfd_create")
    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=receive, args=(there,), daemon=True)
    process.start()
    there.close()
    state = keeping({"w": torch.arange(10.0), "n": 5, "empty": torch.empty(0)})
    here.send(state)
    assert here.recv() == [("w", 45.0), ("n", 5), ("empty", 0.0)]
    here.send("end")
    process.join(60)
    assert process.exitcode == 0
    assert a_pool_of_its_own.shares == memfd
    assert keeping({"w": torch.ones(3)})._memory.where == ("shared" if memfd else "private")


def test_a_child_of_fork_does_not_take_the_parents_shared_memory(a_pool_of_its_own):
    a_pool_of_its_own.shares = True
    keeping({"w": torch.randn(MIB)})
    [kept] = a_pool_of_its_own._kept
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        other = keeping({"w": torch.randn(MIB)})
        os._exit(0 if address(other) != kept.array.ctypes.data and other.error is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_containers_keep_their_types():

    state = {
        "ordered": collections.OrderedDict(b=torch.ones(1), a=2),
        "default": collections.defaultdict(list, x=[torch.ones(1)]),
        "named": torch.Size([3]),
        "config": Config(3, [1]),
    }
    found = keeping(state)
    assert type(found["ordered"]) is collections.OrderedDict
    assert list(found["ordered"]) == ["b", "a"]
    assert found["default"].default_factory is list
    assert found["named"] == torch.Size([3])
    assert found["config"] == state["config"]
    assert found["config"].values is not state["config"].values


class Wrapping(collections.abc.MutableMapping):
    """A mapping whose copies share its contents."""

    def __init__(self, held):
        self.held = held

    def __getitem__(self, key):
        return self.held[key]

    def __setitem__(self, key, value):
        self.held[key] = value

    def __delitem__(self, key):
        del self.held[key]

    def __iter__(self):
        return iter(self.held)

    def __len__(self):
        return len(self.held)


class FrozenDict(dict):
    def __setitem__(self, key, value):
        raise TypeError("it is frozen")


class FrozenList(list):
    def __setitem__(self, key, value):
        raise TypeError("it is frozen")


@pytest.mark.parametrize("make", [lambda state: state, lambda state: [state, torch.ones(1)], lambda state: (state, 1)])
@pytest.mark.parametrize("kind", [Wrapping, FrozenDict, collections.UserDict, types.MappingProxyType])
def test_containers_with_code_of_their_own_are_left_alone(tmp_path, make, kind):
    weight = torch.randn(3)
    plain = {"w": weight, "list": FrozenList([torch.ones(2), FrozenList([1])]), "n": {"deep": [1, 2]}}
    held = kind({**plain, "inner": kind({"w": weight + 1})})
    state = {"held": make(held), "step": 3}
    staged = keeping(state)
    assert staged.error is None
    assert held["w"] is weight
    assert type(held["inner"]) is kind
    assert type(held["list"]) is FrozenList
    if isinstance(state["held"], tuple):
        return  # pickled whole, by torch
    stock, ours = ({}, {})
    for flat, saved in ((stock, state), (ours, dict(staged))):
        flat |= flatten_state_dict(saved)[0]
    assert stock.keys() == ours.keys()
    assert_same(ours, stock)
    without = kind({"only": [1, FrozenList([2])]})
    found = keeping({"list": [without]})["list"][0]
    assert found == dict(without)
    assert found["only"] is not without["only"]
    assert type(found) is (dict if kind in {FrozenDict, types.MappingProxyType} else kind)


@dataclasses.dataclass
class Config:
    depth: int
    values: list
