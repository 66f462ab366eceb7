"""A state dict as DCP's planners see it, and the way back: values set where they came from, in place."""

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._sharded_tensor_utils import _flatten_sharded_tensors
from torch.distributed.checkpoint._traverse import traverse_state_dict_v_2_3

from dcp_storage.errors import ConfigError

State = dict[str, Any]
ObjectPath = tuple[str | int, ...]
Mappings = dict[str, ObjectPath]


def flatten(state: State, *, nested: bool, sharded_tensors: bool) -> tuple[State, Mappings]:
    """Return a state dict by names, and the path of each name; without `nested`, its top level as it is.

    Raises:
        ConfigError: Two paths make the same name.
    """
    flat, mappings = _by_name(state) if nested else (dict(state), {})
    if sharded_tensors and any(isinstance(value, ShardedTensor) for value in flat.values()):
        flat = _flatten_sharded_tensors(flat)
    return flat, mappings


def _by_name(state: State) -> tuple[State, Mappings]:
    try:
        return flatten_state_dict(state)
    except ValueError as error:
        raise ConfigError(f"the state dict has two entries of one name: {error}. Rename one of them") from error


def flatten_as_before_2_4(state: State) -> tuple[State, Mappings]:
    """Return a state dict by the names that torch gave before 2.4, when dicts without tensors were stored whole."""
    flat: State = {}
    mappings: Mappings = {}

    def keep(path: ObjectPath, value: Any) -> None:
        name = ".".join(map(str, path))
        flat[name], mappings[name] = value, path

    traverse_state_dict_v_2_3(state, keep)
    return flat, mappings


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
