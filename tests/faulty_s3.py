"""An S3 server in this process, just large enough for a checkpoint, that misbehaves as it is told."""

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

Answer = tuple[int, dict[str, str], bytes]

READ_TIMEOUT_S = 0.2
STALL_S = 0.5


@dataclass
class FaultyS3:
    """The server's state.

    Attributes:
        objects: Its objects by bucket and key.
        requests: What it was asked, as method and last part of the key.
        headers: What came with each of these, names in lower case.
        fault: Asked at each request which of `FAULTS` befalls it, if any.
        instead: Asked at each request for another answer: status, headers and body.
        rights: The actions of IAM that whoever asks may take. Without `s3:ListBucket` nobody is told what is absent.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    fault: Callable[[str, str], str | None] = lambda method, name: None
    instead: Callable[[str, str, dict[str, str]], Answer | None] = lambda method, name, headers: None
    rights: frozenset[str] = frozenset({"s3:PutObject", "s3:GetObject", "s3:DeleteObject", "s3:ListBucket"})
    endpoint_url: str = ""

    def storage_options(self, **config: Any) -> dict[str, Any]:
        config = {"read_timeout": READ_TIMEOUT_S, "s3": {"addressing_style": "path"}, **config}
        return {"key": "k-1234", "secret": "s-1234", "endpoint_url": self.endpoint_url, "config_kwargs": config}

    def fail_first(self, fault: str, times: int, method: str, name: str = "") -> None:
        """Have the first `times` requests of this method, for keys that end so, fail."""
        left = [fault] * times

        def choose(asked: str, key: str) -> str | None:
            return left.pop() if left and asked == method and key.endswith(name) else None

        self.fault = choose

    def count(self, method: str, name: str = "") -> int:
        return sum(asked == method and key.endswith(name) for asked, key in self.requests)


@contextmanager
def faulty_s3() -> Iterator[FaultyS3]:
    state = FaultyS3()
    handler = type("Handler", (_Handler,), {"state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        state.endpoint_url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FaultyS3

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        key = unquote(url.path).lstrip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name = key.rpartition("/")[2]
        self.state.requests.append((self.command, name))
        headers = {header.lower(): value for header, value in self.headers.items()}
        self.state.headers.append(headers)
        if other := self.state.instead(self.command, name, headers):
            self.send_other(*other)
            return
        fault = self.state.fault(self.command, name)
        if fault in BEFORE:
            BEFORE[fault](self)
            return
        status, answer = self.answer(key, parse_qs(url.query), body)
        AFTER.get(fault or "", _Handler.send)(self, status, answer)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request  # noqa: N815

    def answer(self, key: str, query: dict[str, list[str]], body: bytes) -> tuple[int, bytes]:
        objects, rights = self.state.objects, self.state.rights
        action = "s3:ListBucket" if "list-type" in query else ACTIONS[self.command]
        if action not in rights:
            return 403, _error("AccessDenied")
        if self.command == "PUT":
            return self.put(key, body)
        if self.command == "DELETE":
            objects.pop(key, None)
            return 204, b""
        if "list-type" in query:
            return 200, _listing(objects, f"{key}/{query['prefix'][0]}")
        if key not in objects:
            return (404, _error("NoSuchKey")) if "s3:ListBucket" in rights else (403, _error("AccessDenied"))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        return (206, objects[key][int(wanted[1]) : int(wanted[2]) + 1]) if wanted else (200, objects[key])

    def put(self, key: str, body: bytes) -> tuple[int, bytes]:
        if self.refuses(key):
            return 412, _error("PreconditionFailed")
        self.state.objects[key] = body
        return 200, b""

    def refuses(self, key: str) -> bool:
        """Tell whether a condition of the request does not hold."""
        there = self.state.objects.get(key)
        over = self.headers.get("If-Match")
        return (there is not None and "If-None-Match" in self.headers) or (over is not None and over != _etag(there))

    def send_other(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for header, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send(self, status: int, body: bytes) -> None:
        self.send_head(status, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_head(self, status: int, length: int) -> None:
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Length", str(length))
        if self.command == "HEAD" and status == 200:
            self.send_header("ETag", _etag(self.state.objects[unquote(urlsplit(self.path).path).lstrip("/")]))
        self.end_headers()

    def send_half(self, status: int, body: bytes) -> None:
        """Announce a whole body, send half of it and close."""
        self.send_head(status, len(body))
        self.wfile.write(body[: len(body) // 2])
        self.close_connection = True

    def send_half_and_stall(self, status: int, body: bytes) -> None:
        self.send_half(status, body)
        self.wfile.flush()
        time.sleep(STALL_S)

    def send_flipped(self, status: int, body: bytes) -> None:
        middle = len(body) // 2
        self.send(status, body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :])

    def reset(self, *_: Any) -> None:
        """Drop the connection with a TCP reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def stall(self, *_: Any) -> None:
        """Say nothing for longer than any client waits."""
        time.sleep(STALL_S)
        self.close_connection = True

    def finish(self) -> None:
        with suppress(OSError):  # the connection was dropped on purpose
            super().finish()

    def log_message(self, *args: Any) -> None:
        pass


BEFORE: dict[str, Callable[[_Handler], None]] = {
    "slow_down": lambda handler: handler.send(503, _error("SlowDown")),
    "internal_error": lambda handler: handler.send(500, _error("InternalError")),
    "bad_gateway": lambda handler: handler.send(502, b"<html>bad gateway</html>"),
    "reset": _Handler.reset,
    "stall": _Handler.stall,
}
"""What befalls a request instead of its effect."""

AFTER: dict[str, Callable[[_Handler, int, bytes], None]] = {
    "lost_answer": _Handler.reset,
    "late_answer": _Handler.stall,
    "half_body": _Handler.send_half,
    "stalled_body": _Handler.send_half_and_stall,
    "flipped_bit": _Handler.send_flipped,
}
"""What befalls its answer."""


ACTIONS = {"PUT": "s3:PutObject", "GET": "s3:GetObject", "HEAD": "s3:GetObject", "DELETE": "s3:DeleteObject"}


def _etag(data: bytes | None) -> str:
    return "" if data is None else f'"{md5(data).hexdigest()}"'


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>made to fail</Message></Error>".encode()


_WRITTEN = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"


def _listing(objects: dict[str, bytes], prefix: str) -> bytes:
    bucket = prefix.partition("/")[0]
    found = {key.removeprefix(f"{bucket}/"): len(data) for key, data in objects.items() if key.startswith(prefix)}
    entries = "".join(
        f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size>{_WRITTEN}</Contents>" for key, size in found.items()
    )
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()
