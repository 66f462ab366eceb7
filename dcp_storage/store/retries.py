"""Requests over a network, tried again until they succeed or will not."""

import asyncio
import random
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from aiohttp import ClientConnectionError, ClientPayloadError, ClientSSLError

R = TypeVar("R")

MOST_TIMEOUTS = 2
"""The most timeouts of one operation: an endpoint that refuses or drops connections fails in half a minute."""
_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 4

_BROKEN = (ConnectionError, TimeoutError, ClientConnectionError, ClientPayloadError)


def is_broken(error: Exception) -> bool:
    """Tell whether a connection was refused, reset, broken off or silent."""
    return isinstance(error, _BROKEN) and not isinstance(error, ClientSSLError | ssl.SSLError)


def is_silent(error: Exception) -> bool:
    """Tell whether a server did not answer at all."""
    return isinstance(error, TimeoutError)


@dataclass(frozen=True)
class Retries:
    """How often, and for how long, an operation is tried.

    Attributes:
        attempts: Requests for one operation, at most.
        limit_s: Seconds that one operation may take with all its requests, or `None` for any.
        is_transient: Tells whether the same request may succeed later.
        is_timeout: Tells whether the server did not answer at all.
    """

    attempts: int
    limit_s: float | None = None
    is_transient: Callable[[Exception], bool] = is_broken
    is_timeout: Callable[[Exception], bool] = is_silent

    async def run(self, request: Callable[[], Awaitable[R]]) -> R:
        """Send a request until it succeeds or will not, and return its answer.

        Raises:
            Exception: What the last request raised.
            TimeoutError: The operation took too long: the limit of one request does not end one whose body the server
                does not take.
        """
        try:
            async with asyncio.timeout(self.limit_s) as limit:
                return await self._repeat(request)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TimeoutError(f"not done within {self.limit_s:g} s") from error

    async def _repeat(self, request: Callable[[], Awaitable[R]]) -> R:
        attempt = timeouts = 0
        while True:
            try:
                return await request()
            except Exception as error:
                attempt += 1
                timeouts += self.is_timeout(error)
                if attempt >= self.attempts or timeouts == MOST_TIMEOUTS or not self.is_transient(error):
                    raise
            await asyncio.sleep(pause(attempt))


def pause(attempt: int) -> float:
    """Return the seconds to wait after an attempt: exponential, with jitter."""
    longest: float = min(_PAUSE_SECONDS * 2 ** (attempt - 1), _LONGEST_PAUSE_SECONDS)
    return random.uniform(0.5, 1) * longest  # noqa: S311 - no secret
