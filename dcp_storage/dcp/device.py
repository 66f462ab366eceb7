"""Tensors on accelerators: copies from CUDA go through pinned memory, on streams of their own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, get_device_module

_PINNED = "cuda"
"""The type of device whose copies pinned memory speeds up (ROCm's has the same name)."""


_HOST = "cpu"


def on_host(device: torch.device) -> bool:
    """Tell whether the memory of a device is the process's own."""
    return device.type == _HOST


def on_accelerator(device: torch.device) -> bool:
    """Tell whether tensors of a device have to be copied for the host to read them."""
    return device.type not in {_HOST, "meta"}


def wait_for_device(device: torch.device) -> None:
    """Wait until this thread's stream has computed its tensors: codec threads copy them on streams of their own."""
    if not on_accelerator(device):
        return
    module = get_device_module(device)
    if hasattr(module, "current_stream"):
        module.current_stream(device).synchronize()
    elif hasattr(module, "synchronize"):  # one stream for all, as MPS has; without either nothing runs ahead
        module.synchronize()


def host_memory(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialized host memory for copies from or to a device.

    Pinned memory goes back to torch's cache when it is dropped.
    """
    return torch.empty(elements, dtype=dtype, device="cpu", pin_memory=device.type == _PINNED)


def copy_to_host(source: Tensor, target: Tensor, *, non_blocking: bool) -> None:
    """Copy a tensor of any device to host memory of its shape and dtype.

    Torch conjugates and negates on the host, and does not wait for a copy that does not block.
    """
    changes = source.is_conj() or source.is_neg()
    target.copy_(source, non_blocking=non_blocking and not changes)


def pin(address: int, nbytes: int) -> Callable[[], object]:
    """Pin memory of the host for copies from CUDA; return what unpins it, which has to be done before it is freed.

    Raises:
        RuntimeError: CUDA could not, as where a limit is set on locked memory.
    """
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(cudart.cudaHostRegister(address, nbytes, 0))
    return partial(cudart.cudaHostUnregister, address)


@contextmanager
def copying_from(device: torch.device) -> Iterator[bool]:
    """Run copies to `host_memory` on a stream of their own, and wait for them at the end.

    Yields what to pass to `copy_` as `non_blocking`.
    """
    if device.type != _PINNED:
        yield False
        return
    module = get_device_module(device)
    stream = module.Stream(device)
    with module.stream(stream):
        yield True
    stream.synchronize()
