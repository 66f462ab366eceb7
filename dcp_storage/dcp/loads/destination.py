"""The tensors that a planner gives for reads, and the memory that is filled."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from dcp_storage.dcp.kinds.base import dispatches
from dcp_storage.dcp.kinds.boxes import read_box
from dcp_storage.errors import CoverageError

_HOOKS = ("resolve_tensor", "lookup_tensor", "transform_tensor")


class Destinations:
    """Opens the destinations of one load.

    Many are open at a time, and filled in any order. The planners of DCP and of this package give memory of the state
    dict for them. Another planner may give the same memory for every read, until it is committed, so it is asked when
    the bytes are complete, and gets a copy. So does a tensor that overrides operations.
    """

    def __init__(self, planner: LoadPlanner) -> None:
        self._planner = planner
        self._asks_late = _resolves_itself(planner)

    def open(self, read: ReadItem, dtype: torch.dtype) -> "Destination":
        """Return the destination of a read of stored elements of this dtype.

        Raises:
            CoverageError: The planner gave a tensor of another shape.
        """
        tensor = None if self._asks_late else _resolve(self._planner, read)
        if tensor is not None and not dispatches(tensor):
            return Destination(self._planner, read, tensor, tensor)
        memory = torch.empty(read_box(read).sizes, dtype=dtype, device="cpu")
        return Destination(self._planner, read, memory, tensor)


class Destination(NamedTuple):
    """The destination of one read.

    Attributes:
        planner: Who gets the tensor.
        read: The read.
        memory: The tensor to fill: the planner's, or one of the stored dtype on the CPU.
        tensor: The planner's; `None` if it is to be asked later.
    """

    planner: LoadPlanner
    read: ReadItem
    memory: Tensor
    tensor: Tensor | None

    def commit(self) -> None:
        """Hand the tensor back to the planner.

        Raises:
            CoverageError: The planner gave a tensor of another shape.
        """
        tensor = _resolve(self.planner, self.read) if self.tensor is None else self.tensor
        if self.memory is not tensor:
            with torch.inference_mode(tensor.is_inference()):
                tensor.copy_(self.memory)
        self.planner.commit_tensor(self.read, tensor)


def _resolves_itself(planner: LoadPlanner) -> bool:
    hooks = (getattr(planner, name, None) for name in _HOOKS)
    homes = {getattr(hook, "__module__", "").partition(".")[0] for hook in hooks if hook is not None}
    return not homes <= {"torch", "dcp_storage"}


def _resolve(planner: LoadPlanner, read: ReadItem) -> Tensor:
    box, fqn = read_box(read), read.dest_index.fqn
    tensor = planner.resolve_tensor(read).detach()
    if tuple(tensor.shape) != box.sizes:
        shape = list(tensor.shape)
        raise CoverageError(f"{fqn}: the planner gave a tensor of shape {shape} to read {box} into", fqn=fqn)
    return tensor
