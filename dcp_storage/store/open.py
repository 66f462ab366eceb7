"""Opens the store of a path or URL: the only place that depends on the protocol."""

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

from fsspec import get_filesystem_class
from fsspec.implementations.memory import MemoryFileSystem

from dcp_storage.errors import ConfigError
from dcp_storage.store.base import Store
from dcp_storage.store.gcs import GcsStore
from dcp_storage.store.local import LocalStore
from dcp_storage.store.redact import strip_userinfo
from dcp_storage.store.remote import RemoteStore
from dcp_storage.store.threaded import MemoryStore, ThreadedStore
from dcp_storage.store.urls import Address, is_local, local_path, options_of, url_of

logger = logging.getLogger(__name__)

_NO_STORAGE = {
    *("async_wrapper", "asyncwrapper", "blockcache", "cached", "dask", "data", "dir", "filecache", "generic"),
    *("libarchive", "reference", "simplecache", "tar", "zip"),
}
"""fsspec protocols that wrap other storage, or are no storage at all."""

_TRIED = {"adlfs", "obstore"}
"""Packages whose file systems the conformance suite tests. (Those of s3fs and gcsfs have their own stores.)"""


def open_store(path: Address, storage_options: Mapping[str, Any] | None = None, *, sync_files: bool = True) -> Store:
    """Return the store for a path or URL: an async context manager that connects, and closes its connections.

    Args:
        path: A local path, a URL of any protocol that fsspec supports, or a path object for either (`Path`, `UPath`,
            `CloudPath`), whose own storage options apply unless given here.
        storage_options: Options of the URL's fsspec file system. fsspec neither changes nor keeps them.
        sync_files: Whether local files are synced to the disk (see `LocalStore`).

    Raises:
        ConfigError: The path is invalid, or is a URL that lost a slash; the protocol is unknown, or is not storage; its
            fsspec implementation is not installed or has other options; or options are given for a local path.
    """
    url = url_of(path)
    options = {**options_of(path), **(storage_options or {})}
    if not is_local(url):
        return _open_remote(url, options)
    if options:
        raise ConfigError(f"storage_options are given, but {url} is a local path, which takes none")
    return LocalStore(local_path(url), sync_files=sync_files)


def _open_remote(url: str, storage_options: Mapping[str, Any]) -> Store:
    shown = strip_userinfo(url)
    protocol = url.partition("://")[0]
    if "::" in protocol or protocol in _NO_STORAGE:
        raise ConfigError(f"{shown} wraps another file system; give the URL of the storage itself")
    try:
        fs_class = get_filesystem_class(protocol)
    except ValueError as error:
        raise ConfigError(f"{shown}: fsspec has no protocol {protocol!r}; install the package for it") from error
    except ImportError as error:
        raise ConfigError(f"{shown}: the fsspec file system for {protocol!r} is not installed: {error}") from error
    return _store_class(protocol, fs_class)(url, fs_class, storage_options)


@cache
def _warn_untried(protocol: str) -> None:
    logger.warning(
        "%s:// is not tested with dcp_storage: a commit is only as atomic as fsspec makes it, so kill a save and load "
        "what is there before you rely on it",
        protocol,
    )


def _store_class(protocol: str, fs_class: Any) -> type[RemoteStore]:
    """Return the store for an fsspec class: another than s3fs's may be registered for `s3`."""
    packages = {base.__module__.partition(".")[0] for base in fs_class.__mro__}
    if "s3fs" in packages:
        from dcp_storage.store.s3 import S3Store  # noqa: PLC0415 - botocore is slow to import

        return S3Store
    if "gcsfs" in packages:
        return GcsStore
    if issubclass(fs_class, MemoryFileSystem):
        return MemoryStore
    if packages.isdisjoint(_TRIED):
        _warn_untried(protocol)
    return RemoteStore if fs_class.async_impl else ThreadedStore
