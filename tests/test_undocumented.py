"""The names of torch that no documentation promises: each exists on this torch, and means what is built on it."""

import ast
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import dcp_storage
from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedSavePlanner
from dcp_storage.dcp import undocumented
from dcp_storage.format.contents import METADATA_VERSION

ROOT = Path(dcp_storage.__file__).parent
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "dcp").rglob("*.py"))


def private_names(source):
    """Names with a leading underscore that do not belong to the class or module that uses them."""
    tree = ast.parse(source)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from (part for part in node.module.split(".") if part.startswith("_"))
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if "torch" in alias.name and "._" in alias.name)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            of_own = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls", "other", "os"}
            assigned = f"self.{node.attr}" in source
            if not (of_own or assigned or node.attr in own):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("torch."):
            yield from (part for part in node.value.split(".") if part.startswith("_"))


def test_the_search_finds_every_way_to_use_a_private_name():
    ways = [
        "from torch.distributed._shard import x",
        "from torch.distributed.tensor import _x",
        "import torch.distributed._shard",
        "value._local_tensor",
        "import_module('torch._x')",
    ]
    assert all(list(private_names(way)) for way in ways)


@pytest.mark.parametrize("collectives", [True, False])
@pytest.mark.parametrize("alone", [True, False])
def test_a_hook_finds_the_ranks_of_its_save(process_group, tmp_path, collectives, alone):
    """In a group of one, and in none: of more than one in the integration tests."""
    sizes = []

    class Planner(ShardedSavePlanner):
        def create_global_plan(self, all_plans):
            sizes.append(undocumented.world_size_of_save())
            return super().create_global_plan(all_plans)

    class Writer(AsyncStorageWriter):
        def set_up_storage_writer(self, is_coordinator, *args, **kwargs):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.distributed, "get_world_size", lambda group=None: 7)
                sizes.append(undocumented.world_size_of_save())
            super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    options = {"no_dist": alone, "use_collectives": collectives}
    dcp.save({"x": 1}, storage_writer=Writer(tmp_path), planner=Planner(), **options)
    assert sizes == [1 if alone else 7, 1]


def test_ranks_agree_on_what_the_first_of_them_says(process_group):
    assert undocumented.first_to_say("key", "first") == "first"
    assert undocumented.first_to_say("key", "second") == "first"
    assert undocumented.first_to_say("another", "second") == "second"


def test_where_there_is_no_group_nothing_is_agreed():
    assert undocumented.first_to_say("key", "first") is None


@pytest.mark.parametrize("module", [name for name in MODULES if name != "dcp/undocumented.py"])
def test_no_other_module_uses_private_names_of_torch(module):
    assert not list(private_names((ROOT / module).read_text()))


def test_kinds_of_tensors_are_torch_s():
    from torch.distributed._shard.sharded_tensor import ShardedTensor
    from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
    from torch.distributed.tensor.placement_types import _StridedShard

    assert undocumented.ShardedTensor is ShardedTensor
    assert undocumented.LocalShardsWrapper is LocalShardsWrapper
    assert undocumented.StridedShard is _StridedShard


def test_a_kind_that_is_missing_has_no_instances():
    missing = undocumented._kind("torch.distributed.tensor", "NeverThere")
    assert not isinstance(torch.ones(1), missing)
    assert undocumented._kind("torch.never_there", "X").__name__ == "X"


def test_hooks_have_the_names_that_dcp_calls(process_group):
    value = distribute_tensor(torch.ones(2, 2), DeviceMesh("cpu", [0]), [Replicate()])
    for hook in ("__create_write_items__", "__create_chunk_list__", "__get_tensor_shard__"):
        assert callable(getattr(value, hook))
        assert callable(getattr(undocumented.LocalShardsWrapper, hook))


def test_local_tensors(process_group):
    value = distribute_tensor(torch.ones(2, 2), DeviceMesh("cpu", [0]), [Shard(0)]).requires_grad_()
    held = undocumented.local_tensor(value)
    assert held.equal(torch.ones(2, 2))
    undocumented.local_tensor(value).detach().zero_()
    assert not value.to_local().any()
    other = undocumented.with_local_tensor(value, torch.full((2, 2), 3.0))
    assert isinstance(other, DTensor)
    assert (other.shape, other.placements) == (value.shape, value.placements)
    assert other.to_local().equal(torch.full((2, 2), 3.0))


