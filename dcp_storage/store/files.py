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
"""What CIFS, 9p and some FUSE file systems answer; a failing disk answers EIO."""

_told_of: set[int] = set()
"""The file systems, by device, that a warning told of."""


class NewFile:
    """A file that did not exist before, written from its beginning to its end.

    One that is to be synced goes past the page cache where the file system takes that: the cache would cost a copy,
    memory that the training job has better use for, and on virtual machines page faults that outlast the disk. What
    is written that way must be whole pages, in memory and in the file.
    """

    def __init__(self, path: Path, *, sync: bool) -> None:
        self._sync = sync
        self._direct = False
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if sync and _DIRECT:
            with suppress(OSError):  # the file system does not take it
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
                # Memory that begins in a page, a disk of larger pages, or the rest of a write that was cut short.
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._set_direct(False)
        return len(batch)

    def finish(self) -> None:
        """Close; with `sync`, the data is on the disk then (the directory's entry may not be)."""
        if self._sync:
            os.fsync(self._descriptor)
        self._close()

    def discard(self, path: Path) -> None:
        """Close and remove a partial file; what made it partial is raised, not what fails here."""
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
    """Sync the entries of a directory, where its file system can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # it may be written, but not listed
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
    """Sync a directory's entries and those that lead to it: a save that died, or the caller, may just have made them.

    Where this user may not write, or beyond a mount point, nothing was made.
    """
    directory = directory.resolve()
    sync_directory(directory)
    for inner, outer in zip((directory, *directory.parents), directory.parents, strict=False):
        if os.path.ismount(inner) or not os.access(outer, os.R_OK | os.W_OK):
            return
        sync_directory(outer)


def make_directory(directory: Path) -> None:
    """Create a directory and its parents; a commit makes them last.

    What stands there already is not looked at: some parallel file systems say for a while that it is not a directory.
    Where that is true, nothing can be created in it.
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
    """Call what makes a file in a directory; if that is not there, create it and call again.

    On network file systems each look at a directory is a request, and mostly it is there.
    """
    try:
        return make(*args, **kwargs)
    except FileNotFoundError:
        make_directory(directory)
        return make(*args, **kwargs)


def check_replaceable(path: Path) -> bool:
    """Return whether a file is there, that may be read and replaced.

    Raises:
        OSError: It may not be, or no file may be made in its directory.
    """
    directory = path.parent
    there = next((outer for outer in (directory, *directory.parents) if outer.exists()), directory)
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        why = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(why, f"{os.strerror(why)}: no file may be made in this directory", str(there))
    try:
        with path.open("rb"):
            status, around = path.stat(), directory.stat()
    except FileNotFoundError:
        return False
    if around.st_mode & stat.S_ISVTX and os.geteuid() not in {0, status.st_uid, around.st_uid}:
        raise PermissionError(errno.EPERM, "in a sticky directory only its owner may replace it", str(path))
    return True


def replace_file(path: Path, data: bytes, *, sync: bool) -> None:
    """Write a temporary file beside the path, and rename it over the path."""
    _publish(path, data, Path.replace, sync=sync)


def create_file(path: Path, data: bytes, *, sync: bool) -> None:
    """Write a temporary file beside the path, and link it to the path.

    Raises:
        FileExistsError: Something is there.
    """
    _publish(path, data, _link, sync=sync)


def _link(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError as error:
        says = "this file system has no hard links, without which nothing can be created atomically: use overwrite=True"
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
        with suppress(OSError):  # what made it fail is raised, not what fails here
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
    """Return the names of the directories in a directory; none where it is not there."""
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        return [entry.name for entry in entries if entry.is_dir()]
    return []


def stat_files(directory: Path) -> dict[str, os.stat_result]:
    """Return name and status of each regular file; one that vanishes while we look was deleted."""
    files = {}
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.is_file():
                    files[entry.name] = entry.stat()
    return files


_DIRECTORY_STAYS = {errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.EACCES, errno.EPERM}
"""Something is in it, it is in use, or whoever may write in it may not remove it: an empty directory does no harm."""


def remove_directory(directory: Path) -> None:
    """Remove a directory if it is empty, and may be removed."""
    try:
        directory.rmdir()
    except OSError as error:
        if error.errno not in _DIRECTORY_STAYS:
            raise
