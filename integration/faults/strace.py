"""Real system calls of a real process, broken by the kernel's own means: `strace -e inject=`."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp

from integration.faults.child import FAILED, Zygote
from integration.faults.faults import pick
from integration.faults.oracle import OURS, Damaged, find, states
from integration.faults.places import Bucket
from integration.faults.points import laboratory
from integration.faults.tally import Tally

CHANGES = ("mkdir", "openat", "write", "writev", "pwrite64", "fsync", "fdatasync", "rename", "unlink")
LOOKS = ("close", "read", "pread64", "getdents64", "newfstatat")
_OLD, _NEW = 1, 2
_HARMS = {"SIGKILL": "signal=KILL", "EIO": "error=EIO", "ENOSPC": "error=ENOSPC"}
_ATTACH_S = 20


def is_possible() -> bool:
    """Return whether this machine has strace, and lets it trace."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, check=False).returncode == 0


class Tracer:
    """Overwrites a checkpoint in a child, under strace."""

    def __init__(self, scratch: Path, zygote: Zygote) -> None:
        self._zygote = zygote
        self._before, self._now = scratch / "before", scratch / "now"
        self._gate, self._log = scratch / "gate", scratch / "log"
        os.mkfifo(self._gate)
        [state] = states(_OLD, 1)
        with laboratory(Bucket(scratch)):
            dcp.save(state, storage_writer=OURS.writer(str(self._before)), planner=OURS.save_planner(), no_dist=True)

    def calls(self) -> Iterator[tuple[str, int]]:
        """Yield the calls of an overwrite that concern the checkpoint: a name, and which of that name it is."""
        status = self.overwrite("-y", "-e", f"trace={','.join((*CHANGES, *LOOKS))}")
        assert status == 0, f"a save under strace ended with {status}"
        counts: Counter[str] = Counter()
        for line in self._log.read_text().splitlines():
            if (call := re.match(r"\d+ +(\w+)\(", line)) is not None:
                counts[call[1]] += 1
                if str(self._now) in line:
                    yield call[1], counts[call[1]]

    def overwrite(self, *arguments: str) -> int:
        """Overwrite a fresh copy under strace with these arguments, and return the child's exit status."""
        shutil.rmtree(self._now, ignore_errors=True)
        shutil.copytree(self._before, self._now)
        pid = self._zygote.spawn(url=str(self._now), value=_NEW, gate=str(self._gate))
        strace = subprocess.Popen(["strace", "-f", "-qq", "-o", self._log, *arguments, "-p", str(pid)])
        _wait_until_traced(pid)
        self._gate.write_bytes(b"go")
        status = self._zygote.wait()
        strace.wait(_ATTACH_S)
        return status

    def judge(self, harm: str, status: int) -> tuple[str, list[str]]:
        """Return what a fresh reader finds, and what is wrong."""
        expected = {0, -signal.SIGKILL} if harm == "SIGKILL" else {0, FAILED}
        wrong = [] if status in expected else [f"it ended with {status}"]
        try:
            found = find(OURS, str(self._now), 1)
        except Damaged as error:
            return "damaged", [*wrong, str(error)]
        allowed = {_NEW} if status == 0 else {_OLD, _NEW}
        if found not in allowed:
            wrong.append(f"found save {found}, not one of {allowed}")
        return {_OLD: "old", _NEW: "new", None: "none"}.get(found, "damaged"), wrong


def _wait_until_traced(pid: int) -> None:
    status, deadline = Path(f"/proc/{pid}/status"), time.monotonic() + _ATTACH_S
    while "TracerPid:\t0" in status.read_text():
        if time.monotonic() > deadline:
            raise TimeoutError("strace did not attach")
        time.sleep(0.002)


@contextmanager
def tracer() -> Iterator[Tracer]:
    with tempfile.TemporaryDirectory(prefix="dcp-storage-") as scratch, Zygote() as zygote:
        yield Tracer(Path(scratch), zygote)


def try_system_calls(tally: Tally, *, every: int = 1, first: int = 0) -> None:
    """Break each system call of an overwrite, or each `every`-th."""
    with tracer() as trace:
        points = [
            (name, number, harm)
            for name, number in trace.calls()
            for harm in _HARMS
            if name in CHANGES or harm == "EIO"
        ]
        for name, number, harm in pick(points, every, first):
            status = trace.overwrite("-e", f"trace={name}", "-e", f"inject={name}:{_HARMS[harm]}:when={number}")
            found, wrong = trace.judge(harm, status)
            tally.add(("system call", OURS.name, harm), found, wrong, f"{name} {number}")
