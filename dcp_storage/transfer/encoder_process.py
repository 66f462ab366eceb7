"""An encoder in a separate process: both ends of it, and the memory that they share.

The memory holds a unit's raw bytes, followed by the encoded bytes. The process runs no code of the program that started
it, and ends when that program closes the connection or dies.
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
"""Slower than zstd's highest level on a busy core."""

NICE = 10
"""The niceness of the process: if all cores are busy, it gets about a tenth of the time that training gets."""


class EncoderProcess:
    """An `ItemEncoder` in another process, for one thread. Close it to end the process.

    Raises:
        OSError: The process cannot be started, or no memory can be shared with it.
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
        """Encode as `ItemEncoder.encode_items` does; after an error this encoder cannot be used any more.

        Raises:
            EOFError, OSError: The process died, or does not respond.
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
            raise TimeoutError(f"it did not respond for {patience_s:.0f} s")
        encoded: list[Encoded] = self._connection.recv()
        size = sum(sum(item.lengths) for item in encoded)
        copy_bytes(memory[filled : filled + size], out[:size])
        return encoded

    def close(self) -> None:
        """Kill the process: it holds nothing that could be lost."""
        self._connection.close()
        self._process.kill()
        self._process.wait()
        self._memory.close()


class _SharedMemory:
    """Memory that both processes share."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._view = memoryview(b"")

    def view(self, size: int) -> memoryview:
        """Return at least this many bytes; both processes request the same sizes, so both see the same memory."""
        if len(self._view) < size:
            os.ftruncate(self.descriptor, size)
            self._view = memoryview(mmap(self.descriptor, size))
        return self._view

    def close(self) -> None:
        self._view = memoryview(b"")  # it has its own descriptor
        os.close(self.descriptor)


def _check_possible() -> None:
    """Raise an `OSError` if a process of this module cannot be started."""
    if not hasattr(os, "memfd_create"):
        raise OSError("this Python was built without os.memfd_create")
    if not sys.executable or getattr(sys, "frozen", False):
        raise OSError("the program has no Python interpreter to start")


def _start(connection: int, memory: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(  # noqa: S603 (this module)
        [sys.executable, "-P", "-m", __name__, str(connection), str(memory)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(connection, memory),
        # It finds modules in the same places as this process, and numpy's BLAS need not start a thread per core.
        env={**os.environ, "PYTHONPATH": _python_path(), "OPENBLAS_NUM_THREADS": "1"},
    )


def _python_path() -> str:
    # A program may put other objects there by mistake, such as a Path, which Python itself ignores.
    return os.pathsep.join(os.fspath(entry) for entry in sys.path if isinstance(entry, str | os.PathLike))


def give_way() -> None:
    """Give other processes priority for scarce cores; this one's threads inherit that."""
    os.setpriority(os.PRIO_PROCESS, 0, max(NICE, os.getpriority(os.PRIO_PROCESS, 0)))


def _serve(connection: Connection, shared: _SharedMemory) -> None:
    """Encode the units that arrive, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent ends this
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
