"""Policies that decide which steps to keep: small and pure, combined with `|`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from dcp_storage.errors import ConfigError
from dcp_storage.steps.step import Step


class Policy(ABC):
    """Decides which steps to keep, and why. `one | other` keeps what either keeps."""

    @abstractmethod
    def kept(self, steps: Sequence[Step], now: datetime) -> dict[int, list[str]]:
        """Return which of the steps, given in ascending order, to keep, with the reasons."""

    def __or__(self, other: "Policy") -> "Policy":
        return _Either((self, other)) if isinstance(other, Policy) else NotImplemented


@dataclass(frozen=True)
class _Either(Policy):
    policies: tuple[Policy, ...]

    def kept(self, steps: Sequence[Step], now: datetime) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for policy in self.policies:
            for step, reasons in policy.kept(steps, now).items():
                found.setdefault(step, []).extend(reasons)
        return found


@dataclass(frozen=True)
class KeepLatest(Policy):
    """Keeps the newest steps.

    ```python
    checkpoints = Checkpoints("s3://bucket/run", keep=KeepLatest(3))
    ```
    """

    count: int

    def __post_init__(self) -> None:
        _check_positive("KeepLatest", self.count)

    def kept(self, steps: Sequence[Step], now: datetime) -> dict[int, list[str]]:  # noqa: ARG002
        """Return the newest."""
        return _because(f"one of the latest {self.count}", steps[-self.count :])


@dataclass(frozen=True)
class KeepEvery(Policy):
    """Keeps the steps that are multiples of a number.

    ```python
    checkpoints = Checkpoints("s3://bucket/run", keep=KeepLatest(3) | KeepEvery(1000))
    ```
    """

    interval: int

    def __post_init__(self) -> None:
        _check_positive("KeepEvery", self.interval)

    def kept(self, steps: Sequence[Step], now: datetime) -> dict[int, list[str]]:  # noqa: ARG002
        """Return the multiples."""
        return _because(f"every {self.interval}", [step for step in steps if step.step % self.interval == 0])


@dataclass(frozen=True)
class KeepBest(Policy):
    """Keeps the steps with the best values of a metric.

    ```python
    checkpoints = Checkpoints("s3://bucket/run", keep=KeepLatest(3) | KeepBest(2, "loss", mode="min"))
    checkpoints.save(200, state, metrics={"loss": 0.31})
    ```

    Steps without the metric, or with NaN, are never best; of equal ones the newer is better.
    """

    count: int
    metric: str
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        _check_positive("KeepBest", self.count)
        if self.mode not in {"min", "max"}:
            raise ConfigError(f'KeepBest: mode is {self.mode!r}; choose "min" or "max"')

    def kept(self, steps: Sequence[Step], now: datetime) -> dict[int, list[str]]:  # noqa: ARG002
        """Return the best."""
        sign = 1 if self.mode == "min" else -1
        told = [step for step in steps if not math.isnan(step.metrics.get(self.metric, math.nan))]
        best = sorted(told, key=lambda step: (sign * step.metrics[self.metric], -step.step))
        return _because(f"one of the best {self.count} by {self.metric}", best[: self.count])


@dataclass(frozen=True)
class KeepYounger(Policy):
    """Keeps steps that were committed recently (by the committing host's clock), and those whose time is unknown.

    ```python
    checkpoints = Checkpoints("s3://bucket/run", keep=KeepYounger(timedelta(days=7)))
    ```
    """

    age: timedelta

    def __post_init__(self) -> None:
        if not isinstance(self.age, timedelta) or self.age <= timedelta():
            raise ConfigError(f"KeepYounger: age is {self.age!r}; pass a positive timedelta")

    def kept(self, steps: Sequence[Step], now: datetime) -> dict[int, list[str]]:
        """Return the recent ones."""
        young = [step for step in steps if step.created is None or now - step.created < self.age]
        return _because(f"younger than {self.age}", young)


def _check_positive(name: str, count: object) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"{name}({count!r}) is invalid; pass a positive integer")


def _because(reason: str, steps: Iterable[Step]) -> dict[int, list[str]]:
    return {step.step: [reason] for step in steps}
