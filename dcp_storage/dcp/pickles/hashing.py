"""Limits on hashing: a tuple's hash visits everything in it, repeatedly, on the C stack."""

from collections.abc import Iterable
from typing import Any

from dcp_storage.format.pickles import Damaged, Refused

_ATOMS = frozenset({str, int, bool, float, bytes, type(None)})
_MOST_NESTED = 100


class Hashing:
    """Bounds the hashing work of one pickle by its size."""

    def __init__(self, nbytes: int) -> None:
        self._left = 1000 + nbytes
        self._depths: dict[int, tuple[int, tuple[Any, ...]]] = {}

    def nest(self, made: tuple[Any, ...]) -> None:
        """Record a new tuple.

        Raises:
            Refused: Tuples are nested too deeply; the hash of a listed type may visit them, too.
        """
        if tuple in set(map(type, made)):
            depth = 1 + max(self._depths.get(id(inner), (1, ()))[0] for inner in made if type(inner) is tuple)
            if depth > _MOST_NESTED:
                raise Refused(f"nests tuples more than {_MOST_NESTED} deep")
            self._depths[id(made)] = depth, made  # kept alive, so that its id is not reused

    def check(self, keys: Iterable[Any]) -> None:
        """Count what the hashes of keys visit.

        Raises:
            Damaged: They visit more than the pickle has bytes, or are nested too deeply.
        """
        for key in keys:
            if isinstance(key, tuple):
                self._visit(key, _MOST_NESTED)

    def _visit(self, key: tuple[Any, ...], levels: int) -> None:
        self._left -= len(key) + 1
        if self._left < 0 or not levels:
            raise Damaged("keys are nested too deeply or too large")
        if _ATOMS.issuperset(map(type, key)):
            return
        for inner in key:
            if isinstance(inner, tuple):
                self._visit(inner, levels - 1)
