"""Requests to S3, with retries. Private functions of s3fs are called here."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from dcp_storage.store.failures import error_code
from dcp_storage.store.retries import Retries
from dcp_storage.store.s3_client import Credentials, MovedError, Redirects, hook

R = TypeVar("R")

_MOST_REDIRECTS = 3

_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken", "TokenRefreshRequired"}


class Requests:
    """Sends requests for one bucket, with s3fs's client.

    Requests that are throttled, refused, reset or interrupted, or time out, are retried here and nowhere else: neither
    botocore, which does not notice an interrupted body, nor s3fs repeats a request. (Only aiohttp resends one, at once,
    if its connection turns out to be dead.)

    Args:
        fs: s3fs's file system, with a session.
        bucket: The bucket.
        retries: How often each operation is tried.

    Attributes:
        client: botocore's client, once it is connected.
    """

    def __init__(self, fs: Any, bucket: str, retries: Retries) -> None:
        self.client: Any = None
        self.bucket = bucket
        self._fs = fs
        self._retries = retries
        self._redirects = Redirects()

    async def connect(self) -> None:
        """Open the client."""
        await self._fs.set_session()
        self.client = await self._persist(lambda: self._fs.get_s3(self.bucket))
        hook(self.client, self._redirects)

    def takes(self, operation: str, parameter: str) -> bool:
        """Return whether this botocore supports a parameter of an operation."""
        return parameter in self.client.meta.service_model.operation_model(operation).input_shape.members

    async def send(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """Send a request, with retries, and read the body of the response."""
        return await self._persist(lambda: self.send_once(operation, parameters))

    async def send_once(self, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Send a request."""
        sent = parameters.get("Body")
        if sent is not None:
            sent.seek(0)  # the previous attempt has read it
        answer: dict[str, Any] = await self._fs._call_s3(operation, Bucket=self.bucket, **parameters)
        if stream := answer.get("Body"):
            try:
                answer["Body"] = await stream.read()
            finally:
                stream.close()
        return answer

    async def _follow(self, call: Callable[[], Awaitable[R]]) -> R:
        """Call again, at once, if the server redirects to another place of the bucket."""
        for _ in range(_MOST_REDIRECTS):
            with suppress(MovedError):
                return await call()
        return await call()

    async def _persist(self, call: Callable[[], Awaitable[R]]) -> R:
        try:
            return await self._retries.run(lambda: self._follow(call))
        except Exception as error:
            self._forget_credentials(error)
            raise

    def _forget_credentials(self, error: Exception) -> None:
        provider = self._fs.session.get_component("credential_provider")
        if error_code(error) in _EXPIRED and isinstance(provider, Credentials):
            provider.forget()
