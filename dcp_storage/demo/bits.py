"""Comparing states bit by bit: poison what is to be loaded, keep a reference, find what differs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcp_storage.demo.train import full_tensor

_POISON = 0xA5


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of nested dicts and lists with its dotted name."""
    if not isinstance(value, dict | list):
        yield name, value
        return
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield from flatten(child, f"{name}.{key}" if name else str(key))


def gather(state: dict[str, Any]) -> dict[str, Any]:
    """Return every leaf of a state by name, tensors whole. All ranks must call this together."""
    return {name: full_tensor(leaf) if isinstance(leaf, Tensor) else leaf for name, leaf in flatten(state)}


def count(whole: dict[str, Any]) -> tuple[int, int]:
    """Return how many tensors there are and their bytes."""
    sizes = [leaf.nbytes for leaf in whole.values() if isinstance(leaf, Tensor)]
    return len(sizes), sum(sizes)


def write_reference(path: Path, whole: dict[str, Any]) -> None:
    """Save a gathered state with plain `torch.save`, which shares nothing with what is being tested."""
    torch.save(whole, path)


def read_reference(path: Path) -> dict[str, Any]:
    """Read a reference back, mapped rather than copied into memory."""
    reference: dict[str, Any] = torch.load(path, mmap=True, weights_only=True)
    return reference


def poison(state: dict[str, Any]) -> None:
    """Overwrite every tensor with a bit pattern that no weight has, so that nothing can pass without being loaded."""
    for _, leaf in flatten(state):
        if isinstance(leaf, Tensor):
            local = leaf.to_local() if hasattr(leaf, "to_local") else leaf
            local.detach().copy_(_pattern(local))


def differences(loaded: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """Return the names that are missing, unexpected, or not equal to the last bit."""
    names = loaded.keys() | reference.keys()
    return sorted(name for name in names if not _same(loaded.get(name), reference.get(name)))


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        alike = left.dtype == right.dtype and left.shape == right.shape
        return alike and torch.equal(_bits(left), _bits(right))
    return type(left) is type(right) and bool(left == right)


def _bits(tensor: Tensor) -> Tensor:
    """Return a tensor as bytes, since floats compare unequal to themselves when NaN and equal when signed zeros."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _pattern(tensor: Tensor) -> Tensor:
    raw = torch.full((tensor.numel() * tensor.element_size(),), _POISON, dtype=torch.uint8)
    return raw.view(tensor.dtype).reshape(tensor.shape)
