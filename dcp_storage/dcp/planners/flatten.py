"""A state dict as DCP's planners see it, and the way back: values set where they came from, in place."""

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from dcp_storage.errors import ConfigError

State = dict[str, Any]
ObjectPath = tuple[str | int, ...]
Mappings = dict[str, ObjectPath]


def flatten(state: State, *, nested: bool) -> tuple[State, Mappings]:
    """Return a state dict by names, and the path of each name; without `nested`, its top level as it is.

    Raises:
        ConfigError: Two paths make the same name.
    """
    planner = DefaultSavePlanner(flatten_state_dict=nested, flatten_sharded_tensors=False)
    try:
        planner.set_up_planner(state)
    except ValueError as error:
        raise ConfigError(f"the state dict has two entries of one name: {error}. Rename one of them") from error
    return dict(planner.state_dict), planner.mappings if nested else {}


def flatten_as_before_2_4(state: State) -> tuple[State, Mappings]:
    """Return a state dict by the names of torch before 2.4, which stored containers without tensors whole."""
    flat: State = {}
    mappings: Mappings = {}

    def visit(path: ObjectPath, value: Any) -> None:
        if _holds_tensors(value):
            for step, inner in _steps(value):
                visit((*path, step), inner)
        else:
            name = ".".join(map(str, path))
            flat[name], mappings[name] = value, path

    for key, value in state.items():
        visit((str(key),), value)
    return flat, mappings


def _holds_tensors(container: Any) -> bool:
    return any(isinstance(inner, Tensor) or _holds_tensors(inner) for _, inner in _steps(container))


def _steps(container: Any) -> Iterable[tuple[str | int, Any]]:
    if isinstance(container, Mapping):
        return ((str(key), inner) for key, inner in container.items())
    return enumerate(container) if isinstance(container, list) else ()


def put(state: State, path: ObjectPath, value: Any) -> None:
    """Set the value that stands at a path in a state dict.

    Paths spell every key of a dict as text: a key that is none (an optimizer's parameter numbers) is found by its text.
    """
    container: Any = state
    for step in path[:-1]:
        container = container[_key(container, step)]
    container[_key(container, path[-1])] = value


def _key(container: MutableMapping[Any, Any] | list[Any], step: str | int) -> Any:
    if not isinstance(container, Mapping) or step in container:
        return step
    return next((key for key in container if str(key) == step), step)
