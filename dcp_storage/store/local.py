"""A directory on a local (or mounted) file system, through aiofiles."""

import asyncio
import builtins
import os
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import ParamSpec, Self, TypeVar

from aiofiles.os import wrap

from dcp_storage.config import MIB
from dcp_storage.errors import ObjectExists, ObjectNotFound
from dcp_storage.format.names import ObjectName
from dcp_storage.store import files, reads
from dcp_storage.store.base import ABSENT, Batch, ObjectInfo, Room, Store
from dcp_storage.store.failures import Failures
from dcp_storage.store.names import check_name

P = ParamSpec("P")
R = TypeVar("R")


class LocalStore(Store):
    """The files of one directory, which is created when the first object is put.

    Args:
        path: The directory.
        sync_files: Whether a put and a commit wait until their bytes are on disk. Without it a crash of the machine,
            though not one of the process, may lose or damage a checkpoint.
    """

    remote = False
    put_bytes = 64 * MIB  # streamed: the fewer files to sync, the better
    read_bytes = 8 * MIB

    def __init__(self, path: str | os.PathLike[str], *, sync_files: bool = True) -> None:
        self._directory = Path(path).absolute()
        self._sync_files = sync_files
        self.url = str(self._directory)
        self._failures = Failures(self.url)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Do nothing: no file is kept open between calls."""

    def child(self, name: str) -> "LocalStore":
        """Return the store of a subdirectory."""
        return LocalStore(self._path(name), sync_files=self._sync_files)

    async def put(self, name: ObjectName, batches: AsyncIterable[Batch]) -> int:
        """Stream the batches into a new file; remove it if anything fails."""
        path = self._path(name)
        size = 0
        async with self._new_file(path) as file:
            async for batch in batches:
                with self._failures.mapped("write", name):
                    size += await _in_thread(file.append, batch)
            with self._failures.mapped("write", name):
                await _in_thread(file.finish)
        return size

    async def commit(self, name: ObjectName, data: bytes, over: str | None = None) -> None:
        """Write a temporary file next to the object, and rename it over that or, for `ABSENT`, hard-link it there."""
        path = self._path(name)
        write = files.create_file if over == ABSENT else files.replace_file
        with self._failures.mapped("commit", name):
            try:
                await _in_thread(files.in_directory, self._directory, write, path, data, sync=self._sync_files)
            except FileExistsError as error:
                raise self._failures.error("commit", name, "it already exists", ObjectExists) from error

    async def get(self, name: ObjectName) -> bytes:
        """Read the whole file."""
        path = self._path(name)
        with self._failures.mapped("read", name, absent=ObjectNotFound):
            return await wrap(reads.read_file)(path)

    async def get_range(self, name: ObjectName, start: int, stop: int, room: Room | None = None) -> bytes | memoryview:
        """Read a range of the file; into `room`, with direct I/O for what is not in the page cache."""
        path = self._path(name)
        with self._failures.mapped("read", name, absent=ObjectNotFound):
            # The thread writes to memory that its owner reuses once this call has ended.
            return await _in_thread(reads.read_range, path, start, stop, room)

    async def probe(self, name: ObjectName) -> bool:
        """Return whether the file exists; raise an error if it may not be read or replaced."""
        path = self._path(name)
        with self._failures.mapped("commit", name):
            return await wrap(reads.reopening(files.check_replaceable))(path)

    async def size(self, name: ObjectName) -> int:
        """Return the file's size in bytes."""
        path = self._path(name)
        with self._failures.mapped("look up", name, absent=ObjectNotFound):
            return await wrap(reads.reopening(files.file_size))(path)

    async def list(self) -> dict[ObjectName, ObjectInfo]:
        """Return the regular files in the directory."""
        with self._failures.mapped("list"):
            statuses = await wrap(reads.reopening(files.stat_files))(self._directory)
        return {ObjectName(name): ObjectInfo(status.st_size, status.st_mtime) for name, status in statuses.items()}

    async def directories(self) -> builtins.list[str]:
        """Return the names of the subdirectories."""
        with self._failures.mapped("list"):
            return await wrap(reads.reopening(files.list_directories))(self._directory)

    async def is_link(self) -> bool:
        """Return whether the directory is a symbolic link."""
        with self._failures.mapped("look up"):
            return await wrap(self._directory.is_symlink)()

    async def remove_directory(self) -> None:
        """Remove the directory if it exists and is empty."""
        with self._failures.mapped("remove"):
            await wrap(files.remove_directory)(self._directory)

    async def delete(self, names: Sequence[ObjectName]) -> None:
        """Remove files, after syncing the directory: an earlier rename may have replaced them."""
        paths = [(name, self._path(name)) for name in names]
        if paths and self._sync_files:
            with self._failures.mapped("delete", names[0]), suppress(FileNotFoundError):
                await _in_thread(files.sync_directory, self._directory)
        for name, path in paths:
            with self._failures.mapped("delete", name):
                await wrap(path.unlink)(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._directory / check_name(name)

    @asynccontextmanager
    async def _new_file(self, path: Path) -> AsyncIterator[files.NewFile]:
        """Create a file; remove it if the block ends with an error."""
        opening = asyncio.ensure_future(
            wrap(files.in_directory)(self._directory, files.NewFile, path, sync=self._sync_files)
        )
        try:
            with self._failures.mapped("write", path.name):
                file = await _unbroken(opening)
            yield file
        except BaseException:
            if not opening.cancelled() and opening.exception() is None:
                await _in_thread(opening.result().discard, path)
            raise


async def _in_thread(call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    return await _unbroken(wrap(call)(*args, **kwargs))


async def _unbroken(work: Awaitable[R]) -> R:
    """Await work in a thread to its end, even if cancelled: a thread cannot be stopped."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
