"""Memory for destinations that are on the meta device."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from dcp_storage.errors import UnsupportedTensor


def materialized(fqn: str, value: Tensor) -> Tensor:
    """Return a value with memory where it has none, on the device of the default process group; else the value itself.

    Raises:
        UnsupportedTensor: It is of a type whose memory only its own code can make.
    """
    if isinstance(value, DTensor):
        held = value._local_tensor  # noqa: SLF001
        filled = materialized(fqn, held)
        # Not from_local: it views the local tensor, which wrappers of several shards refuse in three dimensions.
        return value if filled is held else DTensor(filled, value._spec, requires_grad=False)  # type: ignore[no-untyped-call]  # noqa: SLF001
    if isinstance(value, LocalShardsWrapper):
        shards = value.local_shards()
        filled_shards = [materialized(fqn, shard) for shard in shards]
        same = all(new is old for new, old in zip(filled_shards, shards, strict=True))
        return value if same else LocalShardsWrapper(filled_shards, [tuple(at) for at in value.local_offsets()])
    if value.device.type != "meta":
        return value
    try:
        made = torch.empty_like(value, device=_device(), requires_grad=False)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise _no_memory(fqn, value) from error
    if isinstance(value, ShardedTensor) or (hasattr(value, "__create_chunk_list__") and type(made) is not type(value)):
        raise _no_memory(fqn, value)
    return made


def _no_memory(fqn: str, value: Tensor) -> UnsupportedTensor:
    kind = type(value).__name__
    return UnsupportedTensor(f"{fqn} is a {kind} on the meta device: give it memory before the load", fqn=fqn)


def _device() -> torch.device:
    if not dist.is_initialized():
        return torch.device("cpu")
    kind = dist.distributed_c10d._get_pg_default_device().type  # noqa: SLF001
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())
