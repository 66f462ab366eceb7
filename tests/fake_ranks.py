"""Several ranks in one process: DCP's calls in DCP's order, without process groups."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.utils import _DistWrapper

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.dcp.saves import order
from dcp_storage.geometry import Box


def plan_save(
    states: Sequence[dict[str, Any]], planners: Sequence[Any], writers: Sequence[AsyncStorageWriter] | None = None
) -> tuple[list[SavePlan], Metadata]:
    """Plan a save of one state dict a rank; rank 0 coordinates."""
    plans = []
    for rank, (planner, state) in enumerate(zip(planners, states, strict=True)):
        planner.set_up_planner(state, None, is_coordinator=rank == 0)
        plan = planner.create_local_plan()
        if writers:
            writers[rank].set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
            plan = writers[rank].prepare_local_plan(plan)
        plans.append(plan)
    plans, metadata = planners[0].create_global_plan(plans)
    return writers[0].prepare_global_plan(plans) if writers else plans, metadata


def save(states: Sequence[dict[str, Any]], make_writer: Callable[[], AsyncStorageWriter]) -> Metadata:
    """Save one state dict a rank."""
    planners = [ShardedSavePlanner() for _ in states]
    writers = [make_writer() for _ in states]
    plans, metadata = plan_save(states, planners, writers)
    results = []
    for planner, writer, plan in zip(planners, writers, plans, strict=True):
        results.append(writer.write_data(planner.finish_plan(plan), planner).wait())
    writers[0].finish(metadata, results)
    return metadata


def load(
    states: Sequence[dict[str, Any]],
    make_reader: Callable[[], AsyncStorageReader],
    *,
    meanwhile: Callable[[str, int], None] = lambda step, rank: None,
    **planning: Any,
) -> None:
    """Load into one state dict a rank; `meanwhile` is called before each rank's steps, "plan" and "read"."""
    planners = [ShardedLoadPlanner(**planning) for _ in states]
    readers = [make_reader() for _ in states]
    plans = []
    for rank, (planner, reader, state) in enumerate(zip(planners, readers, states, strict=True)):
        meanwhile("plan", rank)
        metadata = reader.read_metadata()
        planner.set_up_planner(state, metadata, is_coordinator=rank == 0)
        reader.set_up_storage_reader(metadata, rank == 0, rank=rank, use_collectives=True)
        plans.append(reader.prepare_local_plan(planner.create_local_plan()))
    plans = readers[0].prepare_global_plan(planners[0].create_global_plan(plans))
    for rank, (planner, reader, plan) in enumerate(zip(planners, readers, plans, strict=True)):
        meanwhile("read", rank)
        reader.read_data(planner.finish_plan(plan), planner).wait()


class Alone:
    """Ranks that save without collectives, by DCP's own code, one after another in this process.

    `begun` is what each of them counts in its own process: the saves that it began.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self.begun: list[Counter[str]] = [Counter() for _ in range(world)]

    def save(self, rank: int, state: dict[str, Any], writer: AsyncStorageWriter, **options: Any) -> None:
        """Save one rank's state."""

        def make(group: Any, use_dist: bool, coordinator_rank: int) -> _DistWrapper:
            wrapper = _DistWrapper(None, False, coordinator_rank)
            wrapper.rank, wrapper.is_coordinator = rank, rank == 0
            wrapper.get_world_size = lambda: self.world  # type: ignore[method-assign]
            return wrapper

        with (
            mock.patch.object(state_dict_saver, "_DistWrapper", make),
            mock.patch.object(order._saves, "begun", self.begun[rank]),
        ):
            dcp.save(state, storage_writer=writer, planner=ShardedSavePlanner(), use_collectives=False, **options)


class Shards(torch.Tensor):
    """A user's tensor type that DCP knows by its three hooks only: any boxes of a global shape."""

    shards: list[tuple[Box, torch.Tensor]]
    global_shape: tuple[int, ...]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], shards: list[tuple[Box, torch.Tensor]], dtype: torch.dtype) -> "Shards":
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        self.shards = shards
        self.global_shape = shape
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} of a type that only knows how to be checkpointed")

    def __repr__(self) -> str:
        return f"Shards({self.global_shape}, {[str(box) for box, _ in self.shards]})"

    def __create_write_items__(self, fqn: str, value: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, box.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(box), properties=TensorProperties(dtype=self.dtype), size=torch.Size(self.global_shape)
                ),
            )
            for box, _ in self.shards
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box, _ in self.shards]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        if index.index is not None and index.index < len(self.shards):
            box, tensor = self.shards[index.index]
            if box.offsets == tuple(index.offset):
                return tensor
        return next(tensor for box, tensor in self.shards if box.offsets == tuple(index.offset) and box.numel)


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
