"""Names of the directories of steps."""

import re

_STEP = re.compile(r"step-(0|[1-9][0-9]*)", re.ASCII)


def directory_of(step: int) -> str:
    """Return the name of a step's directory."""
    return f"step-{step}"


def parse_step(name: str) -> int | None:
    """Return the step whose directory has exactly this name, or `None`, as for `step-7.backup` and `step-07`."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None
