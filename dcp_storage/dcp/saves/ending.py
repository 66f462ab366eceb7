"""The end of the program, which waits for saves that still run in threads."""

import atexit
import logging
import os
import signal
import sys
from contextlib import suppress

from dcp_storage.dcp.saves.order import place_of, running, take_failed
from dcp_storage.dcp.undocumented import call_before_executors_end

logger = logging.getLogger(__name__)

_INTERRUPTED = 128 + signal.SIGINT


class _Ending:
    """Nobody can check the futures of those saves any more, so if one fails, the exit code becomes 1."""

    def __init__(self) -> None:
        self._began = self._failed = False

    def note_failure(self) -> None:
        """Record that a save in the background failed."""
        self._failed = self._failed or self._began

    def wait(self) -> None:
        """Wait for all saves in threads; Ctrl-C abandons them."""
        self._began = True
        waiting = running()
        try:
            while waiting:
                waiting[0].join()
                del waiting[0]
        except KeyboardInterrupt:
            for thread in waiting:
                where = place_of(thread) or "a path that it had not begun to write to"
                logger.error("the save to %s, in the background, is lost: the program was interrupted", where)  # noqa: TRY400
            _exit(_INTERRUPTED)
        for save in take_failed():
            if not save.told:  # otherwise it failed before, or was recorded
                logger.error("the save to %s, in the background, failed", save.url)
                self.note_failure()

    def exit(self) -> None:
        """End the program with an error code if a save failed while it was ending."""
        if self._failed:
            _exit(1)


def _exit(code: int) -> None:
    """End the process immediately. Committed saves remain, and others leave no checkpoint."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # they may be missing or closed
            stream.flush()
    os._exit(code)


ending = _Ending()
call_before_executors_end(ending.wait)
atexit.register(ending.exit)
