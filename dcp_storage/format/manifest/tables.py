"""What a manifest says by name, decoded as it is asked for."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Generic, TypeVar

T = TypeVar("T")
StatePath = tuple[str | int, ...]
"""Where a value stands in the nested state dict: keys of mappings and indices of lists."""


class Table(Mapping[str, T], Generic[T]):
    """What frames of one kind hold, by name.

    A frame is decoded, and checked whole, when the value of a name in it is asked for; else its names alone are.
    """

    def __init__(
        self, firsts: Sequence[str], decode: Callable[[int], dict[str, T]], names: Callable[[int], list[str]]
    ) -> None:
        self._firsts = firsts
        self._decode = decode
        self._decode_names = names
        self._frames: dict[int, dict[str, T]] = {}

    def __getitem__(self, name: str) -> T:
        number = bisect_right(self._firsts, name) - 1
        if number < 0:
            raise KeyError(name)
        return self._frame(number)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    @cached_property
    def _names(self) -> dict[str, None]:
        numbers = range(len(self._firsts))
        return dict.fromkeys(chain.from_iterable(self._frames.get(n) or self._decode_names(n) for n in numbers))

    def _frame(self, number: int) -> dict[str, T]:
        if number not in self._frames:
            self._frames[number] = self._decode(number)
        return self._frames[number]


class LazyPaths(Mapping[str, StatePath]):
    """`planner_data`, which `load` decodes and checks when any of it is asked for."""

    def __init__(self, load: Callable[[], Mapping[str, StatePath]]) -> None:
        self._load = load

    def __getitem__(self, name: str) -> StatePath:
        return self._load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())
