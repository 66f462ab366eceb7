"""The memory of tensors, as bytes."""

import ctypes

import torch
from torch import Tensor

from dcp_storage.dcp.undocumented import is_zero_tensor


def as_it_lies(tensor: Tensor) -> bool:
    """Return whether a tensor's memory holds its elements in row-major order."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg() and not is_zero_tensor(tensor)


def borrowed_view(elements: Tensor) -> memoryview:
    """Like `byte_view`, but the caller must keep the tensor alive: much faster for many tensors."""
    nbytes = elements.numel() * elements.element_size()
    return (
        memoryview((ctypes.c_char * nbytes).from_address(elements.data_ptr())).cast("B") if nbytes else memoryview(b"")
    )


def byte_view(elements: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor of any dtype as bytes."""
    # Not view(-1): a dimension of one element may have any stride.
    flat = elements.detach().as_strided((elements.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy().data)
