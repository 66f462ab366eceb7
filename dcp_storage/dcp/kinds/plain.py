"""Tensors that are plain local memory: whole ones, shards by their attributes, and `ShardedTensor`s of them."""

from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from dcp_storage.dcp.kinds.base import Kind, LocalShard, check_plain
from dcp_storage.dcp.kinds.boxes import box_item, make_box
from dcp_storage.dcp.undocumented import ShardedTensor
from dcp_storage.errors import CoverageError
from dcp_storage.geometry import Box, Shape, contains, whole


class Plain(Kind):
    """A whole tensor; one of a subclass that overrides operations is only a destination, which `copy_` fills."""

    is_whole = True

    @staticmethod
    def takes(value: Any) -> bool:
        """Take every tensor: this kind comes last."""
        return isinstance(value, Tensor)

    def parts(self) -> list[LocalShard]:
        """Return the tensor."""
        return [LocalShard(whole(tuple(self.value.shape)), self.value)]

    def boxes(self) -> list[Box]:
        """Return the only box."""
        return [whole(tuple(self.value.shape))]

    def write_items(self) -> list[WriteItem]:
        """Return one item.

        Raises:
            UnsupportedTensor: It is not plain strided memory.
        """
        check_plain(self.fqn, self.value)
        shape = tuple(self.value.shape)
        return [box_item(self.fqn, whole(shape), shape, self.value.dtype, WriteItemType.TENSOR)]


SHARD_ATTRIBUTES = ("global_shape", "global_offsets", "local_offsets", "local_sizes")
"""The attributes that make a plain tensor shards of a global one."""


class Checkpointable(Kind):
    """A local tensor whose four attributes map boxes of it to those of a global tensor; the rest is padding.

    Torch 2.14 calls this protocol `CheckpointableTensor`. DCP's hooks take precedence, even if a type also has the
    attributes.
    """

    @staticmethod
    def takes(value: Any) -> bool:
        """Take a tensor that has all four attributes."""
        return isinstance(value, Tensor) and all(hasattr(value, name) for name in SHARD_ATTRIBUTES)

    @property
    def shape(self) -> Shape:
        """The `global_shape` of the value."""
        return tuple(map(int, self.value.global_shape))

    def parts(self) -> list[LocalShard]:
        """Return a view of each shard.

        Raises:
            CoverageError: The attributes do not define such boxes.
        """
        try:
            return [self._part(*places) for places in self._places()]
        except (TypeError, ValueError) as error:
            raise CoverageError(
                f"{self.fqn}: its attributes global_shape, global_offsets, local_offsets and local_sizes do not define "
                f"shards: {error}",
                fqn=self.fqn,
            ) from error

    def _places(self) -> list[tuple[Box, Box]]:
        offsets, local, sizes = self.value.global_offsets, self.value.local_offsets, self.value.local_sizes
        return [
            (make_box(at, size), make_box(here or (0,) * len(size), size))
            for at, here, size in zip(offsets, local, sizes, strict=True)
        ]

    def _part(self, box: Box, local: Box) -> LocalShard:
        if not contains(self.shape, box):
            raise ValueError(f"{box} is outside the global shape {list(self.shape)}")
        if not contains(tuple(self.value.shape), local):
            raise ValueError(f"{local} is outside the local shape {list(self.value.shape)}")
        return LocalShard(box, self.value[local.slices])


class Sharded(Kind):
    """A `ShardedTensor`, of FSDP1 or torchrec; its shards may be `ShardedTensor`s themselves."""

    @staticmethod
    def takes(value: Any) -> bool:
        """Take a `ShardedTensor`."""
        return isinstance(value, ShardedTensor)

    def parts(self) -> list[LocalShard]:
        """Return the local shards; there may be none."""
        return [part for shard in self.value.local_shards() for part in self._parts(shard)]

    def _parts(self, shard: Any) -> list[LocalShard]:
        box = make_box(shard.metadata.shard_offsets, shard.metadata.shard_sizes)
        if not isinstance(shard.tensor, ShardedTensor):
            return [LocalShard(box, shard.tensor)]
        inner = Sharded(self.fqn, shard.tensor).parts()
        return [
            LocalShard(Box(tuple(map(sum, zip(box.offsets, b.offsets, strict=True))), b.sizes), t) for b, t in inner
        ]

    def materialized(self) -> Any:
        """Return the value, whose memory only torch's own code can allocate.

        Raises:
            UnsupportedTensor: It has no memory.
        """
        if self.value.device.type == "meta" or any(part.memory.device.type == "meta" for part in self.parts()):
            raise self.no_memory()
        return self.value
