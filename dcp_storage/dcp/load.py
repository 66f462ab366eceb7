"""`load`: `dcp.load`, begun anew by all ranks together where another save replaced what they read."""

from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

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
    """Load a path that other jobs overwrite meanwhile: what all ranks get is one save, the newest that lasted.

    This is `dcp.load`, up to 5 times: it begins anew where every rank that failed was overtaken by another save. DCP
    tells all ranks of the same failures, so they do so together. The default `planner` is a `ShardedLoadPlanner`.

    ```python
    load(state, AsyncStorageReader("s3://bucket/run/step-100"))
    ```

    Raises:
        CheckpointException: As `dcp.load` does. After the fifth time its `failures` are `CheckpointReplaced`.
    """
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
