"""Replaces the values of a state dict, in new containers."""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

_COPIED = (dict, OrderedDict, defaultdict, Counter, list, tuple)
"""Containers that are created anew. Others have code of their own, so that nothing is known of their copies."""

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})

Change = Callable[[str, Any], Any]


def walk(value: Any, leaf: Change, other: Change, fqn: str = "") -> Any:
    """Return a value with each tensor in its containers replaced by `leaf`, and every other object by `other`.

    Both are called with the name in DCP's flattened state dict. A container of any other type than Python's own is such
    an object, or if it contains tensors, replaced by a dict or a list, which DCP gives the same names.
    """
    if isinstance(value, Tensor):
        return leaf(fqn, value)
    if not _is_walked(value):
        return other(fqn, value)
    if _ATOMS.issuperset(map(type, value.values() if isinstance(value, Mapping) else value)):  # there may be millions
        return _like(value, value)
    if isinstance(value, Mapping):
        return _like(value, {key: walk(held, leaf, other, _below(fqn, key)) for key, held in value.items()})
    return _like(value, [walk(held, leaf, other, _below(fqn, number)) for number, held in enumerate(value)])


def _is_walked(value: Any) -> bool:
    return type(value) in _COPIED or (isinstance(value, Mapping | list) and _holds_tensor(value))


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_holds_tensor, value)))


def _below(fqn: str, step: Any) -> str:
    return f"{fqn}.{step}" if fqn else str(step)


def _like(value: Any, contents: Any) -> Any:
    if type(value) is defaultdict:
        return defaultdict(value.default_factory, contents)
    kind: Any = dict if isinstance(value, Mapping) else list
    return (type(value) if type(value) in _COPIED else kind)(contents)
