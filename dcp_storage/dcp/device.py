"""Tensors on accelerators: copies from CUDA go through pinned memory, on separate streams."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, get_device_module

_PINNED = "cuda"
"""The device type whose copies are faster with pinned memory (ROCm uses the same name)."""


_HOST = "cpu"


def on_host(device: torch.device) -> bool:
    """Return whether the memory of a device is host memory."""
    return device.type == _HOST


def on_accelerator(device: torch.device) -> bool:
    """Return whether tensors on a device must be copied before the host can read them."""
    return device.type not in {_HOST, "meta"}


def wait_for_device(device: torch.device) -> None:
    """Wait until this thread's stream has computed its tensors: codec threads copy them on other streams."""
    if not on_accelerator(device):
        return
    module = get_device_module(device)
    if hasattr(module, "current_stream"):
        module.current_stream(device).synchronize()
    elif hasattr(module, "synchronize"):  # a single stream, as on MPS; without either, nothing runs asynchronously
        module.synchronize()


def host_memory(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialized host memory for copies from or to a device.

    Pinned memory returns to torch's cache when it is released.
    """
    return torch.empty(elements, dtype=dtype, device="cpu", pin_memory=device.type == _PINNED)


def copy_to_host(source: Tensor, target: Tensor, *, non_blocking: bool) -> None:
    """Copy a tensor on any device to host memory of its shape and dtype.

    Torch applies a lazy conjugation or negation on the host, without waiting for a non-blocking copy.
    """
    changes = source.is_conj() or source.is_neg()
    target.copy_(source, non_blocking=non_blocking and not changes)


def pin(address: int, nbytes: int) -> Callable[[], object]:
    """Pin host memory for copies from CUDA, and return a function that unpins it; call it before freeing the memory.

    Raises:
        RuntimeError: CUDA refused, for example because of a limit on locked memory.
    """
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(cudart.cudaHostRegister(address, nbytes, 0))
    return partial(cudart.cudaHostUnregister, address)


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
