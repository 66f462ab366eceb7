"""Blocking calls on local files; `local.py` runs each in a thread."""

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from dcp_storage.format.names import temporary_name
from dcp_storage.store.base import PAGE_BYTES, Batch

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

_DIRECT = getattr(os, "O_DIRECT", 0)

_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP}
"""The errors of CIFS, 9p and some FUSE file systems; a failing disk returns EIO."""

_told_of: set[int] = set()
"""The devices of file systems for which a warning was logged."""


class NewFile:
    """A new file, written from beginning to end.

    If it is to be synced, and the file system supports that, it is written with direct I/O: the page cache would cost a
    copy, memory that the training job can use better, and on virtual machines page faults that take longer than the
    disk. Direct writes must be whole pages, in memory and in the file.
    """

    def __init__(self, path: Path, *, sync: bool) -> None:
        self._sync = sync
        self._direct = False
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if sync and _DIRECT:
            with suppress(OSError):  # the file system does not support it
                self._set_direct(True)

    def append(self, batch: Batch) -> int:
        """Write a batch, and return its size in bytes."""
        if len(batch) % PAGE_BYTES:
            self._set_direct(False)
        rest = memoryview(batch)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                # Memory that is not page-aligned, a disk with larger pages, or the rest of a partial write.
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._set_direct(False)
        return len(batch)

    def finish(self) -> None:
        """Close the file; with `sync`, its data is then on disk (its directory entry may not be)."""
        if self._sync:
            os.fsync(self._descriptor)
        self._close()

    def discard(self, path: Path) -> None:
        """Close and remove a partial file, ignoring errors: the original one is raised."""
        with suppress(OSError):
            self._close()
        with suppress(OSError):
            path.unlink(missing_ok=True)

    def _set_direct(self, direct: bool) -> None:
        if direct != self._direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags ^ _DIRECT)
            self._direct = direct

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Sync the entries of a directory, if its file system supports that."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # it is writable, but not listable
        os.sync()
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
        _warn_of_directory_sync(os.fstat(descriptor).st_dev, directory)
    finally:
        os.close(descriptor)


def _warn_of_directory_sync(device: int, directory: Path) -> None:
    if device not in _told_of:
        _told_of.add(device)
        says = "its file system does not sync directories, so a crash of the machine may lose the names of new files"
        logger.warning("%s: %s", directory, says)


def sync_path(directory: Path) -> None:
    """Sync the entries of a directory and its parents: a save that died, or the caller, may just have created them.

    Nothing was created where this user may not write, or beyond a mount point.
    """
    directory = directory.resolve()
    sync_directory(directory)
    for inner, outer in zip((directory, *directory.parents), directory.parents, strict=False):
        if os.path.ismount(inner) or not os.access(outer, os.R_OK | os.W_OK):
            return
        sync_directory(outer)


def make_directory(directory: Path) -> None:
    """Create a directory and its parents; a commit makes them durable.

    An existing path is not checked: some parallel file systems report for a while that it is not a directory. If that
    is true, no file can be created in it.
    """
    with suppress(FileExistsError):
        try:
            directory.mkdir()
        except FileNotFoundError:
            if directory.parent == directory:
                raise
            make_directory(directory.parent)
            directory.mkdir()


def in_directory(directory: Path, make: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function that creates a file in a directory; if the directory is missing, create it and call again.

    On network file systems each check of a directory is a request, and the directory usually exists.
    """
    try:
        return make(*args, **kwargs)
    except FileNotFoundError:
        make_directory(directory)
        return make(*args, **kwargs)


def check_replaceable(path: Path) -> bool:
    """Return whether a file exists; if so, it may be read and replaced.

    Raises:
        OSError: It may not be, or no file may be created in its directory.
    """
    directory = path.parent
    there = next((outer for outer in (directory, *directory.parents) if outer.exists()), directory)
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "this is a file: pass a directory", str(there))
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        why = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(why, f"{os.strerror(why)}: no file may be created in this directory", str(there))
    try:
        with path.open("rb"):
            status, around = path.stat(), directory.stat()
    except FileNotFoundError:
        return False
    if around.st_mode & stat.S_ISVTX and os.geteuid() not in {0, status.st_uid, around.st_uid}:
        raise PermissionError(errno.EPERM, "in a sticky directory only its owner may replace it", str(path))
    return True


def replace_file(path: Path, data: bytes, *, sync: bool) -> None:
    """Write a temporary file next to the path, and rename it over the path."""
    _publish(path, data, Path.replace, sync=sync)


def create_file(path: Path, data: bytes, *, sync: bool) -> None:
    """Write a temporary file next to the path, and hard-link it to the path.

    Raises:
        FileExistsError: The path exists.
    """
    _publish(path, data, _link, sync=sync)


def _link(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError as error:
        says = "this file system has no hard links, which atomic creation requires: use overwrite=True"
        raise OSError(error.errno, f"{error.strerror}: {says}") from error
    temporary.unlink()


def _publish(path: Path, data: bytes, publish: Callable[[Path, Path], object], *, sync: bool) -> None:
    if sync:
        sync_path(path.parent)
    temporary = path.with_name(temporary_name(path.name))
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        with suppress(OSError):  # the original error is raised
            temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_directory(path.parent)


def file_size(path: Path) -> int:
    """Return the size of a regular file in bytes."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(errno.ENOENT, "not a regular file", str(path))
    return status.st_size


def list_directories(directory: Path) -> list[str]:
    """Return the names of a directory's subdirectories; none if it does not exist."""
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        return [entry.name for entry in entries if entry.is_dir()]
    return []


def stat_files(directory: Path) -> dict[str, os.stat_result]:
    """Return the name and status of each regular file; one that vanishes meanwhile was deleted."""
    files = {}
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.is_file():
                    files[entry.name] = entry.stat()
    return files


_DIRECTORY_STAYS = {errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.EACCES, errno.EPERM}
"""It is not empty, is in use, or may be written to but not removed: an empty directory does no harm."""


def remove_directory(directory: Path) -> None:
    """Remove a directory if it is empty and may be removed."""
    try:
        directory.rmdir()
    except OSError as error:
        if error.errno not in _DIRECTORY_STAYS:
            raise
