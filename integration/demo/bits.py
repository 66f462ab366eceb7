"""Comparing states bit by bit: poison what is to be loaded, keep a reference, find what differs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

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
    return {name: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf for name, leaf in flatten(state)}


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
            local = leaf.to_local() if isinstance(leaf, DTensor) else leaf
            local.detach().copy_(_pattern(local))


@dataclass(frozen=True)
class Comparison:
    """What one rank compared.

    Attributes:
        different: The names that are missing, unexpected, or not equal to the last bit.
        shard_bytes: Bytes compared of tensors that are sharded; each rank has other ones.
        whole_bytes: Bytes compared of tensors that every rank has whole.
    """

    different: list[str]
    shard_bytes: int
    whole_bytes: int


def compare(state: dict[str, Any], reference: dict[str, Any]) -> Comparison:
    """Compare what this rank holds of a state with its part of the reference."""
    found = dict(flatten(state))
    expected = {name: _part_of(leaf, found.get(name)) for name, leaf in reference.items()}
    held = {name: leaf.to_local() if isinstance(leaf, DTensor) else leaf for name, leaf in found.items()}
    names = held.keys() | expected.keys()
    different = [name for name in names if not _same(held.get(name), expected.get(name))]
    sizes = {name: leaf.nbytes for name, leaf in held.items() if isinstance(leaf, Tensor)}
    shard_bytes = sum(size for name, size in sizes.items() if isinstance(found[name], DTensor))
    return Comparison(sorted(different), shard_bytes, sum(sizes.values()) - shard_bytes)


def _part_of(whole: Any, like: Any) -> Any:
    """Return this rank's part of a whole tensor, cut by torch itself as `like` is sharded."""
    if not isinstance(like, DTensor) or not isinstance(whole, Tensor) or like.shape != whole.shape:
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


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
