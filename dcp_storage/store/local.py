"""A directory on a local (or mounted) file system, through aiofiles."""

import asyncio
import errno
import os
import secrets
import stat
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import aiofiles
import aiofiles.os

from dcp_storage.config import MIB
from dcp_storage.errors import ObjectNotFound
from dcp_storage.store.base import Batch, Store
from dcp_storage.store.failures import Failures
from dcp_storage.store.names import check_name

_T = TypeVar("_T")


class LocalStore(Store):
    """The files of one directory, made when the first object is put.

    Args:
        path: The directory.
        sync_files: Whether a put and a commit wait until their bytes are on the disk. Without it a checkpoint may be
            lost or damaged by a crash of the machine, though not by one of the process.
    """

    put_bytes = 64 * MIB  # streamed: the fewer files to sync, the better
    read_bytes = 4 * MIB  # what caches hold, and malloc keeps

    def __init__(self, path: str | os.PathLike[str], *, sync_files: bool = True) -> None:
        self._directory = Path(path).absolute()
        self._sync_files = sync_files
        self.url = str(self._directory)
        self._failures = Failures(self.url)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Nothing to close: no file is held open between calls."""

    async def put(self, name: str, batches: AsyncIterable[Batch]) -> int:
        """Stream the batches into a new file; remove it again if anything fails."""
        path = self._path(name)
        size = 0
        with self._failures.mapped("write", name):
            await _unbroken(_make_directory(self._directory))
        async with self._new_file(path) as file:
            async for batch in batches:
                with self._failures.mapped("write", name):
                    await _unbroken(file.writelines(batch))
                size += sum(memoryview(block).nbytes for block in batch)
            with self._failures.mapped("write", name):
                await _unbroken(_finish_file(file, self._sync_files))
        return size

    async def commit(self, name: str, data: bytes) -> None:
        """Write a temporary file beside the object and rename it over the object."""
        path = self._path(name)
        with self._failures.mapped("commit", name):
            await _unbroken(_make_directory(self._directory))
            await _unbroken(_replace(path, data, self._sync_files))

    async def get(self, name: str) -> bytes:
        """Read the whole file."""
        path = self._path(name)
        with self._failures.mapped("read", name, absent=ObjectNotFound):
            return await _read(path)

    async def get_range(self, name: str, start: int, stop: int) -> bytes:
        """Read a range of the file."""
        path = self._path(name)
        with self._failures.mapped("read", name, absent=ObjectNotFound):
            return await _read_range(path, start, stop)

    async def size(self, name: str) -> int:
        """Return the file's size in bytes."""
        path = self._path(name)
        with self._failures.mapped("look up", name, absent=ObjectNotFound):
            return await _file_size(path)

    async def list(self) -> dict[str, int]:
        """Return the regular files in the directory."""
        with self._failures.mapped("list"):
            return await _list_files(self._directory)

    async def delete(self, names: Sequence[str]) -> None:
        """Remove files."""
        paths = [(name, self._path(name)) for name in names]
        for name, path in paths:
            with self._failures.mapped("delete", name):
                await _unlink(path, missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._directory / check_name(name)

    @asynccontextmanager
    async def _new_file(self, path: Path) -> AsyncIterator[Any]:
        """A file that did not exist before: closed when the block ends, and removed if it ends with an error."""
        opening = asyncio.ensure_future(_create(path))
        try:
            with self._failures.mapped("write", path.name):
                file = await _unbroken(opening)
            yield file
        except BaseException:
            if not opening.cancelled() and opening.exception() is None:
                await _discard(opening.result(), path)
            raise


async def _unbroken(work: Awaitable[_T]) -> _T:
    """Await work in a thread to its end even if cancelled meanwhile: a thread cannot be stopped half-way."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def _create(path: Path) -> Any:
    return await aiofiles.open(path, "xb")


async def _finish_file(file: Any, sync_files: bool) -> None:
    await file.flush()
    if sync_files:
        await _fsync(file.fileno())
    await file.close()


async def _discard(file: Any, path: Path) -> None:
    """Close and remove a partial file; what made it partial is raised, not what fails here."""
    with suppress(OSError):
        await _unbroken(file.close())
    with suppress(OSError):
        await _unbroken(_unlink(path, missing_ok=True))


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_path(directory: Path) -> None:
    """Sync a directory's entries and those that lead to it: a save that died, or the caller, may just have made them.

    Where this user may not write, or beyond a mount point, nothing was made.
    """
    directory = directory.resolve()
    _sync_directory(directory)
    for inner, outer in zip((directory, *directory.parents), directory.parents, strict=False):
        if os.path.ismount(inner) or not os.access(outer, os.R_OK | os.W_OK):
            return
        _sync_directory(outer)


@aiofiles.os.wrap
def _make_directory(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)


@aiofiles.os.wrap
def _replace(path: Path, data: bytes, sync_files: bool) -> None:
    if sync_files:
        _sync_path(path.parent)
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            if sync_files:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync_files:
        _sync_directory(path.parent)


@aiofiles.os.wrap
def _read_range(path: Path, start: int, stop: int) -> bytes:
    """Open, read and close in one go, so that a range costs one trip through a thread."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _pread(descriptor, start, stop)
    finally:
        os.close(descriptor)


def _pread(descriptor: int, start: int, stop: int) -> bytes:
    """Read until `stop` or the end of the file; one call may return less than it was asked for."""
    parts = []
    while start < stop and (part := os.pread(descriptor, stop - start, start)):
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


@aiofiles.os.wrap
def _file_size(path: Path) -> int:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(errno.ENOENT, "not a regular file", str(path))
    return status.st_size


@aiofiles.os.wrap
def _list_files(directory: Path) -> dict[str, int]:
    """Return name and size of each regular file; one that vanishes while we look was deleted."""
    files = {}
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.is_file():
                    files[entry.name] = entry.stat().st_size
    return files


_fsync = aiofiles.os.wrap(os.fsync)
_read = aiofiles.os.wrap(Path.read_bytes)
_unlink = aiofiles.os.wrap(Path.unlink)
