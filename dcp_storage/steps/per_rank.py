"""`PerRank`: state that belongs to one rank, stored once per rank in the same commit."""

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any, Generic, NoReturn, TypeVar

from torch.distributed.checkpoint.stateful import Stateful

from dcp_storage.errors import ConfigError, CoverageError

T = TypeVar("T")

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})


class PerRank(Generic[T]):
    """A value that differs from rank to rank: a random state, a data loader's position. For `Checkpoints`.

    ```python
    state = {"model": model.state_dict(), "rng": PerRank(torch.get_rng_state()), "loader": PerRank(loader)}
    checkpoints.save(step, state)
    checkpoints.load(state)  # each rank gets what it saved
    torch.set_rng_state(state["rng"].value)
    ```

    It is stored whole, as one entry per rank: that of rank 3 is called `rng.3`, and is a one-element tuple of the
    value. The value may be anything that an entry may be; tensors in it belong to this rank only.

    Args:
        value: The value to store, and to replace by a load. An object with `state_dict` and `load_state_dict` is
            stored and loaded with these.
        regroup: A function for loads by another number of ranks: it takes all values, by the rank that saved them, and
            returns this rank's. Without it such a load raises `CoverageError`.

    Attributes:
        value: The value that was given or loaded.
    """

    def __init__(self, value: T, *, regroup: Callable[[list[Any]], Any] | None = None) -> None:
        self.value = value
        self.regroup = regroup

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigError(
            "a PerRank can only be saved and loaded by Checkpoints, in dicts and lists of the state dict. With plain "
            "dcp.save, put the rank into the name: state[f'rng.{rank}'] = value"
        )

    def stored(self) -> Any:
        """Return the value to store."""
        return self.value.state_dict() if isinstance(self.value, Stateful) else self.value

    def take(self, values: Sequence[Any], *, regrouped: bool) -> None:
        """Take the loaded values: this rank's, or those of all ranks."""
        value = self.regroup(list(values)) if regrouped and self.regroup else values[0]
        if isinstance(self.value, Stateful):
            self.value.load_state_dict(value)
        else:
            self.value = value


@dataclass(frozen=True)
class Place:
    """The position of a `PerRank` in a state dict."""

    path: tuple[Any, ...]
    own: PerRank[Any]

    @property
    def name(self) -> str:
        """Its name in DCP."""
        return ".".join(map(str, self.path))

    def swap(self, state: Any, value: Any) -> Any:
        """Put a value there, and return the previous one."""
        container = reduce(getitem, self.path[:-1], state)  # looked up again: DCP's planner creates new lists
        was, container[self.path[-1]] = container[self.path[-1]], value
        return was


Slot = dict[str, tuple[Any]]
"""Replaces it while DCP saves or loads: entries by rank. A tuple is a leaf for planners, and stagers copy it."""

_UNREAD = "nothing was read"


def places(state: Any, above: tuple[Any, ...] = ()) -> list[Place]:
    """Return the places of all `PerRank`s in a state dict."""
    found: list[Place] = []
    for key, held in _inner(state):
        path = (*above, key)
        found += [Place(path, held)] if isinstance(held, PerRank) else places(held, path)
    return found


def _inner(container: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(container, MutableMapping):
        return list(container.items())
    if isinstance(container, list) and not _ATOMS.issuperset(map(type, container)):  # there may be millions
        return list(enumerate(container))
    return ()


def to_save(found: Sequence[Place], rank: int) -> list[Slot]:
    """Return what a rank stores for each."""
    return [{str(rank): (place.own.stored(),)} for place in found]


def to_load(found: Sequence[Place], rank: int, size: int, saved: int | None) -> list[Slot]:
    """Return what a load fills for each: this rank's entry, or those of all `saved` ranks, to be regrouped.

    Raises:
        CoverageError: They were saved by another number of ranks than `size`, and one cannot be regrouped.
    """
    if saved in {None, size}:
        return [{str(rank): (_UNREAD,)} for _ in found]
    if stuck := [place.name for place in found if place.own.regroup is None]:
        raise CoverageError(
            f"{', '.join(stuck)}: saved by {saved} ranks, but {size} ranks load. Load on {saved}, or pass a function "
            "that takes the list of all values: PerRank(value, regroup=function)",
            fqn=stuck[0],
            fqns=tuple(stuck),
        )
    return [{str(each): (_UNREAD,) for each in range(saved or 0)} for _ in found]


@contextmanager
def standing_in(state: Any, found: Sequence[Place], slots: list[Slot]) -> Iterator[None]:
    """Put slots in the places of a state dict while DCP uses it; afterwards, loaded values are in the slots."""
    for place, slot in zip(found, slots, strict=True):
        place.swap(state, slot)
    try:
        yield
    finally:
        slots[:] = [place.swap(state, place.own) for place in found]


def take(found: Sequence[Place], slots: Sequence[Slot], *, regrouped: bool) -> None:
    """Hand over the loaded values; values that were allowed to be missing stay unchanged."""
    for place, slot in zip(found, slots, strict=True):
        values = [value for (value,) in slot.values()]
        if all(value is not _UNREAD for value in values):
            place.own.take(values, regrouped=regrouped)
