"""The end of the program, which waits for the saves that still run in threads."""

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
    """Nobody can ask the futures of those saves any more, so one that fails then makes the exit code 1."""

    def __init__(self) -> None:
        self._began = self._failed = False

    def note_failure(self) -> None:
        """Note that a save in the background failed."""
        self._failed = self._failed or self._began

    def wait(self) -> None:
        """Let every save end that runs in a thread; Ctrl-C gives them up."""
        self._began = True
        waiting = running()
        try:
            while waiting:
                waiting[0].join()
                del waiting[0]
        except KeyboardInterrupt:
            for thread in waiting:
                where = place_of(thread) or "a place that it had not begun to write to"
                logger.error("the save to %s, in the background, is lost: the program was interrupted", where)  # noqa: TRY400
            _exit(_INTERRUPTED)
        for save in take_failed():
            if not save.told:  # else it failed before, or was noted
                logger.error("the save to %s, in the background, failed", save.url)
                self.note_failure()

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


ending = _Ending()
call_before_executors_end(ending.wait)
atexit.register(ending.exit)
