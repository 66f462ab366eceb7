"""How a save shares the host with training."""

import threading
from dataclasses import replace
from enum import Enum

from dcp_storage.config import Transfer
from dcp_storage.dcp.undocumented import in_async_process, in_async_thread
from dcp_storage.transfer.encoder_process import give_way

_FILES_AHEAD = 2
"""Files in flight in addition to those that threads encode: one is being written, one waits."""


class Pace(Enum):
    """Where a save runs, relative to training."""

    WAITED_FOR = "training waits for it"
    IN_THREAD = "in a thread of dcp.async_save"
    IN_PROCESS = "in the process of dcp.async_save"

    @classmethod
    def here(cls) -> "Pace":
        """Return the pace of a save by the calling thread."""
        if in_async_thread(threading.current_thread()):
            return cls.IN_THREAD
        return cls.IN_PROCESS if in_async_process() else cls.WAITED_FOR

    @property
    def encodes_in_processes(self) -> bool:
        """Whether the save encodes in separate processes, to leave the GIL to training."""
        return self is Pace.IN_THREAD

    def step_back(self) -> None:
        """Give training priority for scarce cores, in DCP's own process; its threads inherit that.

        A thread must not do this: it might hold the GIL while waiting for a core, and training would wait too.
        """
        if self is Pace.IN_PROCESS:
            give_way()

    def transfer(self, transfer: Transfer, *, remote: bool) -> Transfer:
        """Return how bytes move, unless the user chose: leave a core to training, and keep few files in flight.

        Every file that is being written has a thread that sometimes needs the GIL; only network latency is worth that.
        """
        if self is Pace.WAITED_FOR or transfer.threads is not None:
            return transfer
        threads = max(1, transfer.resolve_threads() - 1)
        concurrency = transfer.concurrency if remote else min(transfer.concurrency, threads + _FILES_AHEAD)
        return replace(transfer, threads=threads, concurrency=concurrency)
