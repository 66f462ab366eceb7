"""The sources of a save plan's items."""

import io

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from dcp_storage.collector import gc_paused
from dcp_storage.config import Codec
from dcp_storage.dcp.device import wait_for_device
from dcp_storage.dcp.kinds.plain import Checkpointable
from dcp_storage.dcp.saves.entries import encode_entry, warn_of_types
from dcp_storage.dcp.saves.gather import Gather
from dcp_storage.dcp.saves.sources import BytesSource, TensorSource
from dcp_storage.errors import CoverageError, DtypeMismatch, UnsupportedTensor
from dcp_storage.geometry import whole
from dcp_storage.transfer.save import Source


@gc_paused
def plan_sources(plan: SavePlan, planner: SavePlanner, codec: Codec) -> list[Source]:
    """Return the source of each of a plan's items.

    Raises:
        CoverageError: The planner resolved an item to a different shape than planned.
        DtypeMismatch: The planner resolved an item to a different dtype than planned.
        UnsupportedTensor: An item is not plain strided memory, or an object contains a part of a distributed tensor.
        UnsupportedEntry: An object cannot be pickled.
    """
    asked: dict[str, list[str]] = {}
    sources: list[Source] = []
    gather = Gather()
    devices: set[torch.device] = set()
    for item in plan.items:
        if item.tensor_data:
            tensor = _resolve(item, planner)
            devices.add(tensor.device)
            sources.append(gather.source(TensorSource(tensor, item.index.fqn, codec)))
            continue
        data, asked[item.index.fqn] = encode_entry(item, planner)
        sources.append(BytesSource(data))
    warn_of_types(asked)
    for device in devices:
        wait_for_device(device)
    return sources


def _resolve(item: WriteItem, planner: SavePlanner) -> Tensor:
    planned = item.tensor_data
    if planned and item.type is WriteItemType.SHARD and 0 in planned.chunk.sizes:  # others may begin at its offset
        return torch.empty(planned.chunk.sizes, dtype=planned.properties.dtype, device="cpu")
    data = planner.resolve_data(item)
    assert planned is not None
    assert not isinstance(data, io.BytesIO), "DCP's planners resolve tensor items to tensors and others to BytesIO"
    if tuple(data.shape) != tuple(planned.chunk.sizes):
        raise CoverageError(
            f"{item.index.fqn}: a chunk of shape {list(planned.chunk.sizes)} was planned, but the state dict has "
            f"{list(data.shape)}",
            fqn=item.index.fqn,
        )
    if data.dtype != planned.properties.dtype:
        raise DtypeMismatch(
            f"{item.index.fqn}: {planned.properties.dtype} was planned, but the state dict has {data.dtype}: "
            "was it changed after its plan was cached?",
            fqn=item.index.fqn,
        )
    if item.type is WriteItemType.TENSOR and _is_a_part(item.index.fqn, data):
        raise UnsupportedTensor(
            f"{item.index.fqn} is a shard by its attributes (CheckpointableTensor), but the planner treats it as a "
            "whole tensor: save with ShardedSavePlanner",
            fqn=item.index.fqn,
        )
    return data


def _is_a_part(fqn: str, data: Tensor) -> bool:
    """Return whether a tensor's attributes make it anything other than its whole tensor."""
    if not Checkpointable.takes(data):
        return False
    kind, shape = Checkpointable(fqn, data), tuple(data.shape)
    return kind.shape != shape or kind.boxes() != [whole(shape)]
