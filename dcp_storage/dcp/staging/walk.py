"""Replaces the values of a state dict, in new containers of the same types."""

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})

Change = Callable[[str, Any], Any]


def walk(value: Any, leaf: Change, other: Change, fqn: str = "") -> Any:
    """Return a value with each tensor in its containers replaced by `leaf`, and every other object by `other`.

    Both are called with the name in DCP's flattened state dict.
    """
    if isinstance(value, Tensor):
        return leaf(fqn, value)
    if isinstance(value, Mapping):
        if _ATOMS.issuperset(map(type, value.values())):
            return _mapping_like(value, value.items())
        inner = ((key, walk(held, leaf, other, _below(fqn, key))) for key, held in value.items())
        return _mapping_like(value, inner)
    if type(value) is tuple or isinstance(value, list):
        if _ATOMS.issuperset(map(type, value)):  # there may be millions
            return _sequence_like(value, value)
        walked = (walk(held, leaf, other, _below(fqn, number)) for number, held in enumerate(value))
        return _sequence_like(value, walked)
    return other(fqn, value)


def _below(fqn: str, step: Any) -> str:
    return f"{fqn}.{step}" if fqn else str(step)


def _mapping_like(value: Mapping[Any, Any], inner: Iterable[tuple[Any, Any]]) -> Any:
    if type(value) is dict or not isinstance(value, MutableMapping):
        return dict(inner)
    made = copy.copy(value)
    for key, held in inner:
        made[key] = held
    return made


def _sequence_like(value: Any, walked: Iterable[Any]) -> Any:
    if type(value) in {list, tuple}:
        return type(value)(walked)
    made = copy.copy(value)
    made[:] = walked
    return made
