"""Processes to be killed: one that has imported everything forks a saver whenever it is asked for one.

Each line of standard input is a job in JSON; `pid` and, at its end, `status` are answered.
"""

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from dcp_storage import AsyncStorageWriter, Codec, ShardedSavePlanner, Transfer
from dcp_storage.errors import DcpStorageError
from dcp_storage.store import s3  # noqa: F401 - so that no fork has to import it
from integration.faults.oracle import small_pieces, states
from integration.faults.ranks import ranks_are_threads

FAILED, UNTYPED = 3, 4
"""How a saver exits whose save raised this package's errors, or others."""
_PR_SET_PDEATHSIG = 1


class Zygote:
    """The process that forks; it and its forks end with the `with` block, or with this process."""

    def __enter__(self) -> Self:
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "integration.faults.child"],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def spawn(self, **job: Any) -> int:
        """Start a saver and return its process's number."""
        assert self._process.stdin is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return int(self._answer()["pid"])

    def wait(self) -> int:
        """Wait for the saver's end and return its exit status; a signal's number is negative."""
        return int(self._answer()["status"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    end_with_parent()
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            end_with_parent()
            os._exit(_run(json.loads(line)))
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _run(job: dict[str, Any]) -> int:
    with small_pieces():
        if "log" in job:
            _save_for_ever(job)
        with ranks_are_threads():  # in one thread, so that the K-th call is always the same one
            Path(job["gate"]).read_bytes()
            return _save(job["url"], job["value"], job.get("options"))


def _save_for_ever(job: dict[str, Any]) -> None:
    """Replace one checkpoint again and again, write each third one elsewhere, and say so before and after."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    value = job["value"]
    while True:
        name = f"step-{value}" if value % 3 == 0 else "current"
        os.write(log, f"begun {name} {value}\n".encode())
        status = _save(f"{job['url']}/{name}", value, job.get("options"), asynchronous=value % 2 == 0)
        os.write(log, f"{ {0: 'done', FAILED: 'failed'}.get(status, 'broken') } {name} {value}\n".encode())
        value += 1


def _save(url: str, value: int, options: dict[str, Any] | None, *, asynchronous: bool = False) -> int:
    codec, transfer = Codec(block_bytes=4096), Transfer(concurrency=2, threads=2)
    writer = AsyncStorageWriter(url, storage_options=options, codec=codec, transfer=transfer)
    [state] = states(value, 1)
    try:
        if asynchronous:
            dcp.async_save(state, storage_writer=writer, planner=ShardedSavePlanner(), no_dist=True).result()
        else:
            dcp.save(state, storage_writer=writer, planner=ShardedSavePlanner(), no_dist=True)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        return FAILED if all(isinstance(cause, DcpStorageError) for cause in causes) else UNTYPED
    except BaseException:  # noqa: BLE001 - it is reported
        return UNTYPED
    return 0


if __name__ == "__main__":
    main()
