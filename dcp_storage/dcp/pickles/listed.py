"""What pickles do with listed types: call them, and give their instances state, items and attributes."""

import types
from collections.abc import Callable
from enum import Enum
from sys import intern
from typing import Any

from dcp_storage.dcp.pickles.trust import Trust
from dcp_storage.format.pickles import Refused


class Failed(Exception):
    """The own code of a listed type raised; the message completes "it could not be rebuilt: ..."."""


def run(what: object, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Run the own code of a listed type.

    Raises:
        Failed: It raised.
    """
    try:
        return call(*arguments)
    except Exception as error:  # anybody's code
        raise Failed(f"{name_of(what)} raised {type(error).__name__}: {error}") from error


def name_of(value: object) -> str:
    """Return how a type or function is named in messages."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return f"{module}.{name}" if isinstance(name, str) else f"a {type(value).__name__}"


def is_call_of_class(function: object, trusts: Callable[[object], bool]) -> bool:
    """Tell whether this is a class method, bound to a listed class."""
    return isinstance(function, types.MethodType | types.BuiltinMethodType) and trusts(function.__self__)


_BUILTINS = (object, int, float, str, bytes, list, dict, tuple, set, frozenset)
_ATTRIBUTES = (type, Enum, types.FunctionType, types.MethodType, types.BuiltinMethodType)


def attribute(owner: Any, name: str, trust: Trust, *, is_ours: bool) -> object:
    """Return what `getattr` is pickled for: a nested class, a method or constructor, a member of an enum.

    Raises:
        Refused: It is another attribute, or of what is not listed.
        Failed: The own code of a listed type raised.
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
    """Do what `pickle` does with a state."""
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
    """Set items one by one: `update` is another thing to a `Counter`."""
    for key, value in items:
        target[key] = value


def extend(target: Any, values: list[Any]) -> None:
    """Append, by `extend` where there is one."""
    if hasattr(target, "extend"):
        target.extend(values)
        return
    for value in values:
        target.append(value)


def add(target: Any, values: list[Any]) -> None:
    """Add to a set."""
    for value in values:
        target.add(value)
