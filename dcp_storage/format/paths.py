"""Paths into a nested state dict, as planners store them: what a loader would build from them, before it does."""

from collections.abc import Iterable
from typing import Any


def list_slots(paths: Iterable[tuple[str | int, ...]]) -> int:
    """Count the elements of the lists that a loader builds for these paths: it fills each up to its highest index."""
    slots = 0
    root: dict[Any, Any] = {}
    for path in paths:
        node = root
        for step in path if not all(isinstance(step, str) for step in path) else ():
            if isinstance(step, int):
                slots += max(0, step + 1 - node.get(None, 0))
                node[None] = max(step + 1, node.get(None, 0))
            node = node.setdefault(step, {})
    return slots
