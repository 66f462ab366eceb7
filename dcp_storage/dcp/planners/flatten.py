"""A state dict as DCP's planners see it, and the way back: values set where they came from, in place."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from dcp_storage.errors import ConfigError

State = dict[str, Any]
ObjectPath = tuple[str | int, ...]
Mappings = dict[str, ObjectPath]


def flatten(
    state: State, *, nested: bool, is_whole: Callable[[ObjectPath], bool] = lambda _: False
) -> tuple[State, Mappings]:
    """Return a state dict by DCP's names, and the path of each name; without `nested`, its top level as it is.

    Dicts are opened, and lists that hold tensors or dicts; any other value is an entry, and so is what `is_whole` says
    by its path.

    Raises:
        ConfigError: Two paths make the same name.
    """
    flat: State = {}
    mappings: Mappings = {}
    # Not DCP's own function: in torch 2.10 it leaves a circle that holds the state.
    for path, value in _leaves((), state, is_whole) if nested else _top(state):
        name = ".".join(map(str, path))
        if name in flat:
            raise ConfigError(f"the state dict has two entries of the name {name}. Rename one of them")
        flat[name], mappings[name] = value, path
    return flat, mappings


def _top(state: State) -> Iterator[tuple[ObjectPath, Any]]:
    return (((str(key),), value) for key, value in state.items())


def _leaves(path: ObjectPath, value: Any, is_whole: Callable[[ObjectPath], bool]) -> Iterator[tuple[ObjectPath, Any]]:
    for step, inner in _steps(value):
        below = (*path, step)
        if _is_open(inner) and not is_whole(below):
            yield from _leaves(below, inner, is_whole)
        else:
            yield below, inner


def empty_dicts(state: State) -> list[ObjectPath]:
    """Return the paths of the dicts in a state dict that hold nothing."""
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
    """Set the value that stands at a path in a state dict.

    Paths spell every key of a dict as text: one that is not text (an optimizer's parameter numbers) is found by its
    text.
    """
    container: Any = state
    for step in path[:-1]:
        container = container[_key(container, step)]
    container[_key(container, path[-1])] = value


def _key(container: MutableMapping[Any, Any] | list[Any], step: str | int) -> Any:
    if not isinstance(container, Mapping) or step in container:
        return step
    return next((key for key in container if str(key) == step), step)
