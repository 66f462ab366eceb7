"""Copies small tensors on an accelerator in batches: a copy of a few bytes takes as long as one of a megabyte."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dcp_storage.config import KIB, MIB
from dcp_storage.dcp.device import copy_to_host, on_accelerator
from dcp_storage.dcp.memory import as_it_lies
from dcp_storage.dcp.undocumented import flatten

SMALL_BYTES = 64 * KIB
BATCH_BYTES = MIB
"""The maximum size of a batch: the accelerator must have this much free memory."""

Batchable = tuple[torch.device, torch.dtype]
"""The device and dtype of the tensors in a batch."""


def batchable(tensor: Tensor) -> Batchable | None:
    """Return the kind of batch that a tensor may be copied in, or `None` if it should be copied alone."""
    if on_accelerator(tensor.device) and 0 < tensor.nbytes <= SMALL_BYTES and as_it_lies(tensor):
        return tensor.device, tensor.dtype
    return None


@torch.no_grad()
def gather_to_host(tensors: Sequence[Tensor], out: Tensor, *, non_blocking: bool) -> None:
    """Copy small tensors to host memory, back to back.

    Args:
        tensors: Contiguous tensors of one device and dtype.
        out: A host tensor with as many elements.
        non_blocking: As in `Tensor.copy_`.
    """
    try:
        batch = flatten(tensors)
    except RuntimeError:  # the device has no memory left, or cannot concatenate this dtype
        start = 0
        for tensor in tensors:
            stop = start + tensor.numel()
            copy_to_host(tensor, out[start:stop].view(tensor.shape), non_blocking=non_blocking)
            start = stop
    else:
        out.copy_(batch, non_blocking=non_blocking)
