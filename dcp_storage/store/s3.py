"""Amazon S3 and servers that speak its protocol, through s3fs."""

import asyncio
import inspect
import io
from base64 import b64encode
from collections.abc import Iterable, Mapping
from typing import Any, Self
from zlib import crc32

from aiobotocore.session import AioSession
from botocore.config import Config
from botocore.exceptions import ProfileNotFound

from dcp_storage.errors import AccessDenied, ConfigError, ObjectExists, ObjectNotFound
from dcp_storage.format.names import ObjectName
from dcp_storage.store.base import ABSENT
from dcp_storage.store.failures import answer_of, describe, error_code, http_status, is_denied
from dcp_storage.store.names import check_name
from dcp_storage.store.remote import RemoteStore
from dcp_storage.store.s3_client import check_certificates, http_options, make_session, use_here
from dcp_storage.store.s3_requests import Requests
from dcp_storage.store.s3_retry import retries_of

_CONFIG_DEFAULTS = {
    "connect_timeout": 5,  # seconds
    "read_timeout": 15,  # seconds without a byte
    "max_pool_connections": 256,  # the maximum of Transfer.concurrency
    # Some servers return the checksum of the whole object with a range, and blocks have their own checks.
    "response_checksum_validation": "when_required",
}
"""The settings of botocore, unless `config_kwargs` in the storage options overrides them."""

_PRECONDITION_FAILED = 412
_NOT_IMPLEMENTED = 501
_NO_CHECKSUMS = (
    "the server may not support checksums: set AWS_REQUEST_CHECKSUM_CALCULATION=when_required, or storage_options="
    '{"config_kwargs": {"request_checksum_calculation": "when_required"}}'
)
_ABSENT_OR_DENIED = "without the permission s3:ListBucket, S3 responds like this for absent objects, too"


class S3Store(RemoteStore):
    """A key prefix in a bucket.

    Credentials, profile, region and endpoint come from the storage options, fsspec's configuration, or the usual
    `AWS_*` variables and files, in this order, and so does the number of attempts; a `session` is used as it is.
    `config_kwargs` in the storage options is merged over this store's timeouts.

    An object's key is the prefix and its name, whatever they contain: s3fs creates the client and signs, but parses no
    paths of objects. `Requests` retries.
    """

    def __init__(self, url: str, fs_class: Any, storage_options: Mapping[str, Any]) -> None:
        super().__init__(url, fs_class, storage_options)
        if not self._prefix.partition("/")[0]:
            raise ConfigError(f"{self.url} names no bucket: pass s3://bucket/prefix")
        _check_options(fs_class, self._options)
        # A botocore that is too old for one of these options also lacks the behavior that it controls.
        defaults = {name: value for name, value in _CONFIG_DEFAULTS.items() if name in Config.OPTION_DEFAULTS}
        config: dict[str, Any] = defaults | http_options() | dict(self._options.get("config_kwargs") or {})
        # Bodies carry a CRC; signing them as well, which botocore does over plain HTTP, takes longer than zstd.
        config["s3"] = {"payload_signing_enabled": False} | dict(config.get("s3") or {})
        self._retry_settings = dict(config.get("retries") or {})
        rest = {name: value for name, value in self._retry_settings.items() if name == "mode"}
        self._options["config_kwargs"] = config | {"retries": rest | {"total_max_attempts": 1}}

    def _make_fs(self) -> Any:
        fs = super()._make_fs()
        fs.retries = 1
        if fs.session is None:
            fs.session = make_session(fs.kwargs)
            check_certificates(self._options, fs.session)
        bucket, key, _ = fs.split_path(self._prefix)
        self._keys = f"{key}/" if key else ""
        patience = self._options["config_kwargs"]["read_timeout"]
        self._requests = Requests(fs, bucket, retries_of(self._retry_settings, fs.session, patience))
        return fs

    def child(self, name: str) -> Self:
        """Return the store of the keys below a name, with the same client."""
        below = super().child(name)
        below._keys = f"{self._keys}{name}/"
        return below

    async def _connect(self, fs: Any) -> None:
        if "session" in self._options:
            use_here(await fs.session.get_credentials())
        await self._requests.connect()
        # Set by the options, the environment or the profile.
        how = getattr(self._requests.client.meta.config, "request_checksum_calculation", None)
        self._checksums = how != "when_required"

    async def _disconnect(self, fs: Any) -> None:
        if creator := getattr(fs, "_s3creator", None):
            await creator.__aexit__(None, None, None)

    def _path(self, name: str) -> str:
        """Return the key of an object."""
        return f"{self._keys}{check_name(name)}"

    async def commit(self, name: ObjectName, data: bytes, over: str | None = None) -> None:
        """Write the object with a request that the server refuses if the object's version is not `over`.

        If the server does not support `If-Match` and `If-None-Match`, or botocore is too old for them, there is only
        the check beforehand.
        """
        path = self._path(name)
        if over == ABSENT and await self._is_there(name):
            raise self._failures.error("commit", name, "it already exists", ObjectExists)
        with self._failures.mapped("commit", name):
            try:
                await self._write_over(path, data, self._only_over(over))
            except Exception as error:
                if not _has_changed(error):
                    raise
                if await self._held(path) != data:  # otherwise it is an attempt of ours whose response was lost
                    why = "another one was written in the meantime"
                    raise self._failures.error("commit", name, why, ObjectExists) from error

    async def probe(self, name: ObjectName) -> bool:
        """Return whether an object exists; without permission to list, S3 denies access to absent ones.

        Raises:
            StoreError: The bucket does not exist.
        """
        try:
            await self.get_range(name, 0, 1)
        except AccessDenied:
            return False
        except ObjectNotFound as error:
            if error_code(error) == "NoSuchBucket":
                raise self._failures.error("look up", name, "the specified bucket does not exist") from error
            return False
        return True

    async def _is_there(self, name: ObjectName) -> bool:
        return await self.probe(name)

    async def version(self, name: ObjectName) -> str | None:
        """Return the object's ETag."""
        try:
            with self._failures.mapped("look up", name, absent=ObjectNotFound):
                info = await self._info(self._path(name))
        except (ObjectNotFound, AccessDenied):
            return ABSENT
        return info["ETag"] or None  # not every server has ETags

    async def _write_over(self, path: str, data: bytes, conditions: Mapping[str, str]) -> None:
        try:
            await self._write(path, io.BytesIO(data), **conditions)
        except Exception as error:
            if not conditions or http_status(error) != _NOT_IMPLEMENTED:
                raise
            await self._write(path, io.BytesIO(data))

    def _only_over(self, over: str | None) -> dict[str, str]:
        header, value = ("IfNoneMatch", "*") if over == ABSENT else ("IfMatch", over)
        return {header: value} if value is not None and self._requests.takes("PutObject", header) else {}

    async def _held(self, path: str) -> bytes | None:
        try:
            return await self._read(path)
        except FileNotFoundError:
            return None
        except PermissionError as error:
            raise PermissionError(f"it already exists and may not be read, so it is not replaced: {error}") from error

    async def _write(self, path: str, body: io.BytesIO, **conditions: str) -> None:
        """Put an object with a checksum, so that the server checks the bytes that arrived.

        It is computed in another thread; botocore would use the event loop's.
        """
        if not self._checksums:
            await self._requests.send("put_object", Key=path, Body=body, **conditions)
            return
        checksum = b64encode((await asyncio.to_thread(_crc32, body)).to_bytes(4, "big")).decode()
        try:
            await self._requests.send("put_object", Key=path, Body=body, ChecksumCRC32=checksum, **conditions)
        except Exception as error:
            if not _refuses_checksums(error):
                raise
            raise OSError(f"{describe(error)} ({_NO_CHECKSUMS})") from error

    async def _read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        ranged = {} if start is None or stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        try:
            data: bytes = (await self._requests.send("get_object", Key=path, **ranged))["Body"]
        except Exception as error:
            if not is_denied(error):
                raise
            raise PermissionError(f"{describe(error)} ({_ABSENT_OR_DENIED})") from error
        return data

    async def _info(self, path: str) -> dict[str, Any]:
        answer = await self._requests.send("head_object", Key=path)
        return {"type": "file", "size": answer["ContentLength"], "ETag": answer.get("ETag")}

    async def _ends_before(self, path: str, start: int) -> bool:  # noqa: ARG002 - S3 responds with 416
        return False

    async def _remove(self, path: str) -> None:
        await self._requests.send("delete_object", Key=path)

    async def _list_entries(self) -> Iterable[Mapping[str, Any]]:
        entries: list[dict[str, Any]] = []
        more: dict[str, str] = {}
        while True:
            page = await self._requests.send("list_objects_v2", Prefix=self._keys, Delimiter="/", **more)
            entries += ({"type": "directory", "name": each["Prefix"]} for each in page.get("CommonPrefixes", ()))
            entries += ({"type": "file", "name": f["Key"], "size": f["Size"], **f} for f in page.get("Contents", ()))
            if not page.get("IsTruncated"):
                return entries
            more = {"ContinuationToken": page["NextContinuationToken"]}


