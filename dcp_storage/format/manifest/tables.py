"""Contents of a manifest by name, decoded on demand."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Generic, TypeVar

T = TypeVar("T")
StatePath = tuple[str | int, ...]
"""The path of a value in the nested state dict: keys of mappings and indices of lists."""


class Table(Mapping[str, T], Generic[T]):
    """The contents of all frames of one kind, by name.

    A frame is decoded and checked as a whole when one of its values is requested; until then, only its names are.
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
    """`planner_data`, which `load` decodes and checks on first access."""

    def __init__(self, load: Callable[[], Mapping[str, StatePath]]) -> None:
        self._load = load

    def __getitem__(self, name: str) -> StatePath:
        return self._load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())
