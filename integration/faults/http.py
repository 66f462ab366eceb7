"""Requests to a real S3 server, broken on their way: a proxy that answers in its place, hangs up, or says nothing."""

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from integration.faults.faults import Injector, pick
from integration.faults.oracle import Damaged, find, ours, states
from integration.faults.places import Bucket
from integration.faults.points import laboratory
from integration.faults.ranks import save_on_ranks
from integration.faults.tally import Tally
from integration.servers import S3Server

_METHODS = (b"PUT /", b"GET /", b"HEAD /", b"DELETE /", b"POST /")
_QUICK = {"connect_timeout": 2, "read_timeout": 1, "retries": {"mode": "standard", "total_max_attempts": 3}}
_OLD, _NEW = 1, 2
HARMS = ("500", "503", "500, done", "reset", "reset, done", "silence")
_WRITER = "dcp_storage"


@dataclass
class Plan:
    """What the proxy does to which request, counted from 0.

    Attributes:
        harm: One of `HARMS`.
        at: The request.
        lasting: Whether to every later one too.
        seen: How many requests there were.
    """

    harm: str = ""
    at: int = -1
    lasting: bool = False
    seen: int = 0

    def next(self) -> str:
        """Return what is to be done to the next request: nothing where empty."""
        number, self.seen = self.seen, self.seen + 1
        return self.harm if number == self.at or (self.lasting and number > self.at >= 0) else ""


class Proxy:
    """Relays connections to a server, and breaks requests by its plan, which may be replaced between saves."""

    def __init__(self, endpoint_url: str) -> None:
        url = urlsplit(endpoint_url)
        self._server = (url.hostname, url.port)
        self.plan = Plan()
        self.url = ""
        self.ready = threading.Event()

    async def serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self.ready.set()
        await self._end.wait()
        server.close()

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)

    async def _accept(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            server, to_server = await asyncio.open_connection(*self._server)
            exchange = _Exchange()
            ways = [
                asyncio.create_task(self._requests(client, to_server, to_client, exchange)),
                asyncio.create_task(_answers(server, to_client, exchange)),
            ]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            to_server.close()
        to_client.close()

    async def _requests(
        self,
        client: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
        to_client: asyncio.StreamWriter,
        exchange: "_Exchange",
    ) -> None:
        while data := await client.read(1 << 16):
            if data.startswith(_METHODS):
                exchange.harm = self.plan.next()
                if exchange.harm == "reset":
                    to_client.transport.abort()
                    return
                if exchange.harm in {"500", "503"}:
                    to_client.write(_answer(exchange.harm))
            if exchange.harm in {"500", "503", "silence"}:
                continue  # what belongs to this request is swallowed
            to_server.write(data)
            await to_server.drain()


@dataclass
class _Exchange:
    """What is being done to a connection's current request."""

    harm: str = ""


async def _answers(server: asyncio.StreamReader, to_client: asyncio.StreamWriter, exchange: _Exchange) -> None:
    while data := await server.read(1 << 16):
        final = not data.startswith(b"HTTP/1.1 100")
        if final and exchange.harm == "reset, done":
            to_client.transport.abort()
            return
        if final and exchange.harm == "500, done":
            data = _answer("500")
        to_client.write(data)
        await to_client.drain()


def _answer(status: str) -> bytes:
    code, reason = {"500": ("InternalError", "Internal Server Error"), "503": ("SlowDown", "Slow Down")}[status]
    body = f"<Error><Code>{code}</Code><Message>made so</Message></Error>".encode()
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


@contextlib.contextmanager
def proxy(endpoint_url: str) -> Iterator[Proxy]:
    """Run a proxy in a thread."""
    made = Proxy(endpoint_url)
    thread = threading.Thread(target=asyncio.run, args=(made.serve(),), daemon=True)
    thread.start()
    made.ready.wait(10)
    try:
        yield made
    finally:
        made.end()
        thread.join(10)


def try_requests(tally: Tally, *, server: S3Server, every: int = 1, first: int = 0) -> None:
    """Break each request of an overwrite, once and from then on."""
    with proxy(server.endpoint_url) as between, tempfile.TemporaryDirectory() as scratch:
        with laboratory(Bucket(Path(scratch))):
            trial = _Trial(server, between)
            requests = trial.overwrite(Plan())[2]
            points = [(harm, at, lasting) for at in range(requests) for harm in HARMS for lasting in (False, True)]
            for harm, at, lasting in pick(points, every, first):
                found, wrong, _ = trial.overwrite(Plan(harm, at, lasting))
                kind = f"{harm}, from then on" if lasting else f"{harm}, once"
                tally.add(("S3 request", _WRITER, kind), found, wrong, f"request {at}")


class _Trial:
    def __init__(self, server: S3Server, between: Proxy) -> None:
        self._server = server
        self._between = between
        options = {**server.storage_options, "endpoint_url": between.url, "config_kwargs": _QUICK}
        self._broken = ours(_WRITER, options)
        self._whole = ours(_WRITER, server.storage_options)

    def overwrite(self, plan: Plan) -> tuple[str, list[str], int]:
        """Overwrite a fresh checkpoint; return what is found, what is wrong, and the number of requests."""
        url = self._server.new_prefix()
        self._between.plan = Plan()
        assert self._save(url, _OLD) is None
        self._between.plan = plan
        error = self._save(url, _NEW)
        wrong = []
        if error is not None and not plan.lasting:
            wrong.append(f"one broken request failed the save: {error}")
        try:
            found = find(self._whole, url, 1)
        except Damaged as damage:
            return "damaged", [*wrong, str(damage)], plan.seen
        if found not in ({_NEW} if error is None else {_OLD, _NEW}):
            wrong.append(f"found save {found} after {error!r}")
        return {_OLD: "old", _NEW: "new"}.get(found, "none"), wrong, plan.seen

    def _save(self, url: str, value: int) -> BaseException | None:
        who = self._broken
        [outcome] = save_on_ranks(
            states(value, 1), lambda: who.writer(url), who.save_planner, Injector(), asynchronous=False, limit_s=60
        )
        return outcome
