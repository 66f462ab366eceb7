"""Python's cyclic garbage collector, paused where plans are made."""

import gc
import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def gc_paused(function: Callable[P, R]) -> Callable[P, R]:
    """Pause the collector while a function makes many objects and no cycles.

    It would walk the whole heap each time that has grown by a quarter, which takes a third of the time of a save or a
    load of many small tensors. Only in the main thread: the collector is the process's, and a save beside training
    must not turn it on while training has it off.
    """

    @wraps(function)
    def paused(*args: P.args, **kwargs: P.kwargs) -> R:
        if not gc.isenabled() or threading.current_thread() is not threading.main_thread():
            return function(*args, **kwargs)
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            gc.enable()

    return paused
