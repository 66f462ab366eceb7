"""Async, compressed, verified checkpoint storage for `torch.distributed.checkpoint`.

Names are imported on first use: `import dcp_storage` costs nothing and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dcp_storage.version import __version__ as __version__

if TYPE_CHECKING:
    from dcp_storage import errors, prune, verify
    from dcp_storage.config import Codec, Transfer
    from dcp_storage.dcp.load import load
    from dcp_storage.dcp.opened import open_checkpoint
    from dcp_storage.dcp.planners.load_planner import ShardedLoadPlanner
    from dcp_storage.dcp.planners.save_planner import ShardedSavePlanner
    from dcp_storage.dcp.reader import AsyncStorageReader
    from dcp_storage.dcp.writer import AsyncStorageWriter
    from dcp_storage.steps.manager import Checkpoints
    from dcp_storage.steps.per_rank import PerRank
    from dcp_storage.steps.policies import KeepBest, KeepEvery, KeepLatest, KeepYounger

__all__ = [
    "AsyncStorageReader",
    "AsyncStorageWriter",
    "Checkpoints",
    "Codec",
    "KeepBest",
    "KeepEvery",
    "KeepLatest",
    "KeepYounger",
    "PerRank",
    "ShardedLoadPlanner",
    "ShardedSavePlanner",
    "Transfer",
    "errors",
    "load",
    "open_checkpoint",
    "prune",
    "verify",
]

_HOMES = {
    "AsyncStorageReader": "dcp.reader",
    "AsyncStorageWriter": "dcp.writer",
    "Checkpoints": "steps.manager",
    "Codec": "config",
    "KeepBest": "steps.policies",
    "KeepEvery": "steps.policies",
    "KeepLatest": "steps.policies",
    "KeepYounger": "steps.policies",
    "PerRank": "steps.per_rank",
    "ShardedLoadPlanner": "dcp.planners.load_planner",
    "ShardedSavePlanner": "dcp.planners.save_planner",
    "Transfer": "config",
    "load": "dcp.load",
    "open_checkpoint": "dcp.opened",
}


_MODULES = {"errors", "prune", "verify"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
