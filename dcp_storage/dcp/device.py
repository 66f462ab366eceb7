"""Tensors on accelerators: copies from CUDA go through pinned memory, on separate streams."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, get_device_module

_PINNED = "cuda"
"""The device type whose copies are faster with pinned memory (ROCm uses the same name)."""


def wait_for_device(tensor: Tensor) -> None:
    """Wait until this thread's stream has computed a tensor: codec threads copy it on other streams."""
    if tensor.device.type in {"cpu", "meta"}:
        return
    module = get_device_module(tensor.device)
    if hasattr(module, "current_stream"):
        module.current_stream(tensor.device).synchronize()
    elif hasattr(module, "synchronize"):  # a single stream, as on MPS; without either, nothing runs asynchronously
        module.synchronize()


def host_memory(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialized host memory for copies from or to a device.

    Pinned memory returns to torch's cache when it is released.
    """
    return torch.empty(elements, dtype=dtype, device="cpu", pin_memory=device.type == _PINNED)


@contextmanager
def copying_from(device: torch.device) -> Iterator[bool]:
    """Run copies to `host_memory` on a separate stream, and wait for them at the end.

    Yields the value to pass to `copy_` as `non_blocking`.
    """
    if device.type != _PINNED:
        yield False
        return
    module = get_device_module(device)
    stream = module.Stream(device)
    with module.stream(stream):
        yield True
    stream.synchronize()
