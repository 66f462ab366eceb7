"""Values of Python's built-in types as MessagePack, which most entries are: no pickle is needed."""

from typing import Any

import msgspec
from msgspec.msgpack import Ext

MAGIC = b"\xc1msgpack"
"""The prefix of an encoded value; MessagePack itself never uses the first byte."""
_TUPLE = 1
"""The extension type of a tuple: its bytes are the array of its elements."""
_MOST_NESTED = 32
_ATOMS = frozenset({type(None), bool, int, float, str, bytes})


class _Unencodable(Exception):
    """The value contains another type, or the same object twice."""


def encode_value(value: object) -> bytes | None:
    """Return `MAGIC` and a value as one MessagePack value, or `None` if it would not round-trip.

    Trees of exactly `None`, `bool`, 64-bit `int`, `float`, `str`, `bytes`, `list`, `tuple` and `dict` with such atoms
    as keys do. An object in two places of a tree does not: it would come back as two.
    """
    try:
        return MAGIC + msgspec.msgpack.encode(_tree(value, set(), _MOST_NESTED))
    except (_Unencodable, OverflowError, UnicodeEncodeError, RecursionError):
        return None


def _tree(value: Any, seen: set[int], levels: int) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind not in {list, tuple, dict} or not levels or (kind is not tuple and id(value) in seen):
        raise _Unencodable
    seen.add(id(value))
    if kind is dict:
        if not _ATOMS.issuperset(map(type, value)):
            raise _Unencodable
        return dict(zip(value, _trees(value.values(), seen, levels - 1), strict=True))
    elements = _trees(value, seen, levels - 1)
    return Ext(_TUPLE, msgspec.msgpack.encode(elements)) if kind is tuple else elements


def _trees(values: Any, seen: set[int], levels: int) -> list[Any]:
    if _ATOMS.issuperset(map(type, values)):
        return list(values)
    return [_tree(value, seen, levels) for value in values]


def is_value(data: bytes | memoryview) -> bool:
    """Return whether bytes were encoded by `encode_value`."""
    return data[: len(MAGIC)] == MAGIC


def decode_value(data: bytes | memoryview) -> Any:
    """Return the value that `encode_value` encoded.

    Raises:
        ValueError: The bytes are not a valid value.
    """
    return _decode(memoryview(data)[len(MAGIC) :])


def _decode(data: memoryview) -> Any:
    try:
        return msgspec.msgpack.decode(data, ext_hook=_extension)
    except (msgspec.MsgspecError, RecursionError, TypeError) as error:
        raise ValueError(f"it is not a MessagePack value: {error}") from error


def _extension(code: int, data: memoryview) -> tuple[Any, ...]:
    if code != _TUPLE:
        raise ValueError(f"extension type {code} is unknown")
    elements = _decode(data)
    if type(elements) is not list:
        raise ValueError("a tuple's elements are not an array")
    return tuple(elements)
