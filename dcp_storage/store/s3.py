"""Amazon S3 and servers that speak its protocol, through s3fs."""

import asyncio
import inspect
import io
import random
from base64 import b64encode
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any
from zlib import crc32

from aiobotocore.session import AioSession
from aiohttp import ClientConnectionError, ClientPayloadError
from botocore.config import Config
from botocore.exceptions import (
    ConnectionError as NoConnectionError,
)
from botocore.exceptions import (
    ConnectTimeoutError,
    HTTPClientError,
    IncompleteReadError,
    ProfileNotFound,
    ReadTimeoutError,
    SSLError,
)
from botocore.loaders import create_loader

from dcp_storage.errors import ConfigError, ObjectExists
from dcp_storage.store.base import ABSENT
from dcp_storage.store.failures import error_code, http_status
from dcp_storage.store.remote import RemoteStore

_CONFIG_DEFAULTS = {
    "connect_timeout": 5,  # seconds
    "read_timeout": 15,  # seconds without a byte
    "max_pool_connections": 256,  # the most that Transfer.concurrency may ask for
    # Some servers answer a range with the checksum of the whole object, and blocks carry checks of their own.
    "response_checksum_validation": "when_required",
}
"""What botocore is told where `config_kwargs` in the storage options says nothing."""

_ATTEMPTS = 10
"""Requests for one operation, where neither the storage options nor the environment or profile say."""
_TIMEOUTS = 2
"""... of which so many may end in silence. So an endpoint that refuses or drops connections fails in half a minute."""
_READ_TIMEOUTS = 20
"""How many times `read_timeout` an operation may take, with all its retries: 5 minutes, where nothing else is said."""
_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 4

_PRECONDITION_FAILED = 412
_NOT_IMPLEMENTED = 501

_TIMED_OUT = (ConnectTimeoutError, ReadTimeoutError)
_BROKEN = (NoConnectionError, HTTPClientError, IncompleteReadError, ClientConnectionError, ClientPayloadError)
_BUSY_STATUS = {429, 500, 502, 503, 504}
_BUSY_CODES = {
    "SlowDown",
    "Throttling",
    "RequestTimeout",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "ConditionalRequestConflict",
}