def test_placements_split():
    index = torch.arange(10)
    assert [part.tolist() for part in undocumented.split_as(Shard(0), index, 4)] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
        [9],
    ]
    strided = undocumented.StridedShard(0, split_factor=2)
    assert undocumented.split_as(strided, torch.arange(8), 2)[1].tolist() == [2, 3, 6, 7]


def test_device_of_the_process_group(process_group):
    assert undocumented.group_device() == torch.device("cpu")


def test_version_is_dcp_s_own():
    assert METADATA_VERSION == CURRENT_DCP_VERSION


class Where(dcp.FileSystemWriter):
    """Notes where DCP saves."""

    def write_data(self, plan, planner):
        thread = threading.current_thread()
        here = undocumented.in_async_thread(thread), undocumented.in_async_process()
        (self.path / "where").write_text(repr(here))
        return super().write_data(plan, planner)


@pytest.mark.parametrize("kind", [None, *AsyncCheckpointerType], ids=str)
def test_saves_know_where_they_run(tmp_path, process_group, kind):
    state, writer = {"x": torch.ones(1)}, Where(tmp_path)
    if kind is None:
        dcp.save(state, storage_writer=writer)
    else:
        dcp.async_save(state, storage_writer=writer, async_checkpointer_type=kind).result(100)
    expected = (kind is AsyncCheckpointerType.THREAD, kind is AsyncCheckpointerType.PROCESS)
    assert (tmp_path / "where").read_text() == repr(expected)


def test_results_of_collectives_are_waited_for(process_group):
    from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce

    pending = all_reduce(torch.ones(3), "sum", torch.distributed.group.WORLD)
    made = AsyncCollectiveTensor(pending.wait() if isinstance(pending, AsyncCollectiveTensor) else pending)
    assert undocumented.AsyncCollectiveTensor is AsyncCollectiveTensor
    assert type(undocumented.settled(made)) is torch.Tensor
    plain = torch.ones(2)
    assert undocumented.settled(plain) is plain


def test_a_result_of_a_collective_is_saved(tmp_path, process_group):
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    for save in (dcp.save, dcp.async_save):
        state = {"w": AsyncCollectiveTensor(torch.arange(3.0))}
        saved = save(state, storage_writer=AsyncStorageWriter(tmp_path), planner=ShardedSavePlanner())
        if save is dcp.async_save:
            saved.result(60)
        loaded = {"w": torch.zeros(3)}
        dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path))
        assert loaded["w"].tolist() == [0, 1, 2]


def test_many_tensors_are_joined_and_filled_at_once():
    tensors = [torch.arange(number, dtype=torch.int16).view(1, number, 1) for number in range(5)]
    flat = undocumented.flatten(tensors)
    assert flat.tolist() == [0, 0, 1, 0, 1, 2, 0, 1, 2, 3]
    targets = [torch.zeros(1, number, 2)[..., :1] for number in range(5)]
    undocumented.copy_all(targets, [each.view(1, -1, 1) for each in flat.split(list(range(5)))])
    assert [target.flatten().tolist() for target in targets] == [list(range(number)) for number in range(5)]


def test_zeros_without_memory_are_known():
    assert undocumented.is_zero_tensor(torch._efficientzerotensor(2))
    assert not undocumented.is_zero_tensor(torch.zeros(2))


def test_a_tensor_without_memory_is_of_its_class_and_the_host_s():
    class Own(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    made = undocumented.without_memory(Own, torch.Size([2, 3]), torch.int16)
    assert (type(made), made.shape, made.dtype, made.device.type) == (Own, (2, 3), torch.int16, "cpu")


def test_stock_writers_of_urls():
    url = "memory://undocumented/step-1"
    dcp.save({"w": torch.arange(3)}, storage_writer=undocumented.stock_url_writer(url))
    loaded = {"w": torch.zeros(3, dtype=torch.int64)}
    dcp.load(loaded, storage_reader=undocumented.stock_url_reader(url))
    assert loaded["w"].tolist() == [0, 1, 2]
    assert undocumented.stock_zstandard().get_descriptor().startswith("stream.zstd/1")
