"""`Step`: a committed checkpoint of a run, as its head describes it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from dcp_storage.config import require_type
from dcp_storage.errors import ConfigError

_NOT_JSON = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class Step:
    """A committed step.

    Attributes:
        step: Its number.
        url: Where it is, without credentials.
        created: When it was committed; `None` if unknown, for stock checkpoints and damaged heads.
        raw_bytes: Size of its contents in memory, likewise.
        stored_bytes: Size of its objects, likewise.
        metrics: The metrics given when it was saved.
    """

    step: int
    url: str
    created: datetime | None = None
    raw_bytes: int | None = None
    stored_bytes: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


def info_of(step: int, metrics: Mapping[str, float] | None) -> dict[str, Any]:
    """Return the `info` in the head of a step.

    JSON has no NaN or infinity: they are written as strings that `float` can read.

    Raises:
        ConfigError: A metric is not a number, or its name is not a string.
    """
    if metrics is not None:
        require_type("metrics", metrics, Mapping)
    for name, value in (metrics or {}).items():
        if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"metrics[{name!r}] is {value!r}; pass numbers by name, such as {{'loss': loss.item()}}")
    return {"step": step, "metrics": {name: _written(_float(value)) for name, value in (metrics or {}).items()}}


def metrics_of(info: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics in a head, whatever wrote it."""
    found = info.get("metrics")
    read = found.items() if isinstance(found, dict) else ()
    numbers = {name: _NOT_JSON.get(value, value) if isinstance(value, str) else value for name, value in read}
    return {name: _float(value) for name, value in numbers.items() if type(value) in {int, float}}


def time_of(created: str) -> datetime | None:
    """Return the time in a head, whatever wrote it; `None` if it is not one."""
    try:
        time = datetime.fromisoformat(created)
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an int
        return math.inf if value > 0 else -math.inf


def _written(value: float) -> float | str:
    return next((text for text, number in _NOT_JSON.items() if repr(number) == repr(value)), value)
