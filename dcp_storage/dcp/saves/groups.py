"""Groups a plan's items: a checkpoint's `optim` may be dropped one day, and its `model` kept."""

from collections.abc import Sequence

from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

_MOST_GROUPS = 16
"""If there are more top-level mappings, they are not droppable parts of a state, but names in a model."""

_Path = tuple[str | int, ...]


def group_items(plan: SavePlan, planner: SavePlanner) -> list[str]:
    """Return the top-level mapping of the state dict that each item is in; an empty list if there is only one.

    Mappings that contain only a single mapping are skipped, and items next to mappings form a group.
    """
    mappings: dict[str, _Path] = getattr(planner, "mappings", None) or {}
    depth = _depth(list(mappings.values()))
    names = {fqn: str(path[depth]) if len(path) > depth + 1 else "" for fqn, path in mappings.items()}
    if not 1 < len(set(names.values())) <= _MOST_GROUPS:
        return []
    return [names.get(item.index.fqn, "") for item in plan.items]


def _depth(paths: Sequence[_Path]) -> int:
    """Return how many mappings enclose all entries, each without siblings."""
    depth = 0
    while paths and all(len(path) > depth + 1 for path in paths) and len({path[depth] for path in paths}) == 1:
        depth += 1
    return depth
