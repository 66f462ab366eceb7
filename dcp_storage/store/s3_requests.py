"""Requests to S3, until they succeed or will not. What s3fs is asked privately is asked here."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from dcp_storage.store.failures import error_code
from dcp_storage.store.s3_client import Credentials, MovedError, Redirects, hook
from dcp_storage.store.s3_retry import MOST_TIMEOUTS, is_timeout, is_transient, pause

R = TypeVar("R")

_READ_TIMEOUTS = 20
"""How many times `read_timeout` an operation may take, with all its retries: 5 minutes, where nothing else is said."""
_MOST_REDIRECTS = 3

_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken", "TokenRefreshRequired"}


class Requests:
    """Sends requests for one bucket, with s3fs's client.

    What is throttled, refused, reset, broken off or silent is tried again here and nowhere else: neither botocore,
    which does not see a body break off, nor s3fs repeats a request. (aiohttp alone sends one again, at once, whose
    connection turns out to be dead.)

    Args:
        fs: s3fs's file system, with a session.
        bucket: The bucket.
        attempts: Requests for one operation, at most.
        read_timeout: Seconds without a byte after which a request fails, or `None` for any.

    Attributes:
        client: botocore's client, once it is connected.
    """

    def __init__(self, fs: Any, bucket: str, attempts: int, read_timeout: float | None) -> None:
        self.client: Any = None
        self.bucket = bucket
        self._fs = fs
        self._attempts = attempts
        self._limit_s = None if read_timeout is None else _READ_TIMEOUTS * read_timeout
        self._redirects = Redirects()

    async def connect(self) -> None:
        """Open the client."""
        await self._fs.set_session()
        self.client = await self._end_in_time(lambda: self._fs.get_s3(self.bucket))
        hook(self.client, self._redirects)

    def takes(self, operation: str, parameter: str) -> bool:
        """Tell whether this botocore knows a parameter of an operation."""
        return parameter in self.client.meta.service_model.operation_model(operation).input_shape.members

    async def send(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """Send a request until it succeeds or will not; a body in the answer is read."""
        return await self._end_in_time(lambda: self.send_once(operation, parameters))

    async def send_once(self, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Send a request."""
        sent = parameters.get("Body")
        if sent is not None:
            sent.seek(0)  # the try before has read it
        answer: dict[str, Any] = await self._fs._call_s3(operation, Bucket=self.bucket, **parameters)
        if stream := answer.get("Body"):
            try:
                answer["Body"] = await stream.read()
            finally:
                stream.close()
        return answer

    async def _end_in_time(self, call: Callable[[], Awaitable[R]]) -> R:
        """Repeat a call, but not for ever: `read_timeout` alone would wait for a server that does not take a body."""
        try:
            async with asyncio.timeout(self._limit_s) as limit:
                return await self._repeat(call)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TimeoutError(f"not done within {self._limit_s:g} s ({_READ_TIMEOUTS} times read_timeout)") from error

    async def _repeat(self, call: Callable[[], Awaitable[R]]) -> R:
        attempt = timeouts = redirects = 0
        while True:
            try:
                return await call()
            except MovedError:
                redirects += 1
                if redirects > _MOST_REDIRECTS:
                    raise
                continue
            except Exception as error:
                attempt += 1
                timeouts += is_timeout(error)
                if attempt >= self._attempts or timeouts == MOST_TIMEOUTS or not is_transient(error):
                    self._forget_credentials(error)
                    raise
            await asyncio.sleep(pause(attempt))

    def _forget_credentials(self, error: Exception) -> None:
        provider = self._fs.session.get_component("credential_provider")
        if error_code(error) in _EXPIRED and isinstance(provider, Credentials):
            provider.forget()
