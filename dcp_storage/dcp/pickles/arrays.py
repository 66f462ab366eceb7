"""NumPy's scalars, arrays and dtypes, whose own code trusts the sizes and offsets in a pickle."""

import re
from math import prod
from typing import Any

import numpy as np

_MOST_DIMS = 64
_DTYPE: Any = np.dtype


def _require(holds: object) -> None:
    if not holds:
        raise ValueError("NumPy does not pickle such arguments")


def _make_dtype(code: Any, align: object, copy: object) -> Any:
    _require(type(code) is str and re.fullmatch(r"[biufcmMSUVO]\d{1,9}", code) and align in {0, 1} and copy in {0, 1})
    return _DTYPE(code, bool(align), bool(copy))


def _set_dtype(instance: Any, state: Any) -> None:
    """Set a state only if NumPy gives the same to a dtype that it creates itself."""
    _require(type(state) is tuple and len(state) >= 8)  # noqa: PLR2004
    made: Any = _described(instance, state).__reduce__()[2]
    _require(_of_any_numpy(made) == _of_any_numpy(state))
    instance.__setstate__(made)


def _of_any_numpy(state: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a state without the differences between NumPy 1 and 2.

    Flags are a signed byte in one and an unsigned byte in the other, and missing metadata is `{}` or `None`.
    """
    *described, flags = state[:8]
    units = [unit[1:] if unit[0] in (None, {}) else unit for unit in state[8:]]
    return (*described, flags & 0xFF, *units)


def _described(instance: Any, state: tuple[Any, ...]) -> Any:
    """Return the dtype that a state describes, created by NumPy itself."""
    _, order, subarray, names, fields, size, *rest = state
    if subarray is not None:
        base, shape = subarray
        _require(isinstance(base, np.dtype) and _is_shape(shape) and base.itemsize * prod(shape) == instance.itemsize)
        return _DTYPE((base, shape))
    if names is not None:
        _require(size == instance.itemsize and all(len(fields[name]) == 2 for name in names))  # noqa: PLR2004
        formats, offsets = zip(*(fields[name] for name in names), strict=True) if names else ((), ())
        _require(all(isinstance(held, np.dtype) for held in formats))
        layout = {"names": list(names), "formats": list(formats), "offsets": list(offsets), "itemsize": size}
        return _DTYPE(layout, align=bool(rest[1] & 0x80))
    if instance.kind in "mM":
        (unit, count, *_) = rest[-1][1]
        _require(re.fullmatch(rb"[a-zA-Z]{1,7}", unit) and type(count) is int)
        instance = _DTYPE(f"{instance.str[1:]}[{count}{unit.decode()}]" if unit != b"generic" else instance.str)
    return instance.newbyteorder(order) if order in {"<", ">"} else instance


def _scalar(dtype: Any, data: Any) -> Any:
    _require(isinstance(dtype, np.dtype) and type(data) is bytes and not dtype.hasobject)
    _require(len(data) == dtype.itemsize)
    return np.frombuffer(data, dtype, 1).copy()[0] if data else np.zeros((), dtype)[()]


def _array(kind: object, shape: object, code: object) -> Any:
    """Return an empty array, whose state is set next."""
    _require(kind is np.ndarray and shape == (0,) and code in {b"b", "b"})
    return np.ndarray((0,), np.int8)


def _set_array(instance: Any, state: Any) -> None:
    version, shape, dtype, is_fortran, data = state
    _require(version == 1 and _is_shape(shape) and isinstance(dtype, np.dtype) and type(is_fortran) is bool)
    count = prod(shape)
    if dtype.kind == "O":
        _require(type(data) is list and len(data) == count)
    else:
        _require(not dtype.hasobject and type(data) is bytes and len(data) == count * dtype.itemsize)
    _require(dtype.itemsize or not count)
    instance.__setstate__(state)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> Any:
    """Return an array pickled with protocol 5."""
    _require(isinstance(dtype, np.dtype) and not dtype.hasobject and _is_shape(shape) and order in {"C", "F"})
    _require(type(data) in {bytes, bytearray})
    flat = np.frombuffer(data, dtype)
    return flat.reshape(shape, order=order)


def _is_shape(shape: object) -> bool:
    if type(shape) is not tuple or len(shape) > _MOST_DIMS:
        return False
    return all(type(size) is int and 0 <= size < 1 << 62 for size in shape)


_MODULES = ("numpy.core", "numpy._core")
"""The modules in NumPy 1 and 2."""

CALLS: dict[str, tuple[Any, Any]] = {
    "numpy.dtype": (np.dtype, _make_dtype),
    **{f"{module}.multiarray.scalar": (_scalar, _scalar) for module in _MODULES},
    **{f"{module}.multiarray._reconstruct": (_array, _array) for module in _MODULES},
    **{f"{module}.numeric._frombuffer": (_from_buffer, _from_buffer) for module in _MODULES},
}
VALUES: dict[str, Any] = {
    "numpy.ndarray": np.ndarray,
    "numpy.bool": np.bool_,
    "numpy.bool_": np.bool_,
    **{f"numpy.{kind.__name__}": kind for kind in {*np.sctypeDict.values()} if kind.__module__ == "numpy"},
}
STATES: dict[type, Any] = {np.ndarray: _set_array}


def state_rule(instance: object) -> Any:
    """Return the rule of a dtype, each of which has its own class."""
    return _set_dtype if isinstance(instance, np.dtype) else None
