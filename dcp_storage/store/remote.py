"""Objects below a prefix of any file system that fsspec supports, through fsspec's coroutines."""

import asyncio
import builtins
import io
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from datetime import UTC, datetime
from typing import Any, Protocol, Self, TypeVar

from fsspec.config import apply_config

from dcp_storage.config import MIB
from dcp_storage.errors import ConfigError, ObjectExists, ObjectNotFound, StoreError
from dcp_storage.format.names import ObjectName
from dcp_storage.store.base import ABSENT, Batch, ObjectInfo, Room, Store
from dcp_storage.store.bodies import Bodies
from dcp_storage.store.closing import close_opened
from dcp_storage.store.failures import Failures, is_range_beyond_end
from dcp_storage.store.names import check_name
from dcp_storage.store.redact import secrets_in
from dcp_storage.store.retries import Retries

_DELETES_IN_FLIGHT = 32
_ANY_NAME = "object"
_RETRIES = Retries(attempts=4, slow_s=2)
_TIME_KEYS = ("LastModified", "mtime", "last_modified", "updated", "modified", "created")
R = TypeVar("R")


class FileSystem(Protocol):
    """The coroutines of an fsspec file system that a `RemoteStore` uses; their names begin with an underscore."""

    async def _pipe_file(self, path: str, value: bytes) -> object: ...

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes: ...

    async def _info(self, path: str) -> Mapping[str, Any]: ...

    async def _rm_file(self, path: str) -> object: ...

    async def _ls(self, path: str, detail: bool = True) -> Sequence[Mapping[str, Any]]: ...

    def invalidate_cache(self) -> object:
        """Drop cached listings."""


