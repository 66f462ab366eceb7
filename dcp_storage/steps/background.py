"""Background work during training: one save at a time, and the chores after its commit."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

logger = logging.getLogger(__name__)


class SaveFuture(Future[int | None]):
    """A save in the background: its step, or `None` if it was skipped, or failed and was only logged.

    Attributes:
        step: The step that is saved.
        told: Whether its failure was reported.
    """

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step
        self.told = False
        self.set_running_or_notify_cancel()  # the copied state will be saved: it cannot be cancelled

    def result(self, timeout: float | None = None) -> int | None:
        """Return the step once it is committed, or raise its failure."""
        if self.exception(timeout):
            self.told = True
        return super().result(timeout)

    def take_failure(self) -> BaseException | None:
        """Wait for the save, and return its failure, once."""
        wait([self])
        failure = None if self.told else self.exception()
        self.told = True
        return failure


class Chores:
    """Does the chores after commits, one step after another, in a thread that ends when nothing is left to do.

    At most one step waits: a newer one replaces it.
    """

    def __init__(self, do: Callable[[int], None], skip: Callable[[int], None]) -> None:
        self._do, self._skip = do, skip
        self._lock = threading.Lock()
        self._next: int | None = None
        self._thread: threading.Thread | None = None

    def add(self, step: int) -> None:
        """Schedule the chores after the commit of a step."""
        with self._lock:
            skipped, self._next = self._next, step
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="dcp_storage_chores")
                self._start()
        if skipped is not None:
            self._skip(skipped)

    def _start(self) -> None:
        assert self._thread is not None
        try:
            self._thread.start()
        except RuntimeError:  # the program is ending: the next run's first prune does the same
            self._thread = self._next = None

    def wait(self) -> None:
        """Wait until nothing is left to do."""
        if (thread := self._thread) and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while (step := self._take()) is not None:
            try:
                self._do(step)
            except Exception:
                logger.exception("the chores after the save of step %d failed", step)

    def _take(self) -> int | None:
        with self._lock:
            step, self._next = self._next, None
            if step is None:
                self._thread = None
            return step
