"""How a save shares the machine with training."""

import threading
from dataclasses import replace
from enum import Enum

from dcp_storage.config import Transfer
from dcp_storage.dcp.undocumented import in_async_process, in_async_thread
from dcp_storage.transfer.encoder_process import give_way

_FILES_AHEAD = 2
"""Files in flight beyond those that threads encode: one is written, one waits."""


class Pace(Enum):
    """Where a save runs, seen from training."""

    WAITED_FOR = "training waits for it"
    IN_THREAD = "in a thread of dcp.async_save"
    IN_PROCESS = "in the process of dcp.async_save"

    @classmethod
    def here(cls) -> "Pace":
        """Return that of a save by the calling thread."""
        if in_async_thread(threading.current_thread()):
            return cls.IN_THREAD
        return cls.IN_PROCESS if in_async_process() else cls.WAITED_FOR

    @property
    def encodes_in_processes(self) -> bool:
        """Whether Python's lock is training's, so that the save encodes in processes of its own."""
        return self is Pace.IN_THREAD

    def step_back(self) -> None:
        """Let training go first where cores are short, from DCP's own process; its threads inherit that.

        A thread must not: while it waited for a core it might hold Python's lock, and training wait too.
        """
        if self is Pace.IN_PROCESS:
            give_way()

    def transfer(self, transfer: Transfer, *, remote: bool) -> Transfer:
        """Return how bytes move, if nothing else was asked for: a core is left to training, and files are few.

        Every file that is being written has a thread that wants the GIL at times; only a network's latency is worth
        that.
        """
        if self is Pace.WAITED_FOR or transfer.threads is not None:
            return transfer
        threads = max(1, transfer.resolve_threads() - 1)
        concurrency = transfer.concurrency if remote else min(transfer.concurrency, threads + _FILES_AHEAD)
        return replace(transfer, threads=threads, concurrency=concurrency)
