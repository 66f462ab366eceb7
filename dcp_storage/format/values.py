"""Values of Python's built-in types as MessagePack: what most entries are, without a pickle."""

from typing import Any

import msgspec
from msgspec.msgpack import Ext

MAGIC = b"\xc1msgpack"
"""What an encoded value begins with; MessagePack itself never uses the first byte."""
_TUPLE = 1
"""The extension type of a tuple: its bytes are the array of its elements."""
_MOST_NESTED = 32
_ATOMS = frozenset({type(None), bool, int, float, str, bytes})


class _Unencodable(Exception):
    """The value holds something else, or something twice."""


def encode_value(value: object) -> bytes | None:
    """Return `MAGIC` and a value as one MessagePack value, or `None` where that could not bring back the same.

    It can of trees of exactly `None`, `bool`, `int` of 64 bits, `float`, `str`, `bytes`, `list`, `tuple` and `dict`
    whose keys are such atoms. What stands in two places of a tree would come back as two.
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
    """Return whether bytes are what `encode_value` made."""
    return data[: len(MAGIC)] == MAGIC


def decode_value(data: bytes | memoryview) -> Any:
    """Return the value in what `encode_value` made.

    Raises:
        ValueError: It is not that.
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
