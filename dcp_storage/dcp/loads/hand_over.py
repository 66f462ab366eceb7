"""Passes entries that were read to a planner, in the form that it expects."""

import io

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from dcp_storage.dcp.loads.entries import load_entry
from dcp_storage.dcp.planners.flatten import put
from dcp_storage.dcp.planners.load_planner import ShardedLoadPlanner
from dcp_storage.format.values import is_value


def hand_over(planner: LoadPlanner, read: ReadItem, data: bytes | memoryview) -> None:
    """Pass an entry to a planner.

    DCP's default planner would run any code in it, so the entry is loaded here, with trust in the types listed by
    `torch.serialization.add_safe_globals`. Another kind of planner gets the bytes that its own save stored, or a
    `torch.save` container of a built-in value.

    Raises:
        UnsupportedEntry: See `load_entry`.
        BlockCorrupt: See `load_entry`.
    """
    fqn, load_bytes = read.dest_index.fqn, getattr(type(planner), "load_bytes", None)
    if load_bytes is DefaultLoadPlanner.load_bytes:
        assert isinstance(planner, DefaultLoadPlanner)
        _set(planner, fqn, load_entry(fqn, io.BytesIO(data)))
    elif load_bytes is ShardedLoadPlanner.load_bytes or not is_value(data):
        planner.load_bytes(read, io.BytesIO(data))
    else:
        container = io.BytesIO()
        torch.save(load_entry(fqn, io.BytesIO(data)), container)
        container.seek(0)
        planner.load_bytes(read, container)


def _set(planner: DefaultLoadPlanner, fqn: str, value: object) -> None:
    path = planner.mappings[fqn] if planner.flatten_state_dict else (fqn,)
    put(planner.original_state_dict, path, value)
    planner.state_dict[fqn] = value
