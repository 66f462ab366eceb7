"""All undocumented names of torch that this package uses, with what depends on them; no other module uses any.

Those of Python that it needs to find and outlast DCP's threads are among them.

`tests/test_undocumented.py` checks with each torch that they exist and have this meaning. A kind of tensor that this
torch lacks is replaced by a class without instances.
"""

import atexit
import multiprocessing
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter
from torch.distributed.checkpoint.utils import _DistWrapper
from torch.distributed.tensor import DTensor, Shard

__all__ = [
    "LocalShardsWrapper",
    "ShardedTensor",
    "StridedShard",
    "call_before_executors_end",
    "check_sparse_tensors",
    "copy_all",
    "first_to_say",
    "flatten",
    "group_device",
    "in_async_process",
    "in_async_thread",
    "is_zero_tensor",
    "local_tensor",
    "rank_alone",
    "rebuild_from_type",
    "settled",
    "split_as",
    "stock_url_reader",
    "stock_url_writer",
    "stock_zstandard",
    "torch_calls",
    "torch_globals",
    "typed_storage",
    "with_local_tensor",
    "without_memory",
    "world_size_of_save",
]

T = TypeVar("T", bound=Tensor)

if TYPE_CHECKING:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor
    from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
    from torch.distributed.tensor.placement_types import _StridedShard as StridedShard
else:

    def _kind(module: str, name: str) -> type:
        """Return a class, or one without instances if this torch lacks it: then no value can be of that kind."""
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError):
            return type(name, (), {})

    ShardedTensor = _kind("torch.distributed._shard.sharded_tensor.api", "ShardedTensor")
    LocalShardsWrapper = _kind("torch.distributed.tensor._shards_wrapper", "LocalShardsWrapper")
    StridedShard = _kind("torch.distributed.tensor.placement_types", "_StridedShard")
    AsyncCollectiveTensor = _kind("torch.distributed._functional_collectives", "AsyncCollectiveTensor")


THREAD_NAME = "AsyncCheckpointExecutor"
"""Name prefix of the threads in which `dcp.async_save` saves; each runs one save and ends with it."""

PROCESS_MODULE = "torch.distributed.checkpoint._async_process_executor"
"""The module that the process in which `dcp.async_save` saves runs."""


def call_before_executors_end(call: Callable[[], None]) -> None:
    """Have Python call this at the end of the program, before executors refuse new work; `atexit` is too late."""
    import_module("concurrent.futures.thread")  # it registers a call, before which later registrations are called
    register = getattr(threading, "_register_atexit", atexit.register)  # at worst, saves fail there, and it is logged
    register(call)


def world_size_of_save() -> int:
    """Return how many ranks take part in the save whose hook calls this: DCP only passes the rank to a writer."""
    group = _group_of_save()
    if group:
        return group.get_world_size()
    return dist.get_world_size() if dist.is_initialized() else 1


def rank_alone() -> int | None:
    """Return this rank if it saves without the others of the default process group (`no_dist=True`)."""
    group = _group_of_save()
    is_alone = group is not None and not group.use_dist and dist.is_initialized() and dist.get_world_size() > 1
    return dist.get_rank() if is_alone else None


def _group_of_save() -> _DistWrapper | None:
    """Find DCP's group wrapper in the frames of its functions that call this."""
    frame = sys._getframe(1)
    while frame.f_back:
        frame = frame.f_back
        group = frame.f_locals.get("distW")
        if isinstance(group, _DistWrapper):
            return group
    return None


def first_to_say(key: str, value: str) -> str | None:
    """Return the value that the first rank gave for a key, or `None` if the default process group has no store."""
    if not dist.is_initialized() or (store := dist.distributed_c10d._get_default_store()) is None:
        return None
    said: bytes = store.compare_set(key, "", value)
    return said.decode()


def stock_url_reader(url: str, **storage_options: Any) -> StorageReader:
    """Return DCP's own reader of fsspec URLs."""
    reader: StorageReader = _fsspec_module().FsspecReader(url, **storage_options)
    return reader


def stock_url_writer(url: str, **options: Any) -> StorageWriter:
    """Return DCP's own writer to fsspec URLs, without sync, which is `os.sync()` on anything but a local file."""
    writer: StorageWriter = _fsspec_module().FsspecWriter(url, sync_files=False, **options)
    return writer


