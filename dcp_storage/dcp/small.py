"""Small tensors of an accelerator, copied many at a time: alone, the smallest copy costs as much as a megabyte."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dcp_storage.config import KIB, MIB
from dcp_storage.dcp.device import on_accelerator
from dcp_storage.dcp.memory import as_it_lies

SMALL_BYTES = 64 * KIB
BATCH_BYTES = MIB
"""The most that is copied at a time: the accelerator has to find room for as much."""

_ALIGNMENT = 64


def aligned(nbytes: int) -> int:
    """Return how much room a tensor takes in a batch: elements of every dtype begin at a multiple of their size."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def is_small(tensor: Tensor) -> bool:
    """Tell whether a tensor of an accelerator should be copied in a batch."""
    return on_accelerator(tensor.device) and 0 < tensor.nbytes <= SMALL_BYTES and as_it_lies(tensor)


def gather(tensors: Sequence[Tensor], out: Tensor, *, non_blocking: bool) -> None:
    """Copy small tensors of one device to the host, each to the start of its room in the batch.

    Args:
        tensors: Small ones.
        out: uint8 elements of the host, as many as the tensors have room for.
        non_blocking: As in `Tensor.copy_`.
    """
    flat = [tensor.detach().view(-1).view(torch.uint8) for tensor in tensors]
    try:
        batch = torch.cat(list(_padded(flat)))
    except torch.OutOfMemoryError:  # training may have taken all of it
        starts = _starts([len(each) for each in flat])
        for start, each in zip(starts, flat, strict=True):
            out[start : start + len(each)].copy_(each, non_blocking=non_blocking)
    else:
        out.copy_(batch, non_blocking=non_blocking)


def _padded(flat: Sequence[Tensor]) -> Iterator[Tensor]:
    padding = torch.zeros(_ALIGNMENT, dtype=torch.uint8, device=flat[0].device)
    for each in flat:
        yield each
        if short := aligned(len(each)) - len(each):
            yield padding[:short]


def _starts(sizes: Sequence[int]) -> Iterator[int]:
    start = 0
    for size in sizes:
        yield start
        start += aligned(size)
