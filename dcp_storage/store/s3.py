"""Amazon S3 and servers that speak its protocol, through s3fs."""

import asyncio
import random
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from aiobotocore.response import AioReadTimeoutError
from aiobotocore.session import AioSession
from aiohttp import ClientPayloadError
from botocore.config import Config
from botocore.exceptions import IncompleteReadError, ResponseStreamingError
from botocore.loaders import create_loader

from dcp_storage.store.failures import error_code
from dcp_storage.store.remote import RemoteStore

_CONFIG_DEFAULTS = {
    "connect_timeout": 5,  # seconds
    "read_timeout": 15,  # seconds without a byte
    "retries": {"mode": "standard", "total_max_attempts": 4},
    "max_pool_connections": 256,  # the most that Transfer.concurrency may ask for
    # Some servers answer a range with the checksum of the whole object, and blocks carry checks of their own.
    "response_checksum_validation": "when_required",
}
"""What botocore is told where `config_kwargs` in the storage options says nothing: an endpoint that refuses or drops
connections fails within half a minute."""

_READ_TIMEOUTS = 20
"""How many times `read_timeout` an operation may take, with all its retries: 5 minutes, where nothing else is said."""

_ATTEMPTS = 4
_PAUSE_SECONDS = 0.25
_BROKEN_BODY = (AioReadTimeoutError, ClientPayloadError, IncompleteReadError, ResponseStreamingError)
_THROTTLED = {"SlowDown", "ServiceUnavailable", "503"}


class S3Store(RemoteStore):
    """A key prefix in a bucket.

    Credentials, profile, region and endpoint come from the storage options, fsspec's configuration, or the usual
    `AWS_*` variables and files, in this order. `config_kwargs` in the storage options is merged over this store's time
    limits and retries.
    """

    def __init__(self, url: str, fs_class: Any, storage_options: Mapping[str, Any]) -> None:
        super().__init__(url, fs_class, storage_options)
        # More than one connection an object would read it in parts, which a commit may replace in between.
        self._options["max_concurrency"] = 1
        # Options that this botocore is too old for name behaviour that it is also too old to have.
        defaults = {name: value for name, value in _CONFIG_DEFAULTS.items() if name in Config.OPTION_DEFAULTS}
        config: dict[str, Any] = {**defaults, **(self._options.get("config_kwargs") or {})}
        self._options["config_kwargs"] = config
        self._limit_s = _READ_TIMEOUTS * config["read_timeout"]

    def _make_fs(self) -> Any:
        fs = super()._make_fs()
        # botocore retries, within bounds; s3fs's five rounds on top, nested when it reads, would take many minutes.
        fs.retries = 1
        fs.session = AioSession(**fs.kwargs)
        fs.session.register("before-call.s3", _expect_nothing)
        fs.session.register_component("data_loader", _loader(fs.session.get_config_variable("data_path")))
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
        """Repeat what botocore gave up on as throttled, or whose body broke off, which it does not look at."""
        for attempt in range(1, _ATTEMPTS):
            try:
                return await super()._call(method, *args, **kwargs)
            except Exception as error:
                if not _is_transient(error):
                    raise
            await asyncio.sleep(random.uniform(0.5, 1) * _PAUSE_SECONDS * 2**attempt)  # noqa: S311 - no secret
        return await super()._call(method, *args, **kwargs)

    async def _write(self, path: str, data: bytes) -> None:
        # s3fs makes one PUT of a body that is smaller than two chunks.
        await self._call("_pipe_file", path, data, chunksize=len(data) + 1)

    async def _list_entries(self) -> Iterable[dict[str, Any]]:
        # `_ls` would take a missing bucket for an empty prefix, and list the parent of an empty one.
        entries: list[dict[str, Any]] = await self._call("_lsdir", self._prefix, refresh=True)
        return entries


@cache
def _loader(data_path: str | None) -> Any:
    """Return what holds botocore's descriptions of services: parsing them anew for every client takes 0.1 s."""
    return create_loader(data_path)


def _expect_nothing(params: dict[str, Any], **_: Any) -> None:
    """Send a body without asking first: aiohttp sets no limit to how long it waits for `100 Continue`."""
    params["headers"].pop("Expect", None)


def _is_transient(error: Exception) -> bool:
    return isinstance(error, _BROKEN_BODY) or error_code(error) in _THROTTLED
