"""`ShardedSavePlanner`: every chunk is written once, by one of its owners, and the bytes are balanced across ranks."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from dcp_storage.collector import gc_paused
from dcp_storage.dcp.hooks import hook
from dcp_storage.dcp.kinds.boxes import item_box
from dcp_storage.dcp.kinds.of import kind_of
from dcp_storage.dcp.planners.flatten import flatten
from dcp_storage.dcp.planners.global_plan import make_global_plan
from dcp_storage.dcp.planners.plan_cache import GlobalPlan, PlanCache, Plans, Uncached
from dcp_storage.dcp.replicas.compare import Fingerprints, ReplicaPolicy
from dcp_storage.dcp.replicas.fingerprint import fingerprint, item_place
from dcp_storage.dcp.undocumented import rank_alone, world_size_of_save
from dcp_storage.errors import ConfigError

if TYPE_CHECKING:
    from dcp_storage.dcp.kinds.base import Kind
    from dcp_storage.geometry import Box

_OF_ONE_SAVE = ("state_dict", "plan", "global_plan", "metadata", "_local_plan", "_kinds")


class ShardedSavePlanner(DefaultSavePlanner):
    """Plans a save of any sharding that PyTorch can express, including `LocalShardsWrapper`, or says why it cannot.

    Chunks that several ranks hold (replicas) are written by one of them, chosen so that all ranks write about the same
    number of bytes; entries that are not tensors by the lowest rank that has them.

    ```python
    planner = ShardedSavePlanner(replica_policy="error")  # commits nothing if replicas differ
    dcp.save(state, storage_writer=AsyncStorageWriter("s3://bucket/run/step-100"), planner=planner)
    ```

    Args:
        flatten_state_dict: Flatten nested dicts and lists into names; `False` stores each top-level value as it is.
        replica_policy: What to do if ranks hold different data under one name, of which only one rank's copy is saved:
            `"warn"` saves it and warns, `"error"` raises and commits nothing, `"trust"` does not check. Replicas are
            compared by fingerprints: tensors of up to 64 KiB, and all other entries, whole; larger tensors by 16
            samples of 256 bytes, which detect differences in more than a few places.
        enable_plan_caching: Remember the plans of the last save, so that ranks without changes send and receive
            nothing. Keep one planner on each rank for each process group and use it for all saves of that group.

    Raises (while planning, on every rank, inside DCP's `CheckpointException`):
        CoverageError: The shards of a tensor leave a gap, overlap, or extend beyond it; names the tensor and the box.
        DtypeMismatch: Ranks hold a tensor in different dtypes.
        UnsupportedTensor: A value's own hooks failed, as those of a DTensor with partial sums do.
        ConfigError: Two entries have the same name, or planners with `enable_plan_caching` were mixed up.

    Raises (after the data is written, before the commit):
        ReplicaMismatch: See `replica_policy`.
    """

    def __init__(
        self,
        *,
        flatten_state_dict: bool = True,
        replica_policy: ReplicaPolicy = "warn",
        enable_plan_caching: bool = False,
    ) -> None:
        super().__init__(flatten_state_dict=flatten_state_dict, flatten_sharded_tensors=False)
        if replica_policy not in {"warn", "error", "trust"}:
            raise ConfigError(f'replica_policy is {replica_policy!r}; choose "warn", "error" or "trust"')
        self._replica_policy = replica_policy
        self._plans: Plans = PlanCache() if enable_plan_caching else Uncached()
        self._places: dict[tuple[str, Box], int] = {}
        self._kinds: dict[str, Kind] = {}

    @hook
    @gc_paused
    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,  # noqa: ARG002  # the signature is DCP's
        is_coordinator: bool = False,
    ) -> None:
        """Take the state dict to save.

        Raises:
            ConfigError: Two paths of the state dict have the same name.
        """
        self.is_coordinator = is_coordinator
        self.state_dict, self.mappings = flatten(state_dict, nested=self.flatten_state_dict)
        self._kinds = {fqn: kind_of(fqn, value) for fqn, value in self.state_dict.items() if isinstance(value, Tensor)}

    @hook
    @gc_paused
    def create_local_plan(self) -> SavePlan:
        """Return what this rank could write: everything that it holds."""
        items: list[WriteItem] = []
        self._places = {}
        for fqn in self.state_dict:
            held = self._kinds[fqn].write_items() if fqn in self._kinds else [_entry_item(fqn)]
            if len(held) > 1:
                self._places |= {(fqn, item_box(item)): n for n, item in enumerate(held) if item.tensor_data}
            items += held
        self._local_plan = SavePlan(items, planner_data=self.mappings if self.flatten_state_dict else None)
        self.plan = self._plans.send(self._local_plan)
        return self.plan

    @hook
    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return what each rank writes, and the metadata of the whole checkpoint."""
        self.global_plan, self.metadata = self._plans.plan(all_plans, _plan_all)
        return self.global_plan, self.metadata

    @hook
    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Take the plan that the coordinator made for this rank."""
        self.plan = self._plans.receive(self._local_plan, new_plan)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Return the tensor or the bytes of an item.

        Raises:
            CoverageError: The value's own hook did not return a tensor.
            UnsupportedTensor: The hook raised.
        """
        planned = write_item.tensor_data
        if planned is None:
            data = super().resolve_data(write_item)
            assert isinstance(data, io.BytesIO)
            return data
        kind = self._kinds.get(write_item.index.fqn)
        if kind and kind.is_whole:
            whole: Tensor = self.transform_object(write_item, kind.value)
            return whole
        box = item_box(write_item)
        if not box.numel:
            return torch.empty(planned.chunk.sizes, dtype=planned.properties.dtype, device="cpu")
        # Hooks take the hint as the shard's position on this rank, and need it if an empty shard has the same offset.
        place = self._places.get((write_item.index.fqn, box), 0)
        index = MetadataIndex(write_item.index.fqn, write_item.index.offset, place)
        found: Tensor = self.transform_object(write_item, self.lookup_object(index))
        return found

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the value of an item: the memory of a shard, or a non-tensor object."""
        kind = self._kinds.get(index.fqn)
        return kind.shard(index) if kind else self.state_dict[index.fqn]

    def fingerprints(self) -> Fingerprints | None:
        """Return the fingerprints of items that other ranks hold too; `None` if they are not to be compared."""
        shared = self.plan.planner_data
        if self._replica_policy == "trust" or not isinstance(shared, bytes):
            return None
        held = [item for item, is_shared in zip(self.plan.items, shared, strict=True) if is_shared]
        if len(self._local_plan.items) > len(self.plan.items):
            written = {item_place(item) for item in self.plan.items}
            held += [item for item in self._local_plan.items if item_place(item) not in written]
        return fingerprint(self._replica_policy, held, self)

    def release(self) -> None:
        """Release the state, which is written, so that its memory can be reused for the next one."""
        self.state_dict, self._kinds = {}, {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _OF_ONE_SAVE}


@contextmanager
def releasing(planner: SavePlanner) -> Iterator[None]:
    """Have a planner of this package release the state when a block ends, whether it was written or not."""
    try:
        yield
    finally:
        if isinstance(planner, ShardedSavePlanner):
            planner.release()


def _entry_item(fqn: str) -> WriteItem:
    return WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO)


def _plan_all(local_plans: list[SavePlan]) -> GlobalPlan:
    # A save without collectives plans each rank by itself, and cannot distinguish gaps from the parts of other ranks.
    is_all = len(local_plans) >= world_size_of_save() and rank_alone() is None
    return make_global_plan(local_plans, is_all=is_all)
