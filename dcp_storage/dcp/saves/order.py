"""Saves run in the order of the calls, and failures in the background are reported."""

import logging
import os
import threading
from collections import Counter
from weakref import WeakSet

from dcp_storage.dcp.saves.pace import Pace
from dcp_storage.dcp.saves.save import Save
from dcp_storage.dcp.undocumented import in_async_thread

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.02


class _Saves:
    """The saves of this process, of all writers, since these may share a path, a planner or a group."""

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()
        self.forget()

    def forget(self) -> None:
        """Start again, empty."""
        self.lock = threading.Lock()
        self.in_threads: list[Save] = []
        self.left: WeakSet[threading.Thread] = WeakSet()
        """Threads whose save has ended, but which still run a callback of its future."""


_saves = _Saves()
# A child process has none of these threads, and the lock may be held.
os.register_at_fork(after_in_child=_saves.forget)


def begin(save: Save) -> None:
    """Wait for saves that began before this one, and report those that failed in the background.

    Overlapping saves would mix their collectives, which match in the order in which each rank happens to start them;
    they might share a planner; and the older one might commit last.
    """
    save.pace.step_back()
    earlier = _earlier(save.thread)
    with _saves.lock:
        _saves.left.discard(save.thread)
        _saves.begun[save.url] += 1
        save.number = _saves.begun[save.url]
        if save.pace is Pace.IN_THREAD:
            _saves.in_threads.append(save)
    for thread in earlier:
        while thread.is_alive() and thread not in _saves.left:
            thread.join(_LOOK_AGAIN_S)
    for old in take_failed():
        logger.warning("the save to %s before this one, in the background, failed", old.url)


def leave_save() -> None:
    """Record that this thread's save, if any, has ended: its future's callback is about to begin another."""
    here = threading.current_thread()
    if in_async_thread(here):
        with _saves.lock:
            _saves.left.add(here)


def running() -> list[threading.Thread]:
    """Return the threads of `dcp.async_save`, in the order in which they were started: that of the calls."""
    return [thread for thread in threading.enumerate() if in_async_thread(thread)]


def take_failed() -> list[Save]:
    """Return, once, the saves in threads that ended before they were done."""
    with _saves.lock:
        ended = [save for save in _saves.in_threads if not save.thread.is_alive()]
        _saves.in_threads = [save for save in _saves.in_threads if save not in ended]
    return [save for save in ended if not save.done]


def place_of(thread: threading.Thread) -> str | None:
    """Return where the save of a thread goes, or `None` if it has not begun."""
    with _saves.lock:
        return next((save.url for save in reversed(_saves.in_threads) if save.thread is thread), None)


def _earlier(here: threading.Thread) -> list[threading.Thread]:
    threads = running()
    return threads[: threads.index(here)] if here in threads else threads