class S3Store(RemoteStore):
    """A key prefix in a bucket.

    Credentials, profile, region and endpoint come from the storage options, fsspec's configuration, or the usual
    `AWS_*` variables and files, in this order, and so does the number of attempts. `config_kwargs` in the storage
    options is merged over this store's time limits.

    What is throttled, refused, reset, broken off or silent is tried again here and nowhere else: neither botocore,
    which does not see a body break off, nor s3fs repeats a request. (aiohttp alone sends one again, at once, whose
    connection turns out to be dead.)
    """

    def __init__(self, url: str, fs_class: Any, storage_options: Mapping[str, Any]) -> None:
        super().__init__(url, fs_class, storage_options)
        _check_options(fs_class, self._options)
        # More than one connection an object would read it in parts, which a commit may replace in between.
        self._options["max_concurrency"] = 1
        # Options that this botocore is too old for name behaviour that it is also too old to have.
        defaults = {name: value for name, value in _CONFIG_DEFAULTS.items() if name in Config.OPTION_DEFAULTS}
        config: dict[str, Any] = defaults | dict(self._options.get("config_kwargs") or {})
        # Bodies carry a CRC; signing them as well, which botocore does over plain HTTP, takes longer than zstd.
        config["s3"] = {"payload_signing_enabled": False} | dict(config.get("s3") or {})
        self._retries = dict(config.get("retries") or {})
        rest = {name: value for name, value in self._retries.items() if name == "mode"}
        self._options["config_kwargs"] = config | {"retries": rest | {"total_max_attempts": 1}}
        patience = config["read_timeout"]
        self._limit_s = None if patience is None else _READ_TIMEOUTS * patience

    def _make_fs(self) -> Any:
        fs = super()._make_fs()
        fs.retries = 1
        fs.session = AioSession(**fs.kwargs)
        fs.session.register("before-call.s3", _expect_nothing)
        fs.session.register_component("data_loader", _loader(fs.session.get_config_variable("data_path")))
        self._attempts = _attempts(self._retries, fs.session)
        return fs

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """End in time: `read_timeout` alone would wait for ever for a server that does not take the whole body."""
        try:
            async with asyncio.timeout(self._limit_s) as limit:
                return await self._persist(method, *args, **kwargs)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TimeoutError(f"not done within {self._limit_s:g} s ({_READ_TIMEOUTS} times read_timeout)") from error

    async def _persist(self, method: str, *args: Any, **kwargs: Any) -> Any:
        attempt = timeouts = 0
        while True:
            attempt += 1
            try:
                return await self._try(method, *args, **kwargs)
            except Exception as error:
                timeouts += isinstance(error, _TIMED_OUT)
                if attempt >= self._attempts or timeouts == _TIMEOUTS or not _is_transient(error):
                    raise
            await asyncio.sleep(_pause(attempt))

    async def _try(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if "Body" in kwargs:
            kwargs["Body"].seek(0)  # the try before has read it
        return await super()._call(method, *args, **kwargs)

    async def commit(self, name: str, data: bytes, over: str | None = None) -> None:
        """Write the object with a request that the server refuses where it is of another version than `over`.

        A server that does not know `If-Match` and `If-None-Match`, or a botocore that is too old for them, only has the
        look before.
        """
        path = self._path(name)
        if over == ABSENT and await self._is_there(name):
            raise self._failures.error("commit", name, "it is there already", ObjectExists)
        with self._failures.mapped("commit", name):
            try:
                await self._write_over(path, data, await self._only_over(over))
            except Exception as error:
                if not _has_changed(error):
                    raise
                if await self._held(path) != data:  # else an attempt of ours whose answer was lost
                    why = "another one was written meanwhile"
                    raise self._failures.error("commit", name, why, ObjectExists) from error

    async def version(self, name: str) -> str | None:
        """Return the object's ETag."""
        with self._failures.mapped("look up", name):
            try:
                info = await self._call("_info", self._path(name))
            except FileNotFoundError:
                return ABSENT
        return info.get("ETag") or None  # not every server has them

    async def _write_over(self, path: str, data: bytes, conditions: Mapping[str, str]) -> None:
        try:
            await self._write(path, io.BytesIO(data), **conditions)
        except Exception as error:
            if not conditions or http_status(error) != _NOT_IMPLEMENTED:
                raise
            await self._write(path, io.BytesIO(data))

    async def _only_over(self, over: str | None) -> dict[str, str]:
        client = await self._fs.get_s3(self._fs.split_path(self._prefix)[0])
        known = client.meta.service_model.operation_model("PutObject").input_shape.members
        header, value = ("IfNoneMatch", "*") if over == ABSENT else ("IfMatch", over)
        return {header: value} if value is not None and header in known else {}

    async def _held(self, path: str) -> bytes | None:
        try:
            return await self._read(path)
        except FileNotFoundError:
            return None

    async def _write(self, path: str, body: io.BytesIO, **conditions: str) -> None:
        # The server checks what arrived. botocore would compute this on the event loop's thread.
        checksum = b64encode((await asyncio.to_thread(_crc32, body)).to_bytes(4, "big")).decode()
        bucket, key, _ = self._fs.split_path(path)
        # s3fs's own way to write bytes would copy the body.
        await self._call(
            "_call_s3", "put_object", Bucket=bucket, Key=key, Body=body, ChecksumCRC32=checksum, **conditions
        )

    async def _list_entries(self) -> Iterable[dict[str, Any]]:
        # `_ls` would take a missing bucket for an empty prefix, and list the parent of an empty one.
        entries: list[dict[str, Any]] = await self._call("_lsdir", self._prefix, refresh=True)
        return entries


@cache
def _loader(data_path: str | None) -> Any:
    """Return what holds botocore's descriptions of services: parsing them anew for every client takes 0.1 s."""
    return create_loader(data_path)


def _check_options(fs_class: type, options: Mapping[str, Any]) -> None:
    """Refuse early what s3fs would pass on, to fail in the middle of a save.

    Raises:
        ConfigError: Nothing takes an option, or there is no such profile.
    """
    known = {name for cls in (*fs_class.__mro__, AioSession) for name in _parameters(cls)}
    unknown = sorted(options.keys() - known - _OF_FSSPEC)
    if unknown:
        raise ConfigError(
            f"s3fs takes no storage option {', '.join(unknown)}; what botocore's client takes goes into "
            f'client_kwargs, as in {{"client_kwargs": {{"region_name": "eu-west-1"}}}}, and credentials are key, '
            "secret and token"
        )
    if profile := options.get("profile"):
        try:
            AioSession(profile=profile).get_scoped_config()
        except ProfileNotFound as error:
            raise ConfigError(f"{error}: name another in storage_options, or write it to ~/.aws/config") from error


_OF_FSSPEC = {"skip_instance_cache", "use_listings_cache", "listings_expiry_time", "max_paths", "target_options"}


def _parameters(cls: type) -> Iterable[str]:
    initializer = vars(cls).get("__init__")
    return inspect.signature(initializer).parameters.keys() if inspect.isfunction(initializer) else ()


def _expect_nothing(params: dict[str, Any], **_: Any) -> None:
    """Send a body without asking first: aiohttp sets no limit to how long it waits for `100 Continue`."""
    params["headers"].pop("Expect", None)


def _crc32(body: io.BytesIO) -> int:
    with body.getbuffer() as memory:
        return crc32(memory)


def _attempts(retries: Mapping[str, int], session: AioSession) -> int:
    """Return how many requests an operation may take, by botocore's rules on who says so."""
    if "total_max_attempts" in retries:
        return retries["total_max_attempts"]
    if "max_attempts" in retries:  # those after the first
        return retries["max_attempts"] + 1
    return session.get_config_variable("max_attempts") or _ATTEMPTS


def _pause(attempt: int) -> float:
    """Return the seconds to wait after an attempt: twice as long each time, and not as long as others that failed."""
    longest: float = min(_PAUSE_SECONDS * 2 ** (attempt - 1), _LONGEST_PAUSE_SECONDS)
    return random.uniform(0.5, 1) * longest  # noqa: S311 - no secret


def _has_changed(error: Exception) -> bool:
    """Tell whether a server refused a request because the object is of another version, or is not there any more."""
    return http_status(error) == _PRECONDITION_FAILED or error_code(error) == "NoSuchKey"


def _is_transient(error: Exception) -> bool:
    if isinstance(error, _BROKEN):
        return not isinstance(error, SSLError)
    return http_status(error) in _BUSY_STATUS or error_code(error) in _BUSY_CODES
