"""Flattens a state dict as DCP's planners do, and sets values in the original."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from dcp_storage.errors import ConfigError

State = dict[str, Any]
ObjectPath = tuple[str | int, ...]
Mappings = dict[str, ObjectPath]


def flatten(
    state: State, *, nested: bool, is_whole: Callable[[ObjectPath, Any], bool] = lambda _path, _value: False
) -> tuple[State, Mappings]:
    """Return a state dict with DCP's names, and the path of each name; without `nested`, its top level unchanged.

    Dicts, and lists that contain tensors or dicts, are flattened; any other value is an entry, and so are values for
    which `is_whole` is true.

    Raises:
        ConfigError: Two paths have the same name.
    """
    flat: State = {}
    mappings: Mappings = {}
    # Not DCP's own function: in torch 2.10 it leaves a reference cycle that keeps the state alive.
    for path, value in _leaves((), state, is_whole) if nested else _top(state):
        name = ".".join(map(str, path))
        if name in flat:
            raise _twice(name)
        flat[name], mappings[name] = value, path
    return flat, mappings


def _top(state: State) -> Iterator[tuple[ObjectPath, Any]]:
    return (((str(key),), value) for key, value in state.items())


def _leaves(
    path: ObjectPath, value: Any, is_whole: Callable[[ObjectPath, Any], bool]
) -> Iterator[tuple[ObjectPath, Any]]:
    _check_keys(path, value)
    for step, inner in _steps(value):
        below = (*path, step)
        if _is_open(inner) and not is_whole(below, inner):
            yield from _leaves(below, inner, is_whole)
        else:
            yield below, inner


def _check_keys(path: ObjectPath, container: Any) -> None:
    """Refuse keys that differ only by their type, such as 1 and "1": a path could not tell them apart."""
    if isinstance(container, Mapping) and any(type(key) is not str for key in container):
        for text, count in Counter(map(str, container)).items():
            if count > 1:
                raise _twice(".".join(map(str, (*path, text))))


def _twice(name: str) -> ConfigError:
    return ConfigError(f"the state dict has two entries named {name}. Rename one of them")


def empty_dicts(state: State) -> list[ObjectPath]:
    """Return the paths of the empty dicts in a state dict."""
    return list(_empty_dicts((), state))


def _empty_dicts(path: ObjectPath, value: Any) -> Iterator[ObjectPath]:
    if isinstance(value, Mapping) and not value:
        yield path
    elif _is_open(value):
        for step, inner in _steps(value):
            if isinstance(inner, Mapping | list):
                yield from _empty_dicts((*path, step), inner)


def _is_open(value: Any) -> bool:
    if isinstance(value, list):
        return any(isinstance(inner, Tensor) or _is_open(inner) for inner in value)
    return isinstance(value, Mapping)


def _steps(container: Any) -> Iterable[tuple[str | int, Any]]:
    if isinstance(container, Mapping):
        return ((str(key), inner) for key, inner in container.items())
    return enumerate(container) if isinstance(container, list) else ()


def put(state: State, path: ObjectPath, value: Any) -> None:
    """Set the value at a path in a state dict.

    Paths contain every dict key as a string: other keys (an optimizer's parameter numbers) are found by their string.
    """
    container: Any = state
    for step in path[:-1]:
        container = container[_key(container, step)]
    container[_key(container, path[-1])] = value


def _key(container: MutableMapping[Any, Any] | list[Any], step: str | int) -> Any:
    if not isinstance(container, Mapping) or step in container:
        return step
    return next((key for key in container if str(key) == step), step)
