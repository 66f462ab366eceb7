"""Signals that ask a run to save and end, noticed by all ranks at the same step."""

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from dcp_storage.errors import ConfigError
from dcp_storage.steps.groups import Ranks

_NOTHING, _ASKED, _SIGNALLED = range(3)


class Preemption:
    """What asks this process for a save: a signal, or its own program.

    Handlers only count, so that what comes while the ranks talk counts for the next time.
    """

    def __init__(self, signals: Sequence[int]) -> None:
        self.signalled = False
        """Whether all ranks were told of a signal."""
        self._handlers = [_Handler(number) for number in signals]
        self._requests = self._answered = self._signals_told = 0

    def request(self) -> None:
        """Ask for a save."""
        self._requests += 1

    def listen(self) -> None:
        """Install the handlers, once, if this is the main thread: elsewhere Python forbids it."""
        if threading.current_thread() is threading.main_thread():
            for handler in self._handlers:
                handler.install()

    def agree(self, ranks: Ranks, step: int) -> bool:
        """Return on all ranks whether any of them was asked since the last time.

        Raises:
            ConfigError: The ranks are not at the same step, or it is not a valid one.
        """
        requests, signals = self._requests, sum(handler.count for handler in self._handlers)
        asked = _ASKED if requests > self._answered else _NOTHING
        news = _SIGNALLED if signals > self._signals_told else asked
        most, highest, lowest = ranks.greatest([news, step, -step])
        if highest != -lowest or -lowest < 0:
            raise ConfigError(
                f"should_save was called with steps from {-lowest} to {highest}, or something else: give all ranks "
                "the same step, a whole number from 0"
            )
        self._answered, self._signals_told = requests, signals
        self.signalled = self.signalled or most == _SIGNALLED
        return most != _NOTHING

    def stop(self) -> None:
        """Take the handlers back."""
        for handler in self._handlers:
            handler.take_back()


class _Handler:
    """Counts the first signal and calls the handler that was there before; a second one is left to that."""

    def __init__(self, number: int) -> None:
        self.count = 0
        self._number = number
        self._before: Any = None
        self._process: int | None = None

    def install(self) -> None:
        if self._process is None:
            self._before = signal.signal(self._number, self._handle)
            self._process = os.getpid()

    def take_back(self) -> None:
        is_ours = self._process == os.getpid() and signal.getsignal(self._number) == self._handle
        if is_ours and threading.current_thread() is threading.main_thread():
            self._let_through()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A fork (a data loader's worker) is asked to end by whoever made it, and has nothing to save.
        if self.count or self._process != os.getpid():
            self._let_through()
            signal.raise_signal(number)
            return
        self.count += 1
        if callable(self._before):
            self._before(number, frame)

    def _let_through(self) -> None:
        # A handler that was not set from Python is not known: then the system's own is the best there is.
        signal.signal(self._number, signal.SIG_DFL if self._before is None else self._before)
