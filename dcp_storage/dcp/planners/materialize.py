"""Memory for destinations that are on the meta device."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dcp_storage.dcp.undocumented import (
    LocalShardsWrapper,
    ShardedTensor,
    group_device,
    local_tensor,
    with_local_tensor,
)
from dcp_storage.errors import UnsupportedTensor


def materialized(fqn: str, value: Tensor) -> Tensor:
    """Return a value with memory where it has none, on the device of the default process group; else the value itself.

    Raises:
        UnsupportedTensor: It is of a type whose memory only its own code can make.
    """
    if isinstance(value, DTensor):
        held = local_tensor(value)
        filled = materialized(fqn, held)
        return value if filled is held else with_local_tensor(value, filled)
    if isinstance(value, LocalShardsWrapper):
        shards = value.local_shards()
        filled_shards = [materialized(fqn, shard) for shard in shards]
        same = all(new is old for new, old in zip(filled_shards, shards, strict=True))
        return value if same else LocalShardsWrapper(filled_shards, [tuple(at) for at in value.local_offsets()])
    if value.device.type != "meta":
        return value
    try:
        made = torch.empty_like(value, device=group_device(), requires_grad=False)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise _no_memory(fqn, value) from error
    if isinstance(value, ShardedTensor) or (hasattr(value, "__create_chunk_list__") and type(made) is not type(value)):
        raise _no_memory(fqn, value)
    return made


def _no_memory(fqn: str, value: Tensor) -> UnsupportedTensor:
    kind = type(value).__name__
    return UnsupportedTensor(f"{fqn} is a {kind} on the meta device: give it memory before the load", fqn=fqn)
