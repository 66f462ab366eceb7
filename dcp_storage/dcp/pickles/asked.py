"""The names that a pickle needs listed, found without rebuilding any of it."""

import sys
from contextlib import suppress
from typing import Any

from dcp_storage.dcp.pickles.machine import Unpickler, is_known
from dcp_storage.dcp.pickles.trust import Trust
from dcp_storage.format.pickles import Damaged, Refused


class _Name:
    """Stand-in for a global."""

    def __init__(self, dotted: str) -> None:
        self.dotted = dotted


def asks_for(pickled: bytes, trust: Trust) -> list[str]:
    """Return the dotted names of the types and functions that a pickle needs listed, in order.

    If it cannot be read to its end, return those found so far.
    """
    machine = _Asking(pickled, lambda: trust, lambda _: None)
    with suppress(Damaged, Refused):  # rebuilding it reports why
        machine.run()
    return [name for name in dict.fromkeys(machine.names) if not is_known(name) and trust.find(name) is None]


class _Asking(Unpickler):
    """Runs nothing, and only builds lists and tuples."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.names: list[str] = []

    def find(self, module: str, name: str) -> object:
        self.names.append(self.dotted(module, name))
        return _Name(self.names[-1])

    def call(self, function: object, arguments: tuple[Any, ...]) -> object:
        match function, arguments:
            case _Name(dotted="builtins.getattr"), (_Name(dotted=owner), str(name)) if _is_class(owner, name):
                self.names = [f"{owner}.{name}" if known == owner else known for known in self.names]
                return _Name(f"{owner}.{name}")
        return None

    def make(self, *_: object) -> object:
        return None

    def set_state(self, *_: object) -> None:
        pass

    def extend(self, *_: object) -> None:
        pass

    def set_items(self, *_: object) -> None:
        pass

    def add(self, _: object) -> None:
        pass

    def frozen(self, _: object) -> None:
        self.stack.append(None)


def _is_class(owner: str, name: str) -> bool:
    """Return whether an attribute is a nested class: by its module if that is loaded, else by its spelling."""
    module, *path = owner.split(".")
    while path and f"{module}.{path[0]}" in sys.modules:
        module, *path = f"{module}.{path[0]}", *path[1:]
    found: Any = sys.modules.get(module)
    for step in (*path, name):
        found = getattr(found, step, None)
    return isinstance(found, type) if found is not None else name[:1].isupper() and not name.isupper()
