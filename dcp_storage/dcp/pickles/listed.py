"""Operations of pickles on listed types: calls, and setting the state, items and attributes of instances."""

import types
from collections.abc import Callable
from enum import Enum
from sys import intern
from typing import Any

from dcp_storage.dcp.pickles.trust import Trust
from dcp_storage.format.pickles import Refused


class Failed(Exception):
    """The code of a listed type raised; the message completes "it could not be rebuilt: ..."."""


def run(what: object, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Run the code of a listed type.

    Raises:
        Failed: It raised.
    """
    try:
        return call(*arguments)
    except Exception as error:  # arbitrary code
        raise Failed(f"{name_of(what)} raised {type(error).__name__}: {error}") from error


def name_of(value: object) -> str:
    """Return the name of a type or function for messages."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return f"{module}.{name}" if isinstance(name, str) else f"a {type(value).__name__}"


def is_call_of_class(function: object, trusts: Callable[[object], bool]) -> bool:
    """Return whether this is a class method bound to a listed class."""
    return isinstance(function, types.MethodType | types.BuiltinMethodType) and trusts(function.__self__)


_BUILTINS = (object, int, float, str, bytes, list, dict, tuple, set, frozenset)
_ATTRIBUTES = (type, Enum, types.FunctionType, types.MethodType, types.BuiltinMethodType)


def attribute(owner: Any, name: str, trust: Trust, *, is_ours: bool) -> object:
    """Return an attribute that picklers get with `getattr`: a nested class, method, constructor or enum member.

    Raises:
        Refused: It is another attribute, or its owner is not listed.
        Failed: The code of a listed type raised.
    """
    if isinstance(owner, type):
        nested = trust.find(f"{owner.__module__}.{owner.__qualname__}.{name}")
        if nested is not None:
            return nested
    is_constructor = name == "__new__" and (owner in _BUILTINS or trust.lists(owner))
    if not is_constructor and (name.startswith("__") or not (is_ours or trust.lists(owner))):
        raise Refused(f"calls builtins.getattr for {name_of(owner)}.{name}")
    value = run(owner, getattr, (owner, name))
    if not isinstance(value, _ATTRIBUTES):
        raise Refused(f"calls builtins.getattr for {name_of(owner)}.{name}, which is not a class or method")
    return value


def set_state(instance: Any, state: Any) -> None:
    """Set a state as `pickle` does."""
    if hasattr(instance, "__setstate__"):
        instance.__setstate__(state)
        return
    slots = None
    if isinstance(state, tuple) and len(state) == 2:  # noqa: PLR2004
        state, slots = state
    for name, value in (state or {}).items():
        instance.__dict__[intern(name) if type(name) is str else name] = value
    for name, value in (slots or {}).items():
        setattr(instance, name, value)


def set_items(target: Any, items: list[tuple[Any, Any]]) -> None:
    """Set items one by one: `update` has another meaning for a `Counter`."""
    for key, value in items:
        target[key] = value


def extend(target: Any, values: list[Any]) -> None:
    """Append values, with `extend` if available."""
    if hasattr(target, "extend"):
        target.extend(values)
        return
    for value in values:
        target.append(value)


def add(target: Any, values: list[Any]) -> None:
    """Add to a set."""
    for value in values:
        target.add(value)
