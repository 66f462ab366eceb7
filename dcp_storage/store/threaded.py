"""fsspec file systems that only have blocking calls (SFTP, SMB, HDFS, memory, ...): each call runs in a thread."""

import asyncio
import io
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from dcp_storage.errors import ObjectNotFound
from dcp_storage.format.names import ObjectName, temporary_name
from dcp_storage.store.remote import RemoteStore

R = TypeVar("R")


class ThreadedStore(RemoteStore):
    """A directory of a blocking file system; one call at a time, since fsspec's instances are meant for one thread.

    Such file systems write in pieces, so an object is written under a temporary name and renamed. A commit is as atomic
    as the file system's own rename (SFTP's `posix-rename` is; without one, fsspec copies and deletes).
    """

    def _make_fs(self) -> Any:
        self._turn = asyncio.Lock()
        self._blocking_fs = self._fs_class(**{**self._options, "skip_instance_cache": True})
        self._wrapped = AsyncFileSystemWrapper(self._blocking_fs, asynchronous=True)
        return self._wrapped

    async def _ask(self, request: Callable[[], Awaitable[R]]) -> R:
        """Send a request, once: a rename whose response was lost must not be repeated."""
        async with self._turn:
            return await request()

    async def _write(self, path: str, body: io.BytesIO) -> None:
        temporary = temporary_name(path)
        await self._ask(lambda: self._wrapped._makedirs(self._prefix, exist_ok=True))
        try:
            await self._ask(lambda: self._fs._pipe_file(temporary, body.getvalue()))
            await self._rename(temporary, path)
        except BaseException:
            # The original error is raised.
            with suppress(Exception):
                await self._ask(lambda: self._fs._rm_file(temporary))
            raise

    async def remove_directory(self) -> None:
        """Remove the directory if it exists and is empty."""
        with self._failures.mapped("remove"):
            try:
                await self._ask(lambda: self._wrapped._rmdir(self._prefix))
            except FileNotFoundError:
                return
            except OSError:  # each system has its own error for a directory that is not empty
                if not list(await self._list_entries()):
                    raise

    async def _rename(self, temporary: str, path: str) -> None:
        if type(self._blocking_fs).mv is not AbstractFileSystem.mv:
            await self._ask(lambda: self._wrapped._mv(temporary, path))
            return
        # fsspec's own `mv` would take `?`, `*` and `[` in a path for a pattern.
        await self._ask(lambda: self._wrapped._cp_file(temporary, path))
        await self._ask(lambda: self._fs._rm_file(temporary))

    async def commit(self, name: ObjectName, data: bytes, over: str | None = None) -> None:
        """Write the object under another name, rename it, and check the result: some servers refuse silently.

        Raises:
            StoreError: The previous object is still there.
        """
        before = await self._held(name)
        await super().commit(name, data, over)
        if before != data and await self._held(name) == before:
            raise self._failures.error("commit", name, "a rename that reported no error changed nothing")

    async def _held(self, name: ObjectName) -> bytes | None:
        try:
            return await self.get(name)
        except ObjectNotFound:
            return None

    async def _list_entries(self) -> Iterable[Mapping[str, Any]]:
        self._blocking_fs.invalidate_cache()
        return await super()._list_entries()


class MemoryStore(ThreadedStore):
    """fsspec's `memory://`, whose readers in one process share a file object and its position."""

    async def _read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        file = self._blocking_fs.store.get(path)
        if file is None:
            raise FileNotFoundError(path)
        return bytes(file.getbuffer()[start:stop])
