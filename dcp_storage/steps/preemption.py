"""Signals that ask a run to save and end, handled by all ranks at the same step."""

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
    """Requests for a save, by a signal or by the program itself.

    Handlers only count, so that a signal that arrives while the ranks communicate counts for the next time.
    """

    def __init__(self, signals: Sequence[int]) -> None:
        self.signalled = False
        """Whether a signal was reported to all ranks."""
        self._handlers = [_Handler(number) for number in _checked(signals)]
        self._requests = self._answered = self._signals_told = 0

    def request(self) -> None:
        """Request a save."""
        self._requests += 1

    def listen(self) -> None:
        """Install the handlers, once, if this is the main thread: Python forbids it elsewhere."""
        if threading.current_thread() is threading.main_thread():
            for handler in self._handlers:
                handler.install()

    def agree(self, ranks: Ranks, step: int) -> bool:
        """Return on all ranks whether a save was requested on any since the last time.

        Raises:
            ConfigError: The ranks are not at the same step, or it is invalid.
        """
        requests, signals = self._requests, sum(handler.count for handler in self._handlers)
        asked = _ASKED if requests > self._answered else _NOTHING
        news = _SIGNALLED if signals > self._signals_told else asked
        most, highest, lowest = ranks.greatest([news, step, -step])
        if highest != -lowest or -lowest < 0:
            raise ConfigError(
                f"should_save was called with steps from {-lowest} to {highest}, or with an invalid step: pass the "
                "same step on all ranks, a non-negative integer"
            )
        self._answered, self._signals_told = requests, signals
        self.signalled = self.signalled or most == _SIGNALLED
        return most != _NOTHING

    def stop(self) -> None:
        """Restore the previous handlers."""
        for handler in self._handlers:
            handler.take_back()


def _checked(signals: Sequence[int]) -> list[signal.Signals]:
    try:
        return list(map(signal.Signals, signals))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"signals is {signals!r}; pass a list such as [signal.SIGTERM] ({error})") from error


class _Handler:
    """Counts the first signal and calls the previous handler; a second signal is left to that handler."""

    def __init__(self, number: int) -> None:
        self.count = 0
        self._closed = False
        self._number = number
        self._before: Any = None
        self._process: int | None = None

    def install(self) -> None:
        if self._process is None:
            self._before = signal.signal(self._number, self._handle)
            self._process = os.getpid()

    def take_back(self) -> None:
        self._closed = True  # it may have to stay: below a later handler, or because this is not the main thread
        is_ours = self._process == os.getpid() and signal.getsignal(self._number) == self._handle
        if is_ours and threading.current_thread() is threading.main_thread():
            self._let_through()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._closed and signal.getsignal(number) != self._handle:  # a later handler calls this one
            if callable(self._before):
                self._before(number, frame)
            return
        # A forked process (a data loader's worker) is asked to end by its parent, and has nothing to save.
        if self._closed or self.count or self._process != os.getpid():
            self._let_through()
            signal.raise_signal(number)
            return
        self.count += 1
        if callable(self._before):
            self._before(number, frame)

    def _let_through(self) -> None:
        # A handler that was not set from Python is unknown: then the system's default is the best choice.
        signal.signal(self._number, signal.SIG_DFL if self._before is None else self._before)
