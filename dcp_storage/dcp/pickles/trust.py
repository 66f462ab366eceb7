"""The types and functions that a caller trusts, so that pickles may name and call them."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch.serialization import get_safe_globals

from dcp_storage.errors import ConfigError

Allowed = Iterable[Callable[..., Any] | tuple[Callable[..., Any], str]]


def check_allowed(allowed: Allowed) -> tuple[Any, ...]:
    """Return the listed types.

    Raises:
        ConfigError: It is not a list of types and functions, or of pairs of one and its stored name.
    """
    if not isinstance(allowed, Iterable):
        raise ConfigError(f"allowed_types is {allowed!r}; pass a list of types")
    listed = tuple(allowed)
    for each in listed:
        value, name = each if isinstance(each, tuple) and len(each) == 2 else (each, "")  # noqa: PLR2004
        if not (callable(value) and isinstance(name, str)):
            raise ConfigError(f"allowed_types has {each!r}; pass the type itself, or a pair of it and its stored name")
    return listed


class Trust:
    """The listed types and functions, by the names that pickles use."""

    def __init__(self, allowed: Allowed) -> None:
        self._named = dict(map(_named, [*get_safe_globals(), *allowed]))
        self._ids = {id(value) for value in self._named.values()}
        self._outer = {name: owner for name in self._named for name, owner in _owners(name, self._named[name])}

    def find(self, name: str) -> Any:
        """Return the object that a name stands for, or `None`.

        The owner of a listed nested class may be named too, and a listed object by any name that it has in a loaded
        module: other versions of a library may have defined it elsewhere.
        """
        if name in self._named or name in self._outer:
            return self._named.get(name, self._outer.get(name))
        found = _loaded(name)
        return found if self.lists(found) else None

    def lists(self, value: object) -> bool:
        """Return whether exactly this object is listed."""
        return id(value) in self._ids


def _named(allowed: Any) -> tuple[str, Any]:
    if isinstance(allowed, tuple):
        value, name = allowed
        return name, value
    return f"{allowed.__module__}.{allowed.__qualname__}", allowed


def _loaded(name: str) -> Any:
    """Return the object of a name in a loaded module, without importing anything or running any of its code."""
    module, _, attribute = name.rpartition(".")
    return vars(sys.modules[module]).get(attribute) if module in sys.modules else None


def _owners(name: str, value: Any) -> list[tuple[str, Any]]:
    """Return the classes that enclose a nested class or method."""
    module: str = getattr(value, "__module__", None) or ""
    path: list[str] = getattr(value, "__qualname__", "").split(".")
    owner: Any = sys.modules.get(module)
    found: list[tuple[str, Any]] = []
    if name != ".".join([module, *path]):
        return []
    for number, step in enumerate(path[:-1], 1):
        owner = getattr(owner, step, None)
        if not isinstance(owner, type):
            return []
        found.append((".".join([module, *path[:number]]), owner))
    return found
