"""`load`: `dcp.load` that all ranks restart together if another save replaces what they read."""

from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.storage import StorageReader

from dcp_storage.config import require_type
from dcp_storage.dcp.planners.load_planner import ShardedLoadPlanner
from dcp_storage.dcp.reader import AsyncStorageReader
from dcp_storage.errors import CheckpointReplaced

_LOADS = 5


def load(
    state_dict: dict[str, Any],
    storage_reader: AsyncStorageReader,
    *,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Load from a path that other jobs may overwrite meanwhile: all ranks get the same save, the newest that lasted.

    This calls `dcp.load` up to 5 times: it starts again if every rank that failed was overtaken by another save. DCP
    reports the same failures to all ranks, so they restart together. The default `planner` is a `ShardedLoadPlanner`.

    ```python
    load(state, AsyncStorageReader("s3://bucket/run/step-100"))
    ```

    Raises:
        ConfigError: `storage_reader` is not a reader.
        CheckpointException: As for `dcp.load`. After the fifth attempt its `failures` are `CheckpointReplaced`.
    """
    require_type("storage_reader", storage_reader, StorageReader)
    for loads_left in reversed(range(_LOADS)):
        try:
            dcp_load(
                state_dict,
                storage_reader=storage_reader,
                planner=planner or ShardedLoadPlanner(),
                process_group=process_group,
            )
        except CheckpointException as error:
            if not loads_left or any(not isinstance(cause, CheckpointReplaced) for cause, _ in error.failures.values()):
                raise
        else:
            return