class RemoteStore(Store):
    """An object store with an async fsspec file system: one request writes a whole object, or nothing.

    Args:
        url: The prefix.
        fs_class: fsspec's class for the URL's protocol.
        storage_options: Arguments of the class, which override fsspec's own configuration and the URL.
    """

    remote = True
    # Large enough that a request's latency does not matter, small enough that a server can hold many at once.
    put_bytes = read_bytes = 16 * MIB

    _fs: FileSystem
    """Only while the store is open."""

    def __init__(self, url: str, fs_class: Any, storage_options: Mapping[str, Any]) -> None:
        self._fs_class = fs_class
        said = fs_class._get_kwargs_from_urls(url)
        said.pop("version_aware", None)  # `?` and `#` are parts of a path, not the version of an object
        self._options = apply_config(fs_class, {**said, **storage_options})
        self._prefix = fs_class._strip_protocol(url).rstrip("/")
        self._failures = Failures(url, secrets_in(url, self._options))
        self.url = self._failures.url
        self._bodies = Bodies()

    async def __aenter__(self) -> Self:
        try:
            with self._failures.mapped("open"):
                self._fs = fs = self._make_fs()
                await self._connect(fs)
                self._check_paths(fs)
        except BaseException:
            with suppress(StoreError):  # the original error is raised
                await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close what the file system opened."""
        fs = vars(self).pop("_fs", None)
        if fs is not None:
            with self._failures.mapped("close"):
                await self._disconnect(fs)

    def child(self, name: str) -> Self:
        """Return the store of a prefix directly below this one, with the same client."""
        below = copy(self)
        below._prefix = self._path(name)
        below._failures = Failures(f"{self.url.rstrip('/')}/{name}", secrets_in(self.url, self._options))
        below.url = below._failures.url
        below._bodies = Bodies()
        return below

    async def put(self, name: ObjectName, batches: AsyncIterable[Batch]) -> int:
        """Gather the batches into one body and write it with one request."""
        path = self._path(name)
        async with self._bodies.gather(batches) as body:
            with self._failures.mapped("write", name):
                await self._write(path, body)
            return body.getbuffer().nbytes

    async def commit(self, name: ObjectName, data: bytes, over: str | None = None) -> None:
        """Write the object with one request, which replaces an older one as a whole.

        For `ABSENT` it checks first: fsspec has no request that does both at once.
        """
        path = self._path(name)
        if over == ABSENT and await self._is_there(name):
            raise self._failures.error("commit", name, "it already exists", ObjectExists)
        with self._failures.mapped("commit", name):
            await self._write(path, io.BytesIO(data))

    async def _is_there(self, name: ObjectName) -> bool:
        try:
            await self.size(name)
        except ObjectNotFound:
            return False
        return True

    async def get(self, name: ObjectName) -> bytes:
        """Read a whole object with one request."""
        path = self._path(name)
        with self._failures.mapped("read", name, absent=ObjectNotFound):
            return await self._read(path)

    async def get_range(
        self,
        name: ObjectName,
        start: int,
        stop: int,
        room: Room | None = None,  # noqa: ARG002 - HTTP clients allocate what they return
    ) -> bytes:
        """Read a range with one request."""
        path = self._path(name)
        with self._failures.mapped("read", name, absent=ObjectNotFound):
            try:
                data = await self._read(path, start, stop)
            except FileNotFoundError:
                raise
            except Exception as error:
                if is_range_beyond_end(error) or await self._ends_before(path, start):
                    return b""
                raise
        if len(data) > stop - start:
            raise self._failures.error("read", name, f"the server ignored the range {start} to {stop}")
        return data

    async def _ends_before(self, path: str, start: int) -> bool:
        """Return whether an object has no byte at `start`: the errors of some clients do not show it."""
        try:
            info = await self._info(path)
        except Exception:  # noqa: BLE001 - the original error is raised
            return False
        return info.get("size") is not None and int(info["size"]) <= start

    async def size(self, name: ObjectName) -> int:
        """Return the object's size in bytes."""
        path = self._path(name)
        with self._failures.mapped("look up", name, absent=ObjectNotFound):
            info = await self._info(path)
        if info["type"] != "file":
            raise self._failures.error("look up", name, f"it is a {info['type']}", ObjectNotFound)
        return self._size(name, info)

    async def list(self) -> dict[ObjectName, ObjectInfo]:
        """Return the objects directly below the prefix."""
        with self._failures.mapped("list"):
            entries = await self._list_entries()
        files = (entry for entry in entries if entry["type"] == "file" and entry["name"] != self._prefix)
        found = {entry["name"].rpartition("/")[2]: entry for entry in files}
        found.pop("", None)  # a marker that some tools put into an empty directory
        return {
            ObjectName(name): ObjectInfo(self._size(name, entry), _modified(entry)) for name, entry in found.items()
        }

    async def directories(self) -> builtins.list[str]:
        """Return the prefixes directly below this one."""
        with self._failures.mapped("list"):
            entries = await self._list_entries()
        return [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]

    def _size(self, name: ObjectName, entry: Mapping[str, Any]) -> int:
        if entry["size"] is None:
            raise self._failures.error("find the size of", name, "the server does not report it (no Content-Length)")
        return int(entry["size"])

    async def delete(self, names: Sequence[ObjectName]) -> None:
        """Delete every object that can be deleted, then raise the first failure.

        It sends one request per object: some servers refuse S3's bulk delete, whose errors s3fs ignores.
        """
        limit = asyncio.Semaphore(_DELETES_IN_FLIGHT)
        paths = [(name, self._path(name)) for name in names]
        results = await asyncio.gather(*(self._delete(*path, limit) for path in paths), return_exceptions=True)
        for error in filter(None, results):
            raise error

    async def _delete(self, name: str, path: str, limit: asyncio.Semaphore) -> None:
        async with limit:
            with self._failures.mapped("delete", name):
                try:
                    await self._remove(path)
                except FileNotFoundError:
                    return

    def _path(self, name: str) -> str:
        return f"{self._prefix}/{check_name(name)}"

    def _make_fs(self) -> Any:
        """Create the file system on the running loop; fsspec would otherwise share one between loops."""
        return self._fs_class(**{**self._options, "asynchronous": True, "skip_instance_cache": True})

    async def _connect(self, fs: Any) -> None:
        """Open the session that fsspec's file systems otherwise open at the first request."""
        connect = getattr(fs, "set_session", None) or getattr(fs, "_set_session", None)
        if connect is not None:
            await connect()

    async def _disconnect(self, fs: Any) -> None:
        await close_opened(fs, self._options)

    def _check_paths(self, fs: Any) -> None:
        """Check that the file system does not take a part of an object's path for a version.

        Raises:
            ConfigError: It does, so that all objects would be the same one.
        """
        split = getattr(fs, "split_path", None)
        if split is not None and not any(str(part).endswith(_ANY_NAME) for part in split(self._path(_ANY_NAME))):
            raise ConfigError(f"{self.url}: fsspec reads a part of this URL as the version of an object; leave it out")

    async def _write(self, path: str, body: io.BytesIO) -> None:
        await self._ask(lambda: self._fs._pipe_file(path, body.getvalue()))

    async def _read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        return await self._ask(lambda: self._fs._cat_file(path, start=start, end=stop))

    async def _info(self, path: str) -> Mapping[str, Any]:
        return await self._ask(lambda: self._fs._info(path))

    async def _remove(self, path: str) -> None:
        await self._ask(lambda: self._fs._rm_file(path))

    async def _list_entries(self) -> Iterable[Mapping[str, Any]]:
        self._fs.invalidate_cache()
        try:
            return await self._ask(lambda: self._fs._ls(self._prefix, detail=True))
        except FileNotFoundError:
            return []

    async def _ask(self, request: Callable[[], Awaitable[R]]) -> R:
        """Send a request, and retry it if the connection breaks: not every client does that itself."""
        return await _RETRIES.run(request)


def _modified(entry: Mapping[str, Any]) -> float | None:
    """Return the time of the last write in an entry of a listing; each file system has its own key for it."""
    time = next((entry[key] for key in _TIME_KEYS if entry.get(key) is not None), None)
    if isinstance(time, str):
        try:
            time = datetime.fromisoformat(time)
        except ValueError:
            return None
    if isinstance(time, datetime):
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    return float(time) if isinstance(time, int | float) else None
