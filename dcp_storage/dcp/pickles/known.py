"""Types that run no code of their own, each with a rule that checks the arguments in a pickle.

A rule returns the object or raises `Refused`, `TypeError`, `ValueError`, `OverflowError`. Types that are listed as
trusted need no rule.
"""

import collections
import datetime as dt
import decimal
import fractions
import io
import pathlib
import re
import uuid
from collections.abc import Callable
from typing import Any

from dcp_storage.dcp.pickles import arrays

Rule = Callable[..., Any]


def _require(holds: object) -> None:
    if not holds:
        raise ValueError("a pickler gives other arguments")


def _encode(text: Any, encoding: object) -> bytes:
    """Return the bytes that protocol 2 pickles as text."""
    _require(type(text) is str and encoding == "latin1")
    encoded: bytes = text.encode("latin1")
    return encoded


def _of(kind: type, *types: type, most: int = 3) -> Rule:
    """Return the rule of a type whose arguments are a few values of exactly these types."""

    def make(*arguments: Any) -> Any:
        _require(len(arguments) <= most and all(type(argument) in types for argument in arguments))
        return kind(*arguments)

    return make


def _type_of(value: object) -> type:
    _require(value is None or value is Ellipsis or value is NotImplemented)
    return type(value)


_FACTORIES = (list, dict, set, tuple, int, float, bool, str, bytes, complex, collections.OrderedDict, collections.deque)


def _defaultdict(*arguments: Any) -> collections.defaultdict[Any, Any]:
    _require(len(arguments) <= 1 and all(argument is None or argument in _FACTORIES for argument in arguments))
    return collections.defaultdict(*arguments)


def _deque(*arguments: Any) -> collections.deque[Any]:
    match arguments:
        case () | (() | [],) | (() | [], None | int()):
            return collections.deque(*arguments)
    raise ValueError("a pickler gives other arguments")


_FRACTION_BITS = 1 << 16
"""Reducing a fraction takes time proportional to the square of this."""


def _fraction(*arguments: Any) -> fractions.Fraction:
    """Accept only what picklers write: "1e3000000" would be a number of three million digits."""
    match arguments:
        case (str(text),):
            _require(re.fullmatch(r"-?\d+(/\d+)?", text))
        case (int(above), int(below)):
            _require(max(above.bit_length(), below.bit_length()) <= _FRACTION_BITS)
        case _:
            raise ValueError("a pickler gives other arguments")
    return fractions.Fraction(*arguments)


def _moment(kind: Any, nbytes: int) -> Rule:
    def make(*arguments: Any) -> Any:
        match arguments:
            case (bytes(state), *zone) if len(state) == nbytes and len(zone) <= 1:
                _require(all(isinstance(tz, dt.tzinfo) for tz in zone))
                return kind(*arguments)
        raise ValueError("a pickler gives other arguments")

    return make


def _timezone(*arguments: Any) -> dt.timezone:
    match arguments:
        case (dt.timedelta(),) | (dt.timedelta(), str()):
            return dt.timezone(*arguments)
    raise ValueError("a pickler gives other arguments")


_PATHS = (pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath)

CALLS: dict[str, tuple[Any, Rule]] = {
    "_codecs.encode": (_encode, _encode),
    "builtins.bytes": (bytes, _of(bytes, most=0)),
    "builtins.bytearray": (bytearray, _of(bytearray, bytes, most=1)),
    "builtins.complex": (complex, _of(complex, int, float)),
    "builtins.range": (range, _of(range, int)),
    "builtins.slice": (slice, slice),
    "builtins.set": (set, _of(set, list, most=1)),
    "builtins.frozenset": (frozenset, _of(frozenset, list, most=1)),
    "builtins.type": (type, _type_of),
    "collections.OrderedDict": (collections.OrderedDict, _of(collections.OrderedDict, most=0)),
    "collections.Counter": (collections.Counter, _of(collections.Counter, dict, most=1)),
    "collections.defaultdict": (collections.defaultdict, _defaultdict),
    "collections.deque": (collections.deque, _deque),
    "decimal.Decimal": (decimal.Decimal, _of(decimal.Decimal, str, most=1)),
    "fractions.Fraction": (fractions.Fraction, _fraction),
    "datetime.datetime": (dt.datetime, _moment(dt.datetime, 10)),
    "datetime.date": (dt.date, _moment(dt.date, 4)),
    "datetime.time": (dt.time, _moment(dt.time, 6)),
    "datetime.timedelta": (dt.timedelta, _of(dt.timedelta, int)),
    "datetime.timezone": (dt.timezone, _timezone),
    **{
        f"{module}.{path.__name__}": (path, _of(path, str, most=1000))
        for path in _PATHS
        for module in ("pathlib", "pathlib._local")  # their module in Python 3.13
    },
    **arrays.CALLS,
}
"""Callables by name, each with its stand-in and its rule."""


VALUES: dict[str, Any] = {
    "builtins.Ellipsis": Ellipsis,
    "builtins.NotImplemented": NotImplemented,
    **{f"builtins.{kind.__name__}": kind for kind in (list, dict, tuple, int, float, bool, str, object)},
    **arrays.VALUES,
}
"""Names that are allowed, but not called."""


def _new(kind: Any) -> Rule:
    def make() -> Any:
        return kind.__new__(kind)

    return make


NEWS: dict[str, tuple[Any, Rule]] = {
    "uuid.UUID": (uuid.UUID, _new(uuid.UUID)),
    "_io.BytesIO": (io.BytesIO, io.BytesIO),
    "_io.StringIO": (io.StringIO, io.StringIO),
}
"""Types that may be instantiated without calling their constructor."""


def _set_uuid(instance: Any, state: Any) -> None:
    match state:
        case {"int": int(value), **rest} if 0 <= value < 1 << 128:
            _require(rest.keys() <= {"is_safe"})
            instance.__setstate__(state)
        case _:
            raise ValueError("a pickler gives another state")


def _set_stream(instance: Any, state: Any) -> None:
    """Set the content and position of an in-memory stream."""
    match state:
        case (bytes(), int(), None | dict()) | (str(), str() | None, int(), None | dict()):
            instance.__setstate__(state)
        case _:
            raise ValueError("a pickler gives another state")


def _set_attributes(instance: Any, state: Any) -> None:
    """Set the attributes of a dict, such as `_metadata` of a module's `state_dict`."""
    _require(type(state) is dict and all(type(name) is str for name in state))
    instance.__dict__.update(state)


DICTS = (collections.OrderedDict, collections.defaultdict, collections.Counter)
"""Types whose instances take items like dicts."""

STATES: dict[type, Rule] = {
    uuid.UUID: _set_uuid,
    io.BytesIO: _set_stream,
    io.StringIO: _set_stream,
    collections.OrderedDict: _set_attributes,
    collections.Counter: _set_attributes,
    **arrays.STATES,
}
"""How to set the state of instances of exactly these types."""
