"""An encoder in a process of its own: both ends of it, and the memory between them.

The memory holds a unit's raw bytes and, behind them, what they were encoded to. The process runs nothing of the program
that started it, and ends when that closes the connection or dies.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from mmap import mmap
from multiprocessing.connection import Connection, Pipe

from dcp_storage.config import Codec
from dcp_storage.format.codecs.blocks import Encoded, ItemEncoder
from dcp_storage.raw import Raw, copy_bytes

_PATIENCE_S = 60
_LEAST_BYTES_A_SECOND = 100_000
"""Slower than zstd's highest level on a core that has other work to do."""

NICE = 10
"""How far it steps back: where all cores are busy it has about a tenth of what training has."""


class EncoderProcess:
    """What `ItemEncoder` does, elsewhere, for one thread. Close it to end the process.

    Raises:
        OSError: No process, or no memory to share with it, can be had.
    """

    def __init__(self, codec: Codec) -> None:
        _check_possible()
        with ExitStack() as undo:
            self._memory = _SharedMemory(os.memfd_create("dcp_storage"))
            undo.callback(self._memory.close)
            self._connection, theirs = Pipe()
            undo.enter_context(self._connection)
            with theirs:
                self._connection.send(codec)
                self._process = _start(theirs.fileno(), self._memory.descriptor)
            undo.pop_all()

    def encode_items(self, items: Sequence[tuple[Raw, int]], out: memoryview) -> list[Encoded]:
        """Encode as `ItemEncoder.encode_items` does; after an error this encoder is of no more use.

        Raises:
            EOFError, OSError: The process died, or does not answer.
        """
        sizes = [(len(raw), planes) for raw, planes in items]
        memory = self._memory.view(sum(size for size, _ in sizes) + len(out))
        filled = 0
        for raw, _ in items:
            copy_bytes(raw, memory[filled : filled + len(raw)])
            filled += len(raw)
        self._connection.send((sizes, len(out)))
        patience_s = _PATIENCE_S + filled / _LEAST_BYTES_A_SECOND
        if not self._connection.poll(patience_s):
            raise TimeoutError(f"it did not answer for {patience_s:.0f} s")
        encoded: list[Encoded] = self._connection.recv()
        size = sum(sum(item.lengths) for item in encoded)
        copy_bytes(memory[filled : filled + size], out[:size])
        return encoded

    def close(self) -> None:
        """End the process at once: it holds nothing that could be lost."""
        self._connection.close()
        self._process.kill()
        self._process.wait()
        self._memory.close()


class _SharedMemory:
    """Memory that both processes see."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._view = memoryview(b"")

    def view(self, size: int) -> memoryview:
        """Return at least so many bytes; the process asks for the sizes that it was told, and so sees the same."""
        if len(self._view) < size:
            os.ftruncate(self.descriptor, size)
            self._view = memoryview(mmap(self.descriptor, size))
        return self._view

    def close(self) -> None:
        self._view = memoryview(b"")  # it holds a descriptor of its own
        os.close(self.descriptor)


def _check_possible() -> None:
    """Raise an `OSError` where no process of this module can be had."""
    if not hasattr(os, "memfd_create"):
        raise OSError("this Python was built without os.memfd_create")
    if not sys.executable or getattr(sys, "frozen", False):
        raise OSError("the program has no Python interpreter of its own to start")


def _start(connection: int, memory: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(  # noqa: S603 (this module)
        [sys.executable, "-P", "-m", __name__, str(connection), str(memory)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(connection, memory),
        # It finds its modules where this process does, and numpy's BLAS need not start a thread for each core.
        env={**os.environ, "PYTHONPATH": _python_path(), "OPENBLAS_NUM_THREADS": "1"},
    )


def _python_path() -> str:
    # What a program may put there by mistake, such as a Path, Python itself passes over.
    return os.pathsep.join(os.fspath(entry) for entry in sys.path if isinstance(entry, str | os.PathLike))


def give_way() -> None:
    """Let other processes go first where cores are short; this one's threads inherit that."""
    os.setpriority(os.PRIO_PROCESS, 0, max(NICE, os.getpriority(os.PRIO_PROCESS, 0)))


def _serve(connection: Connection, shared: _SharedMemory) -> None:
    """Encode what arrives, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; ours ends this one
    give_way()
    encoder = ItemEncoder(connection.recv())
    while True:
        sizes, room = connection.recv()
        filled = sum(size for size, _ in sizes)
        memory = shared.view(filled + room)
        items, start = [], 0
        for size, planes in sizes:
            items.append((memory[start : start + size], planes))
            start += size
        connection.send(encoder.encode_items(items, memory[filled : filled + room]))


if __name__ == "__main__":
    with suppress(EOFError, ConnectionError):
        _serve(Connection(int(sys.argv[1])), _SharedMemory(int(sys.argv[2])))
