"""`Destination`: the tensor that a planner gives for a read, and the memory that is filled."""

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from dcp_storage.dcp.kinds.base import dispatches
from dcp_storage.dcp.kinds.boxes import read_box
from dcp_storage.errors import CoverageError

_HOOKS = ("resolve_tensor", "lookup_tensor", "transform_tensor")


class Destination:
    """The destination of one read.

    Many destinations are open at a time, and filled in any order. The planners of DCP and of this package give memory
    of the state dict for them. Another planner may give the same memory for every read, until it is committed, so it
    is asked when its own is complete, and gets a copy. So does a tensor that overrides operations.

    Attributes:
        read: The read.
        memory: The tensor to fill: the planner's, or one of the stored dtype on the CPU.

    Raises:
        CoverageError: The planner gave a tensor of another shape, now or in `commit`.
    """

    def __init__(self, planner: LoadPlanner, read: ReadItem, dtype: torch.dtype) -> None:
        self.read = read
        self._planner = planner
        self._tensor = None if _resolves_itself(planner) else _resolve(planner, read)
        if self._tensor is None or dispatches(self._tensor):
            self.memory = torch.empty(read_box(read).sizes, dtype=dtype, device="cpu")
        else:
            self.memory = self._tensor

    def commit(self) -> None:
        """Hand the tensor back to the planner."""
        tensor = _resolve(self._planner, self.read) if self._tensor is None else self._tensor
        if self.memory is not tensor:
            with torch.inference_mode(tensor.is_inference()):
                tensor.copy_(self.memory)
        self._planner.commit_tensor(self.read, tensor)


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
