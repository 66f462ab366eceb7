"""DTensors: one box by DCP's own arithmetic, or several if the placements or the local tensor say so."""

from functools import cached_property
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor

from dcp_storage.dcp.kinds.base import Kind, LocalShard, check_plain
from dcp_storage.dcp.kinds.boxes import box_item
from dcp_storage.dcp.kinds.hooked import Hooked, Wrapper, has_hooks
from dcp_storage.dcp.kinds.pieces import LocalPiece, pieces_of
from dcp_storage.dcp.kinds.plain import Plain
from dcp_storage.dcp.undocumented import local_tensor, with_local_tensor
from dcp_storage.geometry import Box


class Distributed(Hooked):
    """A DTensor; hooks of its local tensor (a wrapper's, Megatron's) take precedence over its placements."""

    @staticmethod
    def takes(value: Any) -> bool:
        """Take a DTensor."""
        return isinstance(value, DTensor)

    @cached_property
    def _is_here(self) -> bool:
        """Whether this rank is part of the mesh."""
        return self.value.device_mesh.get_coordinate() is not None

    @cached_property
    def _local(self) -> Tensor:
        return local_tensor(self.value)

    @cached_property
    def _pieces(self) -> list[LocalPiece] | None:
        return None if has_hooks(self._local) else pieces_of(self.fqn, self.value)

    def parts(self) -> list[LocalShard]:
        """Return the pieces of a DTensor that is not cut as `Shard` does."""
        return [LocalShard(piece.box, self._local[piece.local.slices]) for piece in self._pieces or ()]

    def write_items(self) -> list[WriteItem]:
        """Return the items that this rank would write.

        Raises:
            CoverageError: The local tensor contradicts the placements, or its hooks did not return items.
            UnsupportedTensor: It has partial sums, or a placement or the local tensor is of an unknown kind.
        """
        if not self._is_here:
            return []
        if not has_hooks(self._local):
            check_plain(self.fqn, self._local)
        if self._pieces is not None:
            return Kind.write_items(self)
        items = super().write_items()
        if items or self.value.numel():
            return items
        # Otherwise no rank would report the tensor.
        return [box_item(self.fqn, Box((0,) * self.value.dim(), self.shape or ()), self.shape or (), self.dtype)]

    def boxes(self) -> list[Box]:
        """Return the boxes that this rank wants to read.

        Raises:
            CoverageError: See `write_items`.
            UnsupportedTensor: See `write_items`.
        """
        if not self._is_here:
            return []
        return super().boxes() if self._pieces is None else [piece.box for piece in self._pieces]

    def shard(self, index: MetadataIndex) -> Tensor:
        """Return the local tensor, or the piece of it for one of the boxes."""
        return super().shard(index) if self._pieces is None else Kind.shard(self, index)

    def materialized(self) -> Any:
        """Return a DTensor over allocated local memory."""
        kind = Wrapper if Wrapper.takes(self._local) else Plain
        filled = kind(self.fqn, self._local).materialized()
        return self.value if filled is self._local else with_local_tensor(self.value, filled)
