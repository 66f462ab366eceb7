"""Saves that DCP runs beside training, for `dcp.async_save`: one after another, gently, and never failing unheard."""

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary, WeakSet

from dcp_storage.config import Transfer
from dcp_storage.dcp.undocumented import call_before_executors_end, in_async_process, in_async_thread
from dcp_storage.format.names import new_token
from dcp_storage.transfer.encoder_process import NICE

logger = logging.getLogger(__name__)

_FILES_AHEAD = 2
"""Files in flight beyond those that threads encode: one is written, one waits."""


_over: WeakSet[threading.Thread] = WeakSet()
"""Threads whose save is over, though they live on in a callback of its future."""

_LOOK_AGAIN_S = 0.02


@dataclass
class Turn:
    """One save: `token` names its objects; `done` once this rank has nothing more to do for it."""

    url: str
    token: str = field(default_factory=new_token)
    done: bool = False
    thread: threading.Thread = field(default_factory=threading.current_thread)

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Log what fails the save where nobody may ever ask its future."""
        try:
            yield
        except Exception as error:
            if in_async_thread(self.thread):
                logger.error("the save to %s, in the background, failed: %s", self.url, error)  # noqa: TRY400
                _ending.note_failure()
            raise


class Turns:
    """The saves of one writer that may still run in the background."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: list[Turn] = []

    def take(self, url: str) -> Turn:
        """Begin a save once those before it have ended; warn of those of this writer that failed.

        Overlapping saves would mix their collectives, which meet in the order in which each rank happens to begin them;
        they might share a planner; and the older might commit last.
        """
        earlier, turn = _earlier(), Turn(url)
        _over.discard(turn.thread)
        if in_async_thread(turn.thread):
            _ending.urls[turn.thread] = url
            with self._lock:
                self._turns.append(turn)
        for thread in earlier:
            while thread.is_alive() and thread not in _over:
                thread.join(_LOOK_AGAIN_S)
        with self._lock:
            ended = [old for old in self._turns if not old.thread.is_alive()]
            self._turns = [old for old in self._turns if old not in ended]  # one that ends just now is told next time
        for old in ended:
            if not old.done:
                logger.warning("the save to %s before this one, in the background, failed", old.url)
        return turn


def end_save_of_this_thread() -> None:
    """Note that this thread's save is over, if it ran one: its future's callback is about to begin another."""
    here = threading.current_thread()
    if in_async_thread(here):
        _over.add(here)


def _earlier() -> list[threading.Thread]:
    """Return the threads to wait for. Python lists threads in the order of their start: that of the calls."""
    running = [thread for thread in threading.enumerate() if in_async_thread(thread)]
    here = threading.current_thread()
    return running[: running.index(here)] if here in running else running


def gentle(transfer: Transfer, *, remote: bool) -> Transfer:
    """Return how bytes move beside training, if nothing else was asked for: a core is left to it, and files are few.

    Every file that is being written has a thread that wants the GIL at times; only a network's latency is worth that.
    """
    if transfer.threads is not None or not (training_runs_here() or in_async_process()):
        return transfer
    threads = max(1, transfer.resolve_threads() - 1)
    concurrency = transfer.concurrency if remote else min(transfer.concurrency, threads + _FILES_AHEAD)
    return replace(transfer, threads=threads, concurrency=concurrency)


def step_back() -> None:
    """Let training go first where cores are short, from DCP's own process; its threads inherit that.

    A thread beside training must not: while it waited for a core it might hold Python's lock, and training wait too.
    """
    if in_async_process():
        os.setpriority(os.PRIO_PROCESS, 0, max(NICE, os.getpriority(os.PRIO_PROCESS, 0)))


def training_runs_here() -> bool:
    """Tell whether this is a thread of `dcp.async_save`: training goes on in the same process."""
    return in_async_thread(threading.current_thread())


class _Ending:
    """The end of the program, which waits for the saves that still run in threads.

    Nobody can ask their futures any more, so one that fails then makes the exit code 1.
    """

    def __init__(self) -> None:
        self.urls: WeakKeyDictionary[threading.Thread, str] = WeakKeyDictionary()
        self._began = self._failed = False

    def note_failure(self) -> None:
        """Note that a save in the background failed."""
        self._failed = self._failed or self._began

    def wait(self) -> None:
        """Let every save end that runs in a thread; Ctrl-C gives them up."""
        self._began = True
        waiting = [thread for thread in threading.enumerate() if in_async_thread(thread)]
        try:
            while waiting:
                waiting[0].join()
                del waiting[0]
        except KeyboardInterrupt:
            for thread in waiting:
                where = self.urls.get(thread, "a place that it had not begun to write to")
                logger.error("the save to %s, in the background, is lost: the program was interrupted", where)  # noqa: TRY400
            _exit(_INTERRUPTED)

    def exit(self) -> None:
        """End the program with an exit code that tells of a save that failed while it was ending."""
        if self._failed:
            _exit(1)


def _exit(code: int) -> None:
    """End the process at once. What was committed stands, and what was not is not there."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # a program may have none, or closed it
            stream.flush()
    os._exit(code)


_INTERRUPTED = 128 + signal.SIGINT

_ending = _Ending()
call_before_executors_end(_ending.wait)
atexit.register(_ending.exit)
