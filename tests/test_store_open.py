"""From path or URL to store, and what its errors may show."""

import pickle
import traceback
from pathlib import Path

import pytest

from dcp_storage import AsyncStorageWriter
from dcp_storage.errors import ConfigError, StoreError
from dcp_storage.store.failures import Failures
from dcp_storage.store.local import LocalStore
from dcp_storage.store.open import open_store
from dcp_storage.store.redact import mask, secrets_in, strip_userinfo
from dcp_storage.store.remote import RemoteStore
from dcp_storage.store.s3 import S3Store
from dcp_storage.store.threaded import MemoryStore


@pytest.mark.parametrize("path", ["/data/run", Path("/data/run"), "file:///data/run", "local:///data/run/"])
def test_local(path):
    store = open_store(path, None)
    assert isinstance(store, LocalStore)
    assert store.url == "/data/run"


@pytest.mark.parametrize("path", [Path("s3://bucket/run"), "s3:/bucket/run", Path("gs://b/x"), Path("memory://x")])
def test_urls_that_lost_a_slash_are_refused(path):
    """Below `./s3:/bucket` nobody would look for a checkpoint."""
    with pytest.raises(ConfigError, match="lost a slash: give"):
        open_store(path)
    with pytest.raises(ConfigError, match="lost a slash"):
        AsyncStorageWriter(path)


@pytest.mark.parametrize("path", ["a:/b", "run:/x", Path("C:/x"), "step:1", "x/s3:/y"])
def test_paths_with_colons_are_paths(path):
    assert isinstance(open_store(path), LocalStore)


def test_no_path():
    with pytest.raises(ConfigError, match="empty"):
        open_store("")


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("s3://bucket/run", S3Store),
        ("s3a://bucket/run", S3Store),
        ("memory://run", MemoryStore),
        ("http://host/run", RemoteStore),
    ],
)
def test_remote(url: str, kind: type):
    store = open_store(url)
    assert type(store) is kind
    assert store.url == url


@pytest.mark.parametrize("url", ["nonsense://user:pw@host/x", "simplecache::s3://bucket/x"])
def test_unknown_protocol(url: str):
    with pytest.raises(ConfigError, match=r"nonsense://host/x.*install|simplecache::s3://bucket/x.*storage") as caught:
        open_store(url)
    assert "pw" not in str(caught.value)


def test_missing_implementation(monkeypatch):
    from fsspec.registry import known_implementations

    entry = {"class": "no_such_module.FileSystem", "err": "Please install no-such-package"}
    monkeypatch.setitem(known_implementations, "absent", entry)
    with pytest.raises(ConfigError, match=r"absent://host/x.*Please install no-such-package"):
        open_store("absent://host/x")


@pytest.mark.parametrize("path", ["/data/run", Path("/data/run"), "file:///data/run"])
def test_options_for_a_local_path(path):
    with pytest.raises(ConfigError, match=r"storage_options.*/data/run"):
        open_store(path, {"key": "x"})
    assert isinstance(open_store(path, {}), LocalStore)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sftp://user:pw@host:22/x", "sftp://host:22/x"),
        ("sftp://user@host/x", "sftp://host/x"),
        ("sftp://user:p@ss:w@host/x", "sftp://host/x"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("/local/path@x", "/local/path@x"),
    ],
)
def test_userinfo(url: str, shown: str):
    assert strip_userinfo(url) == shown


def test_secrets_in_options():
    options = {
        "key": "AK",
        "client_kwargs": {"aws_secret_access_key": "SK", "region_name": "eu-1"},
        "token": {"private_key": "PEM"},
        "password": ["one", "two"],
        "config_kwargs": {"proxies": {"https": "http://me:proxy-pw@proxy:80"}},
        "anon": False,
        "connect_timeout": 5,
        "empty_secret": "",
    }
    secrets = secrets_in("sftp://user:p%40ss@host/x", options)
    assert secrets == {"AK", "SK", "PEM", "one", "two", "me:proxy-pw", "proxy-pw", "user:p%40ss", "p%40ss", "p@ss"}
    assert mask("AK sent p@ss in eu-1 to http://a:b@host/", secrets) == "*** sent *** in eu-1 to http://host/"


def raise_mapped(failures: Failures, error: Exception, cause: Exception | None = None):
    with failures.mapped("write", "name"):
        raise error from cause


def test_cause_with_a_secret_is_not_chained():
    secret = "hid" + "den"
    failures = Failures("s3://bucket/x", frozenset({secret}))
    with pytest.raises(StoreError) as caught:
        raise_mapped(failures, OSError("on top"), RuntimeError(f"deep down: {secret}"))
    assert caught.value.__cause__ is None
    assert secret not in "".join(traceback.format_exception(caught.value))
    assert "OSError: on top" in str(caught.value)


def test_cause_without_a_secret_is_chained():
    with pytest.raises(StoreError, match="cannot write /data/name: TimeoutError") as caught:
        raise_mapped(Failures("/data"), TimeoutError())
    assert isinstance(caught.value.__cause__, TimeoutError)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.url, copy.object_name) == (str(caught.value), "/data", "name")
