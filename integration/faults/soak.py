"""SIGKILL at random moments, again and again, on one place: nothing that was reported done is ever lost or mixed."""

import os
import random
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from dcp_storage.prune import prune
from dcp_storage.verify import verify
from integration.faults.child import Zygote, end_with_parent
from integration.faults.oracle import Contestant, Damaged, find, ours
from integration.faults.tally import Tally
from integration.servers import S3Server

_START_S = 30
_CURRENT = "current"

_LATE_S = 3
"""What a client had sent when it was killed, a server may still put: an orphan that comes after those were listed."""


@dataclass
class _Place:
    """One checkpoint's path and what its saver said of it: the last save done, and those begun after it."""

    done: int | None = None
    begun: set[int] = field(default_factory=set)

    def allowed(self) -> set[int | None]:
        return {self.done, *self.begun}

    def settle(self, found: int | None) -> None:
        """Hold a save to what a reader saw of it."""
        if found in self.begun:
            self.done, self.begun = found, {value for value in self.begun if value > found}


class Soak:
    """Rounds of a saver that is killed; what it said stays in a log.

    Args:
        url: A directory, or a prefix.
        options: Of the store.
        server: Is killed and restarted in each third round, under the saver, where it is given.
    """

    def __init__(
        self, scratch: Path, zygote: Zygote, url: str, options: dict[str, Any] | None, server: S3Server | None = None
    ) -> None:
        self._log = scratch / "log"
        self._zygote = zygote
        self._url, self._options, self._server = url, options, server
        self._contestant: Contestant = ours("dcp_storage", options)
        self._places: dict[str, _Place] = {}
        self._value = 1

    def round(self, chance: random.Random, number: int) -> tuple[str, list[str]]:
        """Let the saver run for a moment, kill it, and look at every path that it wrote to."""
        self._log.unlink(missing_ok=True)
        pid = self._zygote.spawn(url=self._url, value=self._value, log=str(self._log), options=self._options)
        self._wait_for_start()
        # A save takes about a tenth of a second: most rounds end within the first three.
        time.sleep(chance.uniform(0, 0.4))
        if self._server is not None and number % 3 == 2:
            restart(self._server, pause_s=chance.uniform(0, 0.5))
            time.sleep(chance.uniform(0, 0.5))
        os.kill(pid, signal.SIGKILL)
        self._zygote.wait()
        touched, wrong = self._read_log()
        return self._look_at(touched, wrong)

    def end(self) -> tuple[int, list[str]]:
        """Look at every path once more, clear away what the dead left, and look again; return how much that was."""
        if self._server is not None:
            time.sleep(_LATE_S)
        orphans, wrong = 0, self._look_at(set(self._places), [])[1]
        for name, place in self._places.items():
            if place.done is None and find(self._contestant, f"{self._url}/{name}", 1) is None:
                continue
            url = f"{self._url}/{name}"
            found = verify(url, storage_options=self._options)
            pruned = prune(url, older_than=timedelta(0), storage_options=self._options)
            left = verify(url, storage_options=self._options)
            orphans += len(found.orphans)
            if not left.sound or left.orphans or left.foreign or pruned.removed != found.orphans:
                wrong.append(f"{name}: {found} was pruned to {left}")
        return orphans, self._look_at(set(self._places), wrong)[1]

    def _wait_for_start(self) -> None:
        deadline = time.monotonic() + _START_S
        while not self._log.exists() or not self._log.stat().st_size:
            if time.monotonic() > deadline:
                raise TimeoutError("the saver did not begin")
            time.sleep(0.001)

    def _read_log(self) -> tuple[set[str], list[str]]:
        touched, wrong = set(), []
        for line in self._log.read_text().splitlines():
            event, name, text = line.split()
            value, place = int(text), self._places.setdefault(name, _Place())
            touched.add(name)
            self._value = value + 1
            if event == "begun":
                place.begun.add(value)
            elif event == "done":
                place.done, place.begun = value, set()
            elif event == "broken":
                wrong.append(f"save {value} to {name} raised an error that is not of this package")
        return touched, wrong

    def _look_at(self, names: set[str], wrong: list[str]) -> tuple[str, list[str]]:
        outcome = "none"
        for name in sorted(names):
            place = self._places[name]
            try:
                found = find(self._contestant, f"{self._url}/{name}", 1)
            except Damaged as damage:
                return "damaged", [*wrong, f"{name}: {damage}"]
            if found not in place.allowed():
                wrong.append(f"{name}: found save {found}, not one of {place.allowed()}")
            if name == _CURRENT or len(names) == 1:
                outcome = "none" if found is None else "old" if found == place.done else "new"
            place.settle(found)
        return outcome, wrong


def try_kills(tally: Tally, kills: int, *, server: S3Server | None = None, seed: int = 0) -> str:
    """Kill a saver so many times, on local disk or on a server; return a note on what was left to clear away."""
    part, chance = ("SIGKILL, local disk" if server is None else "SIGKILL, SeaweedFS"), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="dcp-storage-") as directory, Zygote() as zygote:
        url = f"{directory}/run" if server is None else server.new_prefix()
        options = None if server is None else server.storage_options
        soak = Soak(Path(directory), zygote, url, options, server)
        for number in range(kills):
            kind = "client, and server restarted" if server is not None and number % 3 == 2 else "client"
            tally.add((part, "dcp_storage", kind), *soak.round(chance, number), where=f"round {number}")
        orphans, wrong = soak.end()
        tally.add((part, "dcp_storage", "orphans removed at the end"), "new", wrong)
        return f"{part}: {orphans} orphans of {kills} deaths found and removed"


def restart(server: S3Server, *, pause_s: float) -> None:
    """Kill a server with SIGKILL, and start it again on its own directory."""
    old = server.process
    directory = Path(os.readlink(f"/proc/{old.pid}/cwd"))
    old.kill()
    old.wait()
    time.sleep(pause_s)
    with (directory / "log").open("ab") as log:
        server.process = subprocess.Popen(
            old.args,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - one system call, no lock
        )
    server.wait_until_ready(directory / "log")
