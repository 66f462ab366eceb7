"""Finds the silent mistakes of DCP's default load planner before data is read."""

from collections import defaultdict

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner

from dcp_storage.dcp.kinds.of import kind_of
from dcp_storage.dcp.planners.coverage import part_note
from dcp_storage.errors import CoverageError
from dcp_storage.geometry import Box, Shape


def check_default_plan(plan: LoadPlan, planner: LoadPlanner) -> None:
    """Refuse a plan of DCP's default planner that does not fill every destination that it reads into.

    That planner ignores the part of a `LocalShardsWrapper` beyond the stored tensor, and treats scattered rows of a
    DTensor as contiguous. Subclasses may have reasons to read less, and are trusted.

    Raises:
        CoverageError: The plan is incomplete; names the entry and the offsets that `ShardedLoadPlanner` would read.
    """
    if type(planner) is not DefaultLoadPlanner or planner.metadata is None:
        return
    planned: defaultdict[str, defaultdict[Shape, int]] = defaultdict(lambda: defaultdict(int))
    for read in plan.items:
        if read.type is LoadItemType.TENSOR and 0 not in read.lengths:
            planned[read.dest_index.fqn][tuple(read.dest_index.offset or ())] += Box((), tuple(read.lengths)).numel
    for fqn, value in planner.state_dict.items():
        if not isinstance(value, Tensor) or not isinstance(
            planner.metadata.state_dict_metadata.get(fqn), TensorStorageMetadata
        ):  # if the checkpoint has another object instead, that replaces the tensor
            continue
        wanted: defaultdict[Shape, int] = defaultdict(int)
        for box in kind_of(fqn, value).boxes():
            if box.numel:
                wanted[box.offsets] += box.numel
        if wanted != planned[fqn]:
            raise CoverageError(
                f"{fqn}: the plan of DCP's DefaultLoadPlanner does not fill {sum(wanted.values())} elements at "
                f"{sorted(wanted)}, which this rank holds: load with ShardedLoadPlanner{part_note(planner.metadata)}",
                fqn=fqn,
            )
