"""From a path or URL to its store: the only place that looks at the protocol."""

import logging
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fsspec import get_filesystem_class
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from dcp_storage.errors import ConfigError
from dcp_storage.store.base import Store
from dcp_storage.store.local import LocalStore
from dcp_storage.store.redact import strip_userinfo
from dcp_storage.store.remote import RemoteStore
from dcp_storage.store.threaded import MemoryStore, ThreadedStore

logger = logging.getLogger(__name__)

_LOCAL_URLS = ("file:/", "local:/")


def open_store(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None, *, sync_files: bool = True
) -> Store:
    """Return the store for a path or URL; it connects, and closes its connections, as an async context manager.

    Args:
        path: A local path, or a URL of any protocol that fsspec knows.
        storage_options: Options of the URL's fsspec file system. They are not changed and not kept by fsspec.
        sync_files: Whether local files are synced to the disk (see `LocalStore`).

    Raises:
        ConfigError: The path is empty or a URL that lost a slash, the protocol is unknown, its fsspec implementation
            is not installed or takes other options, or options are given for a local path.
    """
    url = os.fspath(path)
    _check_path(url)
    protocol, separator, _ = url.partition("://")
    if isinstance(path, os.PathLike) or not separator or url.startswith(_LOCAL_URLS):
        return _open_local(path, storage_options, sync_files=sync_files)
    return _open_remote(url, protocol, storage_options or {})


def _check_path(url: str) -> None:
    """Refuse what would be a local path by mistake.

    Raises:
        ConfigError: It is empty, or a URL that lost a slash, as `Path("s3://bucket/run")` does.
    """
    if not url:
        raise ConfigError("the checkpoint's path is empty; give a directory or a URL")
    protocol, separator, rest = url.partition(":/")
    if separator and not rest.startswith("/") and protocol in known_implementations.keys() - {"file", "local"}:
        raise ConfigError(
            f"{strip_userinfo(url)} is a URL that lost a slash: give {protocol}://{rest} as a str, since a path object "
            "keeps one slash only"
        )


def resolve(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return a path or URL that means the same wherever the program changes its directory to: a local one absolute."""
    url = os.fspath(path)
    _check_path(url)
    if isinstance(path, os.PathLike):
        return Path(path).absolute()
    if url.startswith(_LOCAL_URLS):
        return _local_path(url)
    return path if "://" in url else str(Path(url).absolute())


def _local_path(url: str) -> str:
    return str(LocalFileSystem._strip_protocol(url))  # noqa: SLF001


def _open_local(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None, *, sync_files: bool
) -> LocalStore:
    if storage_options:
        raise ConfigError(f"storage_options are given, but {os.fspath(path)} is a local path, which takes none")
    if isinstance(path, str) and path.startswith(_LOCAL_URLS):
        path = _local_path(path)
    return LocalStore(path, sync_files=sync_files)


def _open_remote(url: str, protocol: str, storage_options: Mapping[str, Any]) -> Store:
    shown = strip_userinfo(url)
    if "::" in protocol:
        raise ConfigError(f"{shown} chains file systems with '::'; give the URL of the storage itself")
    try:
        fs_class = get_filesystem_class(protocol)
    except ValueError as error:
        raise ConfigError(f"{shown}: fsspec knows no protocol {protocol!r}; install the package for it") from error
    except ImportError as error:
        raise ConfigError(f"{shown}: the fsspec file system for {protocol!r} is not installed: {error}") from error
    return _store_class(protocol, fs_class)(url, fs_class, storage_options)


@cache
def _warn_untried(protocol: str) -> None:
    logger.warning(
        "%s:// was never tried with dcp_storage: a commit is only as atomic as what fsspec makes of it, so kill a save "
        "and load what is there before you rely on it",
        protocol,
    )


def _store_class(protocol: str, fs_class: Any) -> type[RemoteStore]:
    if protocol in {"s3", "s3a"}:
        from dcp_storage.store.s3 import S3Store  # noqa: PLC0415 - botocore takes long to import

        return S3Store
    if protocol == "memory":
        return MemoryStore
    _warn_untried(protocol)
    return RemoteStore if fs_class.async_impl else ThreadedStore
