"""Python's cyclic garbage collector, paused where plans are made."""

import gc
import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_MANY = 5_000
"""So many young objects take noticeable time to traverse: a millisecond."""
_FEW = 1_000
"""Python 3.12 starts with fewer frozen objects: if there are more, the program has called `gc.freeze`."""

P = ParamSpec("P")
R = TypeVar("R")


def gc_paused(function: Callable[P, R]) -> Callable[P, R]:
    """Pause the collector while a function creates many objects and no cycles.

    It would traverse the whole heap each time that has grown by a quarter, which takes a third of the time of a save or
    a load of many small tensors. Pause only in the main thread: the collector is process-wide, and a save during
    training must not turn it on while training has it off.
    """

    @wraps(function)
    def paused(*args: P.args, **kwargs: P.kwargs) -> R:
        if not gc.isenabled() or threading.current_thread() is not threading.main_thread():
            return function(*args, **kwargs)
        gc.collect(0)  # current garbage must not move to the oldest generation below
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            _age_young_objects()
            gc.enable()

    return paused


def _age_young_objects() -> None:
    """Move many young objects to the oldest generation, as the next collection would, without traversing them."""
    if gc.get_count()[0] > _MANY and gc.get_freeze_count() < _FEW:
        gc.freeze()
        gc.unfreeze()
