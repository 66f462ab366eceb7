"""Fingerprints of objects: of built-in values by their contents, of anything else by its pickle."""

import io
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from dcp_storage.dcp.kinds.base import dispatches
from dcp_storage.dcp.replicas.tensors import tensor_digest
from dcp_storage.format.container import read_container
from dcp_storage.format.values import encode_value

_MOST_NESTED = 100
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})


def object_digest(value: object) -> int:
    """Return a 64-bit fingerprint, whose lowest bit is set if a part of the object was hashed by its pickle.

    Built-in containers are hashed by type and contents, dicts and sets in any order; NaNs and zeros by their bits.
    Equal objects of other types may pickle differently.
    """
    told = _Told()
    digest = xxh3_64_intdigest(told.of(value, _MOST_NESTED))
    return digest | 1 if told.pickled else digest & ~1


class _Told:
    """Turns values into bytes that are the same for equal ones."""

    def __init__(self) -> None:
        self.pickled = False

    def of(self, value: Any, levels: int) -> bytes:  # noqa: PLR0911  # one for each kind
        kind = type(value)
        if kind in _PLAIN:
            return _plain(value)
        if levels and kind in {list, tuple}:
            encoded = encode_value(value) if _PLAIN.issuperset(map(type, value)) else None
            return encoded or self._all(kind, (self.of(inner, levels - 1) for inner in value))
        if levels and kind in {set, frozenset}:
            return self._all(kind, sorted(self.of(inner, levels - 1) for inner in value))
        if levels and kind is dict:
            pairs = (self._all(tuple, [self.of(k, levels - 1), self.of(v, levels - 1)]) for k, v in value.items())
            return self._all(kind, sorted(pairs))
        if isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_meta or dispatches(value)):
            return _tensor(value)
        if kind is np.ndarray and not value.dtype.hasobject:
            return f"{value.dtype.str}{value.shape}".encode() + xxh3_128_digest(np.ascontiguousarray(value).tobytes())
        self.pickled = True
        return _pickle(value)

    @staticmethod
    def _all(kind: type, parts: Iterable[bytes]) -> bytes:
        return kind.__name__.encode() + xxh3_128_digest(b"".join(xxh3_128_digest(part) for part in parts))


def _plain(value: Any) -> bytes:
    name = type(value).__name__.encode()
    match value:
        case float():
            return name + struct.pack("<d", value)
        case complex():
            return name + struct.pack("<dd", value.real, value.imag)
        case str():
            return name + value.encode("utf-8", "surrogatepass")
        case bytes():
            return name + value
        case int() if value.bit_length() > 64:  # noqa: PLR2004
            return name + hex(value).encode()
    return name + repr(value).encode()


def _tensor(value: Tensor) -> bytes:
    about = f"{value.dtype}{tuple(value.shape)}".encode()
    return about + struct.pack("<Q", tensor_digest(xxh3_64_intdigest(about), value))


def _pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except Exception as error:  # noqa: BLE001 - the rank that writes it raises
        return f"{type(error).__name__}: {error}".encode()
    container = read_container(buffer.getvalue())
    return container.pickled + b"".join(xxh3_128_digest(container.read(key)) for key in container.storages)
