"""From path or URL to store, and what its errors may show."""

import os
import pickle
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fsspec import AbstractFileSystem
from s3fs import S3FileSystem

from dcp_storage import AsyncStorageReader, AsyncStorageWriter
from dcp_storage.errors import ConfigError, StoreError
from dcp_storage.prune import prune
from dcp_storage.store.failures import Failures
from dcp_storage.store.local import LocalStore
from dcp_storage.store.open import open_store
from dcp_storage.store.redact import mask, secrets_in, strip_userinfo
from dcp_storage.store.remote import RemoteStore
from dcp_storage.store.s3 import S3Store
from dcp_storage.store.threaded import MemoryStore, ThreadedStore
from dcp_storage.verify import verify


@pytest.mark.parametrize("path", ["/data/run", Path("/data/run"), "file:///data/run", "local:///data/run/"])
def test_local(path):
    store = open_store(path, None)
    assert isinstance(store, LocalStore)
    assert store.url == "/data/run"


@pytest.mark.parametrize(
    "path", [Path("s3://bucket/run"), "s3:/bucket/run", Path("gs://b/x"), Path("memory://x"), "S3:/b", "az:/b/x"]
)
def test_urls_that_lost_a_slash_are_refused(path):
    """Below `./s3:/bucket` nobody would look for a checkpoint."""
    with pytest.raises(ConfigError, match="lost a slash: give"):
        open_store(path)
    with pytest.raises(ConfigError, match="lost a slash"):
        AsyncStorageWriter(path)


@pytest.mark.parametrize("path", [None, b"/data/run", b"s3://b/run", 7, ["s3://b/run"], object(), ("a", "b")])
def test_what_is_no_path(path):
    for opened in (open_store, AsyncStorageWriter, AsyncStorageReader, verify, prune):
        with pytest.raises(ConfigError, match="path is .*; give a str or a path object"):
            opened(path)
    assert not AsyncStorageWriter.validate_checkpoint_id(path)


@pytest.mark.parametrize("path", ["", Path(), "."])
def test_the_current_directory_is_one_if_it_is_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if path == "":
        with pytest.raises(ConfigError, match="empty"):
            open_store(path)
    else:
        assert open_store(path).url == str(tmp_path)


@pytest.mark.parametrize(
    "path", ["~/run", Path("~/run"), "file:~/run", "file:/home/me/run", "/home/me/run", "local:/home/me/run/"]
)
def test_local_paths_as_fsspec_takes_them(path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert open_store(path).url == "/home/me/run"
    assert str(AsyncStorageWriter(path).checkpoint_id) == "/home/me/run"


class Cached(os.PathLike):
    """As cloudpathlib's: `os.fspath` is a file in a cache."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __fspath__(self) -> str:
        raise AssertionError("it would download")

    def __str__(self) -> str:
        return self.url


class Universal:
    """As universal_pathlib's: no `os.PathLike`, with options of its own."""

    def __init__(self, url: str, **options: object) -> None:
        self.url, self.storage_options = url, options

    def as_uri(self) -> str:
        return self.url


@pytest.mark.parametrize("path", [Cached("memory://box/run"), Universal("memory://box/run")])
def test_a_path_object_that_stands_for_a_url(path):
    assert isinstance(open_store(path), MemoryStore)
    writer = pickle.loads(pickle.dumps(AsyncStorageWriter(path)))
    assert writer.checkpoint_id == "memory://box/run"
    state = {"w": torch.arange(5)}
    dcp.save(state, storage_writer=AsyncStorageWriter("memory://other"), checkpoint_id=path, no_dist=True)
    found = {"w": torch.zeros(5, dtype=torch.int64)}
    dcp.load(found, storage_reader=AsyncStorageReader(path), no_dist=True)
    assert torch.equal(found["w"], state["w"])
    assert verify(path).sound


def test_its_options_count_where_none_are_given():
    path = Universal("s3://box/run", key="theirs", secret="s")
    assert open_store(path)._options["key"] == "theirs"
    assert open_store(path, {"key": "given"})._options["key"] == "given"
    writer = AsyncStorageWriter(path, storage_options={"secret": "given"})
    assert dict(writer._location.storage_options) == {"key": "theirs", "secret": "given"}


@pytest.mark.parametrize(
    "url", ["generic://b/x", "simplecache://b/x", "zip://x", "reference://x", "dir://x", "data://x"]
)
def test_what_is_no_storage(url: str):
    with pytest.raises(ConfigError, match="give the URL of the storage itself"):
        open_store(url)


class AnotherForS3(AbstractFileSystem):
    protocol = "s3"


class OfS3fs(S3FileSystem):
    protocol = "mine"


def test_stores_are_chosen_by_class(monkeypatch):
    registered = {"s3": AnotherForS3, "mine": OfS3fs}
    monkeypatch.setattr("dcp_storage.store.open.get_filesystem_class", registered.__getitem__)
    assert type(open_store("s3://b/x")) is ThreadedStore
    assert type(open_store("mine://b/x")) is S3Store


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
