"""Retries of requests over a network."""

import asyncio
import random
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from aiohttp import ClientConnectionError, ClientPayloadError, ClientSSLError

R = TypeVar("R")

MOST_TIMEOUTS = 2
"""Maximum number of timeouts per operation: an endpoint that refuses or drops connections fails in half a minute."""
_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 4

_BROKEN = (ConnectionError, TimeoutError, ClientConnectionError, ClientPayloadError)


def is_broken(error: Exception) -> bool:
    """Return whether a connection was refused, reset or interrupted, or timed out."""
    return isinstance(error, _BROKEN) and not isinstance(error, ClientSSLError | ssl.SSLError)


def is_silent(error: Exception) -> bool:
    """Return whether a server did not respond at all."""
    return isinstance(error, TimeoutError)


@dataclass(frozen=True)
class Retries:
    """How often, and for how long, an operation is tried.

    Attributes:
        attempts: The maximum number of requests per operation.
        limit_s: Seconds that an operation may take with all its requests, or `None` for no limit.
        slow_s: Seconds after which a failure is final, or `None`: the client has already retried it.
        is_transient: Returns whether the same request may succeed later.
        is_timeout: Returns whether the server did not respond at all.
    """

    attempts: int
    limit_s: float | None = None
    slow_s: float | None = None
    is_transient: Callable[[Exception], bool] = is_broken
    is_timeout: Callable[[Exception], bool] = is_silent

    async def run(self, request: Callable[[], Awaitable[R]]) -> R:
        """Send a request, retry it if it fails for a transient reason, and return its result.

        Raises:
            Exception: The error of the last request.
            TimeoutError: The operation took too long: the timeout of a single request does not end it while the server
                does not accept its body.
        """
        try:
            async with asyncio.timeout(self.limit_s) as limit:
                return await self._repeat(request)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TimeoutError(f"did not finish within {self.limit_s:g} s") from error

    async def _repeat(self, request: Callable[[], Awaitable[R]]) -> R:
        attempt = timeouts = 0
        while True:
            began = time.monotonic()
            try:
                return await request()
            except Exception as error:
                attempt += 1
                timeouts += self.is_timeout(error)
                slow = self.slow_s is not None and time.monotonic() - began > self.slow_s
                if attempt >= self.attempts or timeouts == MOST_TIMEOUTS or slow or not self.is_transient(error):
                    raise
            await asyncio.sleep(pause(attempt))


def pause(attempt: int) -> float:
    """Return the seconds to wait after an attempt: exponential, with jitter."""
    longest: float = min(_PAUSE_SECONDS * 2 ** (attempt - 1), _LONGEST_PAUSE_SECONDS)
    return random.uniform(0.5, 1) * longest  # noqa: S311 - no secret
