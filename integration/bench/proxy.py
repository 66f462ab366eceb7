"""A far S3 on one machine: a TCP proxy in a process of its own that adds latency and caps each connection's speed.

HTTP/1.1 without pipelining needs no parser: bytes of the server that follow bytes of the client begin an answer.
"""

import asyncio
import contextlib
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

from dcp_storage.config import KIB

FIRST_BYTE_SECONDS = 0.05
CONNECTION_BYTES_PER_SECOND = 80e6
_CHUNK_BYTES = 256 * KIB
_SLACK_SECONDS = 0.004
"""How far a connection may run ahead of its cap: shorter sleeps than this are not exact."""


@contextlib.contextmanager
def far_proxy(endpoint_url: str) -> Iterator[str]:
    """Run a proxy in front of an HTTP server and give its URL."""
    url = urlsplit(endpoint_url)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(url.hostname, url.port, there), daemon=True)
    process.start()
    try:
        if not here.poll(60):
            raise RuntimeError("the proxy did not start")
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.terminate()
        process.join()


class Pace:
    """Spreads one direction of a connection over time."""

    def __init__(self, bytes_per_second: float) -> None:
        self._seconds_per_byte = 1 / bytes_per_second
        self._next = 0.0

    def delay(self, now: float, size: int) -> float:
        """Return how long to wait after so many more bytes."""
        self._next = max(self._next, now) + size * self._seconds_per_byte
        ahead = self._next - now
        return ahead if ahead > _SLACK_SECONDS else 0.0


@dataclass
class _Turn:
    """Whether the client spoke last."""

    asked: bool = False


def _serve(host: str, port: int, started: Connection) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_listen(host, port, started))


async def _listen(host: str, port: int, started: Connection) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await _relay(reader, writer, *await asyncio.open_connection(host, port, limit=_CHUNK_BYTES))
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=_CHUNK_BYTES)
    started.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def _relay(
    client: asyncio.StreamReader,
    to_client: asyncio.StreamWriter,
    server: asyncio.StreamReader,
    to_server: asyncio.StreamWriter,
) -> None:
    turn = _Turn()
    ways = [
        asyncio.create_task(_pump(client, to_server, turn, answers=False)),
        asyncio.create_task(_pump(server, to_client, turn, answers=True)),
    ]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        to_server.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, turn: _Turn, *, answers: bool) -> None:
    pace = Pace(CONNECTION_BYTES_PER_SECOND)
    clock = asyncio.get_running_loop().time
    while data := await reader.read(_CHUNK_BYTES):
        if answers and turn.asked:
            await asyncio.sleep(FIRST_BYTE_SECONDS)
        turn.asked = not answers
        writer.write(data)
        await writer.drain()
        if wait := pace.delay(clock(), len(data)):
            await asyncio.sleep(wait)
