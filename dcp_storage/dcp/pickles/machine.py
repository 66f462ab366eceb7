"""Rebuilds pickled objects: harmless ones by their rules, listed ones by their own code, and nothing else."""

import collections
import functools
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dcp_storage.dcp.pickles import arrays, known, listed
from dcp_storage.dcp.pickles.hashing import Hashing
from dcp_storage.dcp.pickles.trust import Trust
from dcp_storage.dcp.undocumented import check_sparse_tensors, rebuild_from_type, torch_calls, torch_globals
from dcp_storage.format.pickles import Damaged, Machine, Refused


def guarded_getattr(_owner: object, name: object) -> object:
    """Stand-in for `getattr`, which only the machine calls."""
    raise Refused(f"makes other code get the attribute {name}")


_KNOWN: dict[str, Any] = {
    **torch_globals(),
    **known.VALUES,
    **{name: value for name, (value, _) in (known.CALLS | known.NEWS).items()},
    "functools.partial": functools.partial,
    "builtins.getattr": guarded_getattr,
}
_PYTHON_2 = 2
_CALLS = {id(value): (name, rule) for name, (value, rule) in reversed(known.CALLS.items())}
_NEWS = {id(value): (name, rule) for name, (value, rule) in known.NEWS.items()}
_TORCH_CALLS = {id(value): name for name, value in torch_calls().items()}


def rebuild(data: bytes, trust: Callable[[], Trust], storage: Callable[[Any], object]) -> Any:
    """Return the object in a pickle; see `Unpickler`.

    Raises:
        Refused: It contains a type that is neither known nor listed.
        Failed: The code of a listed type raised.
        Damaged: It is truncated or not a pickle, or a storage is missing.
    """
    value = Unpickler(data, trust, storage).run()
    try:
        check_sparse_tensors()
    except (RuntimeError, ValueError) as error:
        raise Damaged(f"it has an invalid sparse tensor: {error}") from error
    return value


def is_known(name: str) -> bool:
    """Return whether a type or function need not be listed."""
    return name in _KNOWN


