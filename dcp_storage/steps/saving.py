"""Data that ranks exchange before they save a step, so that an error on one is raised on all."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.distributed.checkpoint.stateful import Stateful

from dcp_storage.config import require_type
from dcp_storage.dcp.writer import AsyncStorageWriter
from dcp_storage.errors import ConfigError
from dcp_storage.steps.checking import Verdict
from dcp_storage.steps.per_rank import Place, Slot, places, standing_in, to_save


@dataclass(frozen=True)
class Asked:
    """The arguments of a save; see `Checkpoints.save` and `async_save`."""

    step: int
    state: dict[str, Any]
    metrics: Mapping[str, float] | None
    overwrite: bool
    skip_if_busy: bool = False


@dataclass(frozen=True)
class Told:
    """What a rank sends the others before a save.

    Attributes:
        step: The step that it saves.
        names: The names of its `PerRank`s.
        verdicts: Its verdicts on earlier steps.
        busy: Whether its last save is still running, and this one is to be skipped for that.
    """

    step: int
    names: Sequence[str] = ()
    verdicts: Mapping[int, Verdict] = field(default_factory=dict)
    busy: bool = False


@dataclass(frozen=True)
class Prepared:
    """A state dict for DCP to save, without anything that may raise on a single rank before the ranks communicate."""

    plain: dict[str, Any]
    places: Sequence[Place]
    slots: list[Slot]
    writer: AsyncStorageWriter

    @classmethod
    def of(cls, state: Mapping[str, Any], rank: int, writer: AsyncStorageWriter) -> "Prepared":
        """Call `state_dict` of the `Stateful`s in a state dict, as DCP does.

        Raises:
            ConfigError: It is not a dict.
        """
        require_type("state", state, Mapping)
        plain = {key: held.state_dict() if isinstance(held, Stateful) else held for key, held in state.items()}
        found = places(plain)
        return cls(plain, found, to_save(found, rank), writer)

    @property
    def names(self) -> list[str]:
        """The names of its `PerRank`s."""
        return [place.name for place in self.places]

    @contextmanager
    def spread(self) -> Iterator[dict[str, Any]]:
        """Yield the state dict with the entries of this rank in place of its `PerRank`s."""
        with standing_in(self.plain, self.places, self.slots):
            yield self.plain


def check_step(step: object) -> int:
    """Return the number of a step.

    Raises:
        ConfigError: It is not a step.
    """
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ConfigError(f"the step is {step!r}; pass a non-negative integer")
    return step


def check_alike(told: Sequence[Told]) -> None:
    """Check that all ranks save the same step, and have `PerRank`s with the same names.

    Raises:
        ConfigError: They do not.
    """
    steps = [each.step for each in told]
    if len(set(steps)) > 1:
        raise ConfigError(f"the ranks save different steps: by rank, {steps[:8]}")
    for rank, each in enumerate(told):
        if odd := sorted(set(each.names).symmetric_difference(told[0].names)):
            raise ConfigError(f"{', '.join(odd)}: a PerRank on only one of ranks {rank} and 0")
