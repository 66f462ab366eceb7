"""Fingerprints of tensors: of all elements of small ones, of samples of large ones."""

from math import prod

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from dcp_storage.config import KIB
from dcp_storage.dcp.memory import as_it_lies, borrowed_view, byte_view
from dcp_storage.geometry import Shape

WHOLE_BYTES = 64 * KIB
"""Tensors up to this size are hashed whole."""
RUNS = 16
"""Number of sampled runs of a larger tensor, one in each sixteenth of it, ..."""
RUN_BYTES = 256
"""... and the size of each."""

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def tensor_digest(seed: int, tensor: Tensor) -> int:
    """Return a 64-bit fingerprint of the bits of a tensor's elements.

    The positions of the samples follow from the seed, the shape and the dtype. They distinguish tensors that differ
    everywhere, or in more than a few places: other experts, other seeds, replicas that drifted. They miss differences
    in a few elements. Only the samples of a tensor on a device are copied.
    """
    if tensor.numel() * tensor.element_size() <= WHOLE_BYTES:
        return xxh3_64_intdigest(_all(tensor), seed)
    run = RUN_BYTES // tensor.element_size()
    starts = sample_starts(seed, tensor.numel(), run)
    return xxh3_64_intdigest(_runs(tensor, starts, run), seed)


def sample_starts(seed: int, count: int, run: int) -> list[int]:
    """Return the start of each run of elements, anywhere in its share of the tensor, depending on the seed."""
    share = count // RUNS
    room = share - run + 1
    scattered = xxh3_128_digest(seed.to_bytes(8, "little"))  # a byte for each run
    return [share * number + (room * byte >> 8) for number, byte in enumerate(scattered)]


def _all(tensor: Tensor) -> memoryview:
    if tensor.device.type == "cpu" and as_it_lies(tensor):
        return borrowed_view(tensor)
    return _on_host(tensor, tuple(tensor.shape))


def _runs(tensor: Tensor, starts: list[int], run: int) -> bytes | memoryview:
    item = tensor.element_size()
    if tensor.device.type == "cpu" and as_it_lies(tensor):
        memory = borrowed_view(tensor)
        return b"".join([memory[start * item : (start + run) * item] for start in starts])
    flat = (np.array(starts)[:, None] + np.arange(run)).ravel()
    places = [torch.from_numpy(index).to(tensor.device) for index in np.unravel_index(flat, tuple(tensor.shape))]
    plain = tensor.detach().as_subclass(Tensor)
    if not (plain.is_conj() or plain.is_neg()):  # some dtypes cannot be indexed
        plain = plain.view(_SAME_SIZE[item])
    return _on_host(plain[tuple(places)], (len(flat),))


def _on_host(tensor: Tensor, shape: Shape) -> memoryview:
    plain = tensor.detach().as_subclass(Tensor)
    return byte_view(torch.empty(prod(shape), dtype=plain.dtype, device="cpu").view(shape).copy_(plain))
