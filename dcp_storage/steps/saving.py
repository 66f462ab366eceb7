"""What the ranks tell each other before they save a step, so that what is wrong on one is raised on all."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.distributed.checkpoint.stateful import Stateful

from dcp_storage.dcp.writer import AsyncStorageWriter
from dcp_storage.errors import ConfigError
from dcp_storage.steps.checking import Verdict
from dcp_storage.steps.per_rank import Place, Slot, places, standing_in, to_save


@dataclass(frozen=True)
class Asked:
    """What a program asks for; see `Checkpoints.save` and `async_save`."""

    step: int
    state: dict[str, Any]
    metrics: Mapping[str, float] | None
    overwrite: bool
    skip_if_busy: bool = False


@dataclass(frozen=True)
class Told:
    """What a rank tells the others before a save.

    Attributes:
        step: The step that it saves.
        names: Its `PerRank`s.
        verdicts: What its checks of earlier steps say.
        busy: Whether its last save goes on, where that is a reason to save nothing.
    """

    step: int
    names: Sequence[str] = ()
    verdicts: Mapping[int, Verdict] = field(default_factory=dict)
    busy: bool = False


@dataclass(frozen=True)
class Prepared:
    """A state dict as DCP is to save it, with nothing in it that may raise on one rank alone before the ranks meet."""

    plain: dict[str, Any]
    places: Sequence[Place]
    slots: list[Slot]
    writer: AsyncStorageWriter

    @classmethod
    def of(cls, state: Mapping[str, Any], rank: int, writer: AsyncStorageWriter) -> "Prepared":
        """Ask the `Stateful`s of a state dict, as DCP does."""
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
        raise ConfigError(f"the step is {step!r}; give a whole number from 0")
    return step


def check_alike(told: Sequence[Told]) -> None:
    """Check that all ranks save the same step, and have `PerRank`s of the same names.

    Raises:
        ConfigError: They do not.
    """
    steps = [each.step for each in told]
    if len(set(steps)) > 1:
        raise ConfigError(f"the ranks save different steps: {steps[:8]}, by rank")
    for rank, each in enumerate(told):
        if odd := sorted(set(each.names).symmetric_difference(told[0].names)):
            raise ConfigError(f"{', '.join(odd)}: a PerRank on rank {rank} or on rank 0, and not on the other")
