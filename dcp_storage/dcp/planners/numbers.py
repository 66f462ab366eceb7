"""Numbers that became tensors after a checkpoint was saved, and tensors that became numbers."""

import math
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dcp_storage.dcp.kinds.base import Kind
from dcp_storage.errors import CoverageError, DtypeMismatch

DtypePolicy = Literal["cast", "warn", "error"]

Number = bool | int | float | complex


def memory_for_number(fqn: str, value: object, entry: TensorStorageMetadata) -> Tensor:
    """Return a buffer for a stored tensor whose only element becomes a number.

    Raises:
        CoverageError: The value is not a number, or the stored tensor has more than one element.
    """
    size, dtype = entry.size, entry.properties.dtype
    if _is_number(value) and size.numel() == 1:
        return torch.empty(size, dtype=dtype, device="cpu")
    raise CoverageError(
        f"{fqn} is a {type(value).__name__} here and a tensor of shape {list(size)} and dtype {dtype} in the "
        "checkpoint: put such a tensor in its place",
        fqn=fqn,
    )


def check_takes_number(kind: Kind) -> None:
    """Refuse a tensor that cannot take a number, which the checkpoint may have instead.

    Raises:
        CoverageError: It has more than one element.
    """
    if (kind.shape is not None and prod(kind.shape) != 1) or any(box.numel > 1 for box in kind.boxes()):
        raise CoverageError(
            f"{kind.fqn} is a tensor here and another object in the checkpoint: put None in its place to load that",
            fqn=kind.fqn,
        )


def _is_number(value: object) -> bool:
    return isinstance(value, bool | int | float | complex | np.number | np.bool_)


def fill(fqn: str, target: Tensor, value: object, policy: DtypePolicy) -> None:
    """Put a stored number into a tensor of one element.

    Raises:
        DtypeMismatch: The dtype cannot hold it, and the policy is not `"cast"`.
        CoverageError: It is not a number.
    """
    if not _is_number(value):
        raise CoverageError(
            f"{fqn} is a {type(value).__name__} in the checkpoint, which is not a number, and a tensor here: put None "
            "in its place to load it",
            fqn=fqn,
        )
    number = _plain(value)
    try:
        if policy != "cast":
            _check_fits(number, target.dtype)
        made = _tensor(number if target.dtype.is_complex else number.real)
    except (OverflowError, ValueError, RuntimeError) as error:
        raise DtypeMismatch(
            f"{fqn} is {number!r} in the checkpoint, which does not fit in a tensor of {target.dtype}: {error}. "
            "Load it into a tensor of another dtype, or put None in its place to get the number",
            fqn=fqn,
        ) from error
    with torch.inference_mode():  # tensors created in inference mode can only be written in it
        target.detach().copy_(made.expand(target.shape))


def number_like(fqn: str, tensor: Tensor, like: object, policy: DtypePolicy) -> Any:
    """Return the only element of a stored tensor as a number of the same type as `like`.

    Raises:
        DtypeMismatch: That type cannot hold it, and the policy is not `"cast"`.
    """
    number, kind = tensor.item(), type(_plain(like))
    try:
        converted = _cast(number, kind) if policy == "cast" else _kept(number, kind)
    except (OverflowError, ValueError) as error:
        raise DtypeMismatch(
            f"{fqn} is {number!r}, of {tensor.dtype}, in the checkpoint and the {type(like).__name__} {like!r} here: "
            f"{error}. Put a tensor of that dtype in its place",
            fqn=fqn,
        ) from error
    return type(like)(converted) if isinstance(like, np.generic) else converted


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _tensor(number: Number) -> Tensor:
    if isinstance(number, int) and not isinstance(number, bool) and number >= 1 << 63:
        return torch.tensor(number, dtype=torch.uint64)
    wide = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}
    return torch.tensor(number, dtype=next(dtype for kind, dtype in wide.items() if isinstance(number, kind)))


def _check_fits(number: Number, dtype: torch.dtype) -> None:
    if dtype.is_complex:
        return
    if dtype.is_floating_point:
        rounded = _kept(number, float)
        if math.isfinite(rounded) and not math.isfinite(torch.tensor(rounded, dtype=torch.float64).to(dtype).item()):
            raise OverflowError("it is too large")
    elif dtype is torch.bool:
        _kept(number, bool)
    elif not torch.iinfo(dtype).min <= _kept(number, int) <= torch.iinfo(dtype).max:
        raise OverflowError("it is too large")


def _kept(number: Number, kind: type) -> Any:
    """Convert a number, and refuse any change except rounding."""
    converted = _cast(number, kind)
    if isinstance(number, complex) and kind is not complex and number.imag:
        raise ValueError("it has an imaginary part")
    if kind in {int, bool} and converted != number:
        raise ValueError(f"as {kind.__name__} it is {converted!r}")
    return converted


def _cast(number: Number, kind: type) -> Any:
    real = number.real if isinstance(number, complex) and kind is not complex else number
    return kind(real)