def _check_options(fs_class: type, options: Mapping[str, Any]) -> None:
    """Refuse invalid options early: s3fs would pass them on, and a save would fail halfway.

    Raises:
        ConfigError: An option is unknown, or the profile or the certificate bundle does not exist.
    """
    known = {name for cls in (*fs_class.__mro__, AioSession) for name in _parameters(cls)}
    unknown = sorted(options.keys() - known - _OF_FSSPEC)
    if unknown:
        raise ConfigError(
            f"s3fs has no storage option {', '.join(unknown)}; options of botocore's client go into "
            f'client_kwargs, as in {{"client_kwargs": {{"region_name": "eu-west-1"}}}}, and credentials are key, '
            "secret and token"
        )
    check_certificates(options)
    if profile := options.get("profile"):
        try:
            AioSession(profile=profile).get_scoped_config()
        except ProfileNotFound as error:
            raise ConfigError(f"{error}: name another in storage_options, or add it to ~/.aws/config") from error


_OF_FSSPEC = {"skip_instance_cache", "use_listings_cache", "listings_expiry_time", "max_paths", "target_options"}


def _parameters(cls: type) -> Iterable[str]:
    initializer = vars(cls).get("__init__")
    return inspect.signature(initializer).parameters.keys() if inspect.isfunction(initializer) else ()


def _crc32(body: io.BytesIO) -> int:
    with body.getbuffer() as memory:
        return crc32(memory)


def _has_changed(error: Exception) -> bool:
    """Return whether a server refused a request because the object was changed or deleted."""
    return http_status(error) == _PRECONDITION_FAILED or error_code(error) == "NoSuchKey"


def _refuses_checksums(error: Exception) -> bool:
    """Return whether a server does not support the header; if the checksum differs, the code is `BadDigest`."""
    if http_status(error) == _NOT_IMPLEMENTED:
        return True
    told = answer_of(error).get("Error", {})
    names_it = any(word in str(told.get("Message", "")).lower() for word in ("checksum", "header"))
    return names_it and told.get("Code") in {"InvalidArgument", "InvalidRequest", "InvalidHeader", "NotImplemented"}
