"""The names of a state dict in a checkpoint: before 2.4 torch stored containers without tensors as one entry."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from dcp_storage.dcp.planners.flatten import Mappings, ObjectPath, State, empty_dicts, flatten
from dcp_storage.dcp.stored import entry_names


def names_of(state: State, metadata: Metadata, *, nested: bool) -> tuple[State, Mappings]:
    """Return a state dict by name, and the path of each name.

    A container without tensors is one entry if the checkpoint has an entry at its path and none below that.

    Raises:
        ConfigError: Two paths have the same name.
    """
    containers: set[str] = set()

    def note(path: ObjectPath, container: Any) -> bool:
        if not _has_tensor(container):
            containers.add(".".join(map(str, path)))
        return False

    flat, mappings = flatten(state, nested=nested, is_whole=note)
    unasked = containers.intersection(entry_names(metadata)).difference(flat)
    if not nested or not unasked:
        return flat, mappings
    paths = {fqn: _path(metadata, fqn) for fqn in metadata.state_dict_metadata}
    opened = {path[:length] for path in paths.values() for length in range(1, len(path))}
    whole = {paths[fqn] for fqn in unasked} - opened
    if metadata.planner_data is None:  # then a path is its name
        return flatten(state, nested=True, is_whole=lambda path, _: tuple(".".join(map(str, path)).split(".")) in whole)
    return flatten(state, nested=True, is_whole=lambda path, _: path in whole)


def _has_tensor(value: Any) -> bool:
    """Return whether a dict or a list contains a tensor, as torch before 2.4 looked for them: not within tuples."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(isinstance(each, Tensor) or _has_tensor(each) for each in inner)


def _path(metadata: Metadata, fqn: str) -> ObjectPath:
    paths = metadata.planner_data or {}
    return tuple(paths[fqn]) if fqn in paths else tuple(fqn.split("."))


def stored_below_empty_dicts(state: State, unasked: Iterable[str]) -> dict[str, int]:
    """Return the empty dicts of a state dict, with the number of `unasked` entries below each."""
    found = {".".join(map(str, path)): 0 for path in empty_dicts(state) if path}
    if found:
        for fqn in unasked:
            steps = fqn.split(".")
            for length in range(1, len(steps)):
                above = ".".join(steps[:length])
                if above in found:
                    found[above] += 1
    return {fqn: below for fqn, below in found.items() if below}
