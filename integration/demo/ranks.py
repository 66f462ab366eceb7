"""N processes that form one gloo process group, and that never outlive the demo."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dcp_storage.errors import DcpStorageError

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["integration.demo.storage", "integration.demo.train"])  # import torch only once


class RankError(DcpStorageError):
    """A rank raised, died by itself, or the ranks took too long."""


@dataclass(frozen=True)
class Event:
    """What a rank reports while it works."""

    rank: int
    name: str
    data: Any = None


@dataclass(frozen=True)
class Rank:
    """A task's view of its process."""

    rank: int
    world_size: int
    pipe: Connection

    def report(self, name: str, data: Any = None) -> None:
        """Send an event to the parent."""
        self.pipe.send(Event(self.rank, name, data))


class Ranks:
    """Run `task(rank, config)` in `count` processes; leaving the context ends all of them, whatever happened.

    `task` is a module-level function. An exception in a rank ends the others and is raised from `events`.
    """

    def __init__(self, count: int, task: Callable[[Rank, Any], None], config: Any, *, limit_s: float = 600) -> None:
        self._count, self._task, self._config = count, task, config
        self._limit_s = limit_s
        self._processes: list[Any] = []
        self._pipes: dict[Connection, int] = {}
        self._killed = False

    def __enter__(self) -> Self:
        self._meeting = tempfile.TemporaryDirectory(prefix="dcp-storage-ranks-")
        try:
            for rank in range(self._count):
                self._start(rank, str(Path(self._meeting.name) / "store"))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()
        self._meeting.cleanup()

    def events(self) -> Iterator[Event]:
        """Yield what the ranks report until all have ended."""
        deadline = time.monotonic() + self._limit_s
        while self._pipes:
            ready = wait(list(self._pipes), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankError(f"{self._count} ranks did not finish within {self._limit_s:.0f} s and were ended")
            for pipe in ready:
                yield from self._receive(pipe)  # type: ignore[arg-type]

    def kill(self) -> None:
        """End every rank at once with SIGKILL; what they reported before can still be read."""
        self._killed = True
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _start(self, rank: int, meeting: str) -> None:
        receiver, sender = _PROCESSES.Pipe(duplex=False)
        arguments = (self._task, self._config, Rank(rank, self._count, sender), meeting)
        process = _PROCESSES.Process(target=_run_rank, args=arguments, name=f"rank {rank}")
        process.start()
        sender.close()  # so that the pipe ends with the process
        self._processes.append(process)
        self._pipes[receiver] = rank

    def _receive(self, pipe: Connection) -> Iterator[Event]:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            self._check_end(self._pipes.pop(pipe))
        else:
            if isinstance(message, Exception):
                raise message
            yield message

    def _check_end(self, rank: int) -> None:
        process = self._processes[rank]
        process.join()
        if process.exitcode and not self._killed:
            raise RankError(f"rank {rank} of {self._count} ended by itself with exit code {process.exitcode}")


def _run_rank(task: Callable[[Rank, Any], None], config: Any, rank: Rank, meeting: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends the ranks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    _set_environment(rank)
    try:
        with _process_group(rank, meeting):
            task(rank, config)
    except BaseException as error:  # noqa: BLE001  # for the parent to raise; DCP's wrapper is no Exception
        rank.pipe.send(_portable(error, rank))
        os._exit(1)  # the other ranks may wait in a collective: leave without waiting for them


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _set_environment(rank: Rank) -> None:
    """Set what torchrun would, and keep gloo on the loopback device: all ranks are on this machine."""
    os.environ |= {
        "RANK": str(rank.rank),
        "LOCAL_RANK": str(rank.rank),
        "WORLD_SIZE": str(rank.world_size),
        "LOCAL_WORLD_SIZE": str(rank.world_size),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }


@contextlib.contextmanager
def _process_group(rank: Rank, meeting: str) -> Iterator[None]:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank.rank, world_size=rank.world_size)
    yield
    distributed.barrier()
    distributed.destroy_process_group()


def _portable(error: BaseException, rank: Rank) -> Exception:
    """Return the error as it is when it is one of ours, also out of DCP's wrapper; else its name and message."""
    failures = getattr(error, "failures", None) or {}
    cause = next((failure[0] for failure in failures.values()), error)
    if isinstance(cause, DcpStorageError):
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(cause))  # made one expression ago
            return cause
    return RankError(f"rank {rank.rank} of {rank.world_size}: {type(cause).__name__}: {cause}")
