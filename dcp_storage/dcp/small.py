"""Small tensors of an accelerator, copied many at a time: alone, the smallest copy costs as much as a megabyte."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dcp_storage.config import KIB, MIB
from dcp_storage.dcp.device import copy_to_host, on_accelerator
from dcp_storage.dcp.memory import as_it_lies
from dcp_storage.dcp.undocumented import flatten

SMALL_BYTES = 64 * KIB
BATCH_BYTES = MIB
"""The most that is copied at a time: the accelerator has to find room for as much."""

Batchable = tuple[torch.device, torch.dtype]
"""What the tensors of a batch have in common."""


def batchable(tensor: Tensor) -> Batchable | None:
    """Return which batches a tensor of an accelerator may be copied in, or `None` if it should be copied alone."""
    if on_accelerator(tensor.device) and 0 < tensor.nbytes <= SMALL_BYTES and as_it_lies(tensor):
        return tensor.device, tensor.dtype
    return None


@torch.no_grad()
def gather(tensors: Sequence[Tensor], out: Tensor, *, non_blocking: bool) -> None:
    """Copy small tensors to the host, one behind the other.

    Args:
        tensors: Of one device and dtype, and laid out as they are stored.
        out: As many elements of the host.
        non_blocking: As in `Tensor.copy_`.
    """
    try:
        batch = flatten(tensors)
    except RuntimeError:  # training took all of the device's memory, or it cannot join tensors of this dtype
        start = 0
        for tensor in tensors:
            stop = start + tensor.numel()
            copy_to_host(tensor, out[start:stop].view(tensor.shape), non_blocking=non_blocking)
            start = stop
    else:
        out.copy_(batch, non_blocking=non_blocking)