class Unpickler(Machine):
    """Rebuilds the object in a pickle.

    Args:
        data: The pickle.
        trust: Returns the types and functions that may be used in addition to those known to be harmless.
        storage: Returns the storage that a persistent id refers to.
    """

    def __init__(self, data: bytes, trust: Callable[[], Trust], storage: Callable[[Any], object]) -> None:
        super().__init__(data)
        self._storage = storage
        self._trusted = functools.cache(trust)  # most pickles do not need it
        self._hashing = Hashing(len(self.data))
        self._made: dict[int, object] = {}  # by listed code; kept alive, so that ids are not reused
        self._constructors: dict[int, object] = {}

    def dotted(self, module: str, name: str) -> str:
        """Return a name in Python 3: up to protocol 2, pickles use the names of Python 2."""
        if self.protocol <= _PYTHON_2:
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        return f"{module}.{name}"

    def find(self, module: str, name: str) -> object:
        """Return the listed or known global of a name."""
        dotted = self.dotted(module, name)
        found = self._trusted().find(dotted)
        if found is not None:
            return found
        if dotted not in _KNOWN:
            raise Refused(f"asks for {dotted}")
        return _KNOWN[dotted]

    def call(self, function: object, arguments: tuple[Any, ...]) -> object:
        """Call a function that is listed or has a rule."""
        if self._runs(function, arguments):
            return self._keep(function, arguments, {})
        special = _SPECIAL.get(id(function))
        if special:
            return special(self, *arguments)
        if id(function) in _TORCH_CALLS:
            return _torch(function, arguments)
        if id(function) not in _CALLS:
            raise Refused(f"calls {listed.name_of(function)}")
        if (function is set or function is frozenset) and arguments and type(arguments[0]) is list:
            self._hashing.check(arguments[0])
        return _checked(*_CALLS[id(function)], arguments)

    def _runs(self, function: object, arguments: tuple[Any, ...]) -> bool:
        """Return whether a call runs listed code: a listed object, its class methods or its constructor."""
        if self._trusted().lists(function) or listed.is_call_of_class(function, self._trusts):
            return True
        if function is collections.defaultdict:
            return len(arguments) == 1 and self._trusted().lists(arguments[0])
        return not arguments and self._is_constructor(function)

    def make(self, cls: object, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> object:
        """Make an instance without its initializer."""
        if self._trusts(cls):
            assert isinstance(cls, type)
            return self._keep(cls.__new__, (cls, *arguments), keywords)
        if id(cls) not in _NEWS or keywords:
            raise Refused(f"makes {listed.name_of(cls)}")
        return _checked(*_NEWS[id(cls)], arguments)

    def set_state(self, instance: object, state: object) -> None:
        """Set the state of an instance: by its own class if that is listed, else by a rule."""
        rule = arrays.state_rule(instance) or known.STATES.get(type(instance))
        if self._is_ours(instance):
            listed.run(type(instance), listed.set_state, (instance, state))
        elif type(instance) is functools.partial:
            self._set_partial(instance, state)
        elif rule is None:
            raise Refused(f"sets the state of {listed.name_of(type(instance))}")
        else:
            _checked(listed.name_of(type(instance)), rule, (instance, state))

    def extend(self, target: object, values: list[object]) -> None:
        """Append to a deque, or to an instance of a listed type."""
        if type(target) is collections.deque:
            target.extend(values)
        elif self._is_ours(target):
            listed.run(type(target), listed.extend, (target, values))
        else:
            super().extend(target, values)

    def set_items(self, target: object, items: list[tuple[Any, Any]]) -> None:
        """Set items of a dict of the standard library, or of an instance of a listed type."""
        self._hashing.check(key for key, _ in items)
        if type(target) is dict:
            target.update(items)
        elif type(target) in known.DICTS or self._is_ours(target):
            listed.run(type(target), listed.set_items, (target, items))
        else:
            raise Damaged("a key for something that is not a dict")

    def add(self, values: list[object]) -> None:
        """Add to the set on the stack."""
        target = self.stack[-1]
        self._hashing.check(values)
        if type(target) is set:
            target.update(values)
        elif self._is_ours(target):
            listed.run(type(target), listed.add, (target, values))
        else:
            raise Damaged("an element for something that is not a set")

    def frozen(self, values: list[object]) -> None:
        """Push a frozenset."""
        self._hashing.check(values)
        self.stack.append(frozenset(values))

    def tuple_of(self, values: list[object]) -> None:
        """Push a tuple that is not nested too deeply to be hashed."""
        made = tuple(values)
        self._hashing.nest(made)
        self.stack.append(made)

    def persistent(self) -> None:
        """Push a storage."""
        [key] = self.pop_items(1)
        self.stack.append(self._storage(key))

    def attribute(self, *arguments: Any) -> object:
        """Return a nested class, a method or a constructor of a listed class, which picklers get with `getattr`."""
        match arguments:
            case (owner, str(name)):
                value = listed.attribute(owner, name, self._trusted(), is_ours=self._is_ours(owner))
                if name == "__new__":
                    self._constructors[id(value)] = value
                return value
        raise Refused("calls getattr with arguments that no pickler writes")

    def _trusts(self, cls: object) -> bool:
        return isinstance(cls, type) and self._trusted().lists(cls)

    def _is_ours(self, instance: object) -> bool:
        return id(instance) in self._made or self._trusts(type(instance))

    def _keep(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> object:
        made = listed.run(function, functools.partial(function, **keywords), arguments)
        self._made[id(made)] = made
        return made

    def partial(self, *arguments: Any) -> object:
        """Return a partial of a listed function, or the one that protocol 2 writes for `__getnewargs_ex__`."""
        match arguments:
            case (function,) if id(function) in self._constructors or self._trusted().lists(function):
                return functools.partial(function)
        raise Refused("calls functools.partial for something that is not listed")

    def _set_partial(self, instance: Any, state: object) -> None:
        match state:
            case (function, (*arguments,), dict() | None, dict() | None) if function is instance.func:
                is_constructor = id(function) in self._constructors
                if not is_constructor or (arguments and self._trusts(arguments[0])):
                    instance.__setstate__(state)
                    return
        raise Refused("sets the state of functools.partial")

    def _is_constructor(self, function: object) -> bool:
        if type(function) is not functools.partial or id(function.func) not in self._constructors:
            return False
        return bool(function.args) and self._trusts(function.args[0])

    def rebuild(self, *arguments: Any) -> object:
        """Rebuild a tensor of a class, with a function that is called like any other."""
        match arguments:
            case (function, type() as cls, tuple(inner), state):
                made = self.call(function, inner)
                if isinstance(made, Tensor):
                    return _torch(rebuild_from_type, (lambda: made, cls, (), state))
        raise Refused("rebuilds something that is not a tensor")

    opcodes = Machine.opcodes | {
        ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
        0x8B: lambda m: m.integer(m.number(4)),
        ord("B"): lambda m: m.push(m.take(m.number(4))),
        ord("C"): lambda m: m.push(m.take(m.number(1))),
        0x8E: lambda m: m.push(m.take(m.number(8))),
        0x96: lambda m: m.push(bytearray(m.take(m.number(8)))),
        0x8F: lambda m: m.push(set()),
        0x90: lambda m: m.add(m.since_mark()),
        0x91: lambda m: m.frozen(m.since_mark()),
        0x92: lambda m: m.push(m.make(*m.pop_items(3))),
        ord("Q"): lambda m: m.persistent(),
        ord("0"): lambda m: m.pop(),
        ord("1"): lambda m: m.since_mark(),
    }


_SPECIAL: dict[int, Callable[..., object]] = {
    id(guarded_getattr): Unpickler.attribute,
    id(functools.partial): Unpickler.partial,
    id(rebuild_from_type): Unpickler.rebuild,
}


def _checked(name: str, rule: known.Rule, arguments: tuple[Any, ...]) -> object:
    try:
        return rule(*arguments)
    except Exception as error:  # constructors of the standard library and of NumPy raise various types
        raise Refused(f"gives {name} arguments that no pickler writes: {error}") from error


def _torch(function: Any, arguments: tuple[Any, ...]) -> object:
    try:
        return function(*arguments)
    except Exception as error:  # torch raises various types
        raise Damaged(f"{listed.name_of(function)} failed: {error}") from error
