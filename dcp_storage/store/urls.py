"""The paths that callers give: strings, path objects, path objects that are URLs, URLs that lost a slash."""

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations, registry

from dcp_storage.errors import ConfigError
from dcp_storage.store.redact import strip_userinfo

Address = str | os.PathLike[str]
"""A local path or a URL, as a string or a path object."""

_LOCAL_PROTOCOLS = {"file", "local"}
_VERSION = re.compile(r"[?&]version_?id=", re.IGNORECASE)


def url_of(address: object) -> str:
    """Return a path or URL as a string.

    Path objects of other libraries (`UPath`, `CloudPath`) give their URL, although `os.fspath` returns a file in a
    cache for some.

    Raises:
        ConfigError: It is neither a string nor a path object, is empty, lost a slash (as `Path("s3://bucket/run")`
            does), or names one version of an object.
    """
    url = _text_of(address)
    if not url:
        raise ConfigError("the checkpoint's path is empty; give a directory or a URL")
    protocol, separator, rest = url.partition(":/")
    if (
        separator
        and not rest.startswith("/")
        and protocol.lower() in {*known_implementations, *registry} - _LOCAL_PROTOCOLS
    ):
        raise ConfigError(
            f"{strip_userinfo(url)} is a URL that lost a slash: give {protocol}://{rest} as a str, since a path object "
            "keeps one slash only"
        )
    if "://" in url and _VERSION.search(url):
        raise ConfigError(
            f"{strip_userinfo(url)} names one version of an object, but a checkpoint is many objects: leave it out"
        )
    return url


def options_of(address: object) -> Mapping[str, Any]:
    """Return the storage options that a path object carries, as `UPath` does."""
    options = getattr(address, "storage_options", None)
    return options if isinstance(options, Mapping) else {}


def is_local(url: str) -> bool:
    """Return whether a string is a path on this machine's file systems, possibly written as a URL."""
    protocol, separator, _ = url.partition("://")
    return not separator or protocol in _LOCAL_PROTOCOLS


def local_path(url: str) -> str:
    """Return the absolute path of any path that fsspec takes for a local one: `file:/x`, `~/x`, relative paths."""
    return str(LocalFileSystem._strip_protocol(url))  # noqa: SLF001


def resolve(address: Address) -> str | Path:
    """Return an address that does not depend on the working directory: a local path is made absolute.

    Raises:
        ConfigError: As `url_of`.
    """
    url = url_of(address)
    if not is_local(url):
        return url
    return Path(local_path(url)) if isinstance(address, PurePath) else local_path(url)


def _text_of(address: object) -> str:
    if isinstance(address, str):
        return address
    if not isinstance(address, PurePath):
        as_uri = getattr(address, "as_uri", None)
        for text in (str(address), as_uri() if callable(as_uri) else ""):
            if isinstance(text, str) and "://" in text and (callable(as_uri) or isinstance(address, os.PathLike)):
                return text
    try:
        path = os.fspath(address)  # type: ignore[call-overload]
    except TypeError:
        path = None
    if not isinstance(path, str):
        raise ConfigError(f"the checkpoint's path is {address!r}; give a str or a path object")
    return path