def _fsspec_module() -> ModuleType:
    try:
        return import_module("torch.distributed.checkpoint.fsspec_filesystem")
    except ModuleNotFoundError:  # before torch 2.15
        return import_module("torch.distributed.checkpoint._fsspec_filesystem")


def stock_zstandard() -> Any:
    """Return DCP's extension that compresses with zstd: an element of a writer's `_extensions`."""
    return import_module("torch.distributed.checkpoint._extension").ZStandard()


def rebuild_from_type(function: Any, cls: type, arguments: tuple[Any, ...], state: Any) -> Any:
    """Turn the result of a function into a tensor of a class; `torch.save` pickles subclasses this way."""
    return torch._tensor._rebuild_from_type_v2(function, cls, arguments, state)  # type: ignore[no-untyped-call]


def check_sparse_tensors() -> None:
    """Check the invariants of rebuilt sparse tensors: the functions that rebuild them trust their arguments."""
    torch._utils._validate_loaded_sparse_tensors()  # type: ignore[no-untyped-call]


def typed_storage(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.TypedStorage:
    """Return a storage in the form that the functions that rebuild tensors take."""
    return torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def torch_globals() -> dict[str, Any]:
    """Return the globals of torch that `torch.load(weights_only=True)` allows in a pickle, by dotted name."""
    allowed: dict[str, Any] = import_module("torch._weights_only_unpickler")._get_allowed_globals()
    names = {name: value for name, value in allowed.items() if name.startswith("torch.")}
    return names | {"torch._tensor._rebuild_from_type_v2": rebuild_from_type}


def torch_calls() -> dict[str, Any]:
    """Return those that may be called, and create nothing larger than their arguments."""
    return {
        name: value
        for name, value in torch_globals().items()
        if name in {"torch.Size", "torch.device", "torch.serialization._get_layout"}
        or (name.startswith("torch._utils._rebuild_") and not name.endswith("_qtensor"))
    }


def in_async_thread(thread: threading.Thread) -> bool:
    """Return whether a thread runs a save of `dcp.async_save`."""
    return thread.name.startswith(THREAD_NAME)


def in_async_process() -> bool:
    """Return whether this is the process of `dcp.async_save`, which does nothing else."""
    task = getattr(multiprocessing.current_process(), "_target", None)
    return getattr(task, "__module__", None) == PROCESS_MODULE


def local_tensor(value: DTensor) -> Tensor:
    """Return this rank's part itself; `to_local` would return a view, which autograd may not allow to be written."""
    return settled(value._local_tensor)


def settled(value: Tensor) -> Tensor:
    """Wait for the result of an asynchronous collective and return it; return any other tensor as it is."""
    return value.wait() if isinstance(value, AsyncCollectiveTensor) else value


def with_local_tensor(value: DTensor, local: Tensor) -> DTensor:
    """Return a DTensor like this one over another local tensor.

    `from_local` would view the local tensor, which wrappers of several shards refuse in three dimensions.
    """
    return DTensor(local, value._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def is_zero_tensor(value: Tensor) -> bool:
    """Return whether a tensor is all zeros without memory, as autograd creates them."""
    return value._is_zerotensor()


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return the elements of tensors of one device and dtype, one tensor behind the other."""
    flat: Tensor = torch._C._nn.flatten_dense_tensors(list(tensors))
    return flat


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target, of the same shape."""
    torch._foreach_copy_(list(targets), list(sources))


def without_memory(cls: type[T], size: torch.Size, dtype: torch.dtype) -> T:
    """Return an instance of a subclass that looks like a CPU tensor and has no memory of its own."""
    made: T = Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=torch.device("cpu"))
    return made


def split_as(placement: Shard | StridedShard, tensor: Tensor, count: int) -> list[Tensor]:
    """Return the parts, unpadded, that a placement cuts a tensor into over `count` ranks."""
    parts, _ = placement._split_tensor(tensor, count, with_padding=False, contiguous=False)
    return parts


def group_device() -> torch.device:
    """Return the current device of the default process group's device type: the CPU if it has several types."""
    if not dist.is_initialized():
        return torch.device("cpu")
    kind = dist.distributed_c10d._get_object_coll_device()
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())
