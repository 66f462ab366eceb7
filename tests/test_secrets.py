"""No credential is shown: by no writer, reader, `verify` or `prune`, on no store, whatever fails."""

import json
import logging
import pickle
import traceback
import uuid
from contextlib import contextmanager
from urllib.parse import quote

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
import zstandard
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from torch.distributed.checkpoint import CheckpointException

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, cli
from dcp_storage.errors import ConfigError, DcpStorageError
from dcp_storage.prune import prune
from dcp_storage.store.redact import mask, secrets_in, strip_userinfo
from dcp_storage.verify import verify

PASSWORD, KEY, TOKEN, DEEP, BINARY = (f"{name}-{uuid.uuid4().hex}" for name in ("pw", "key", "token", "deep", "binary"))
SECRETS = (PASSWORD, KEY, TOKEN, DEEP, BINARY)
OPTIONS = {
    "secret": KEY,
    "token": TOKEN,
    "client_kwargs": {"headers": {"Authorization": [f"Bearer {DEEP}"]}},
    "password": BINARY.encode(),
}
OPERATIONS = ("open", "pipe", "cat", "info", "ls", "rm")
STATE = {"w": torch.arange(100.0), "step": 3}


class Blocking(MemoryFileSystem):
    """A server whose every error tells all that it knows, and whose client keeps what it was given."""

    protocol = "leaky"
    store, pseudo_dirs = {}, [""]
    failing = ""

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.partition("://")[2].rpartition("@")[2].strip("/") if "://" in path else path

    def __init__(self, **options):
        super().__init__(**options)
        self.options = options
        self._fail("open")

    def _fail(self, operation):
        if operation == type(self).failing:
            try:
                raise RuntimeError(f"as https://me:{PASSWORD}@host/?sig={TOKEN}", {"args": self.options})
            except RuntimeError as error:
                raise PermissionError(13, f"denied to {self.options}", KEY) from error

    def pipe_file(self, path, value, **kwargs):
        self._fail("pipe")
        return super().pipe_file(path, value, **kwargs)

    def mv(self, path1, path2, **kwargs):
        self.store[path2] = self.store.pop(path1)

    def info(self, path, **kwargs):
        self._fail("info")
        return super().info(path, **kwargs)

    def ls(self, path, detail=True, **kwargs):
        self._fail("ls")
        return super().ls(path, detail=detail, **kwargs)

    def rm_file(self, path):
        self._fail("rm")
        return super().rm_file(path)

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._fail("cat")
        return super().cat_file(path, start=start, end=end, **kwargs)


class Asynchronous(AsyncFileSystem):
    """The same, with coroutines."""

    protocol = "leaky"
    failing = ""
    _strip_protocol = Blocking._strip_protocol

    def __init__(self, **options):
        super().__init__(**{key: options.pop(key) for key in ("asynchronous", "loop") if key in options})
        Blocking.failing = type(self).failing if type(self).failing == "open" else ""
        self.blocking = Blocking(**options)
        Blocking.failing = type(self).failing

    async def _pipe_file(self, path, value, **kwargs):
        self.blocking.pipe_file(path, value)

    async def _cat_file(self, path, start=None, end=None, **kwargs):
        return self.blocking.cat_file(path, start, end)

    async def _info(self, path, **kwargs):
        return self.blocking.info(path)

    async def _ls(self, path, detail=True, **kwargs):
        return self.blocking.ls(path, detail=detail)

    async def _rm_file(self, path, **kwargs):
        self.blocking.rm_file(path)


@pytest.fixture(params=[Blocking, Asynchronous], ids=["blocking", "asynchronous"])
def leaky(request):
    """The URL of an empty prefix, and the class to make fail."""
    fsspec.register_implementation("leaky", request.param, clobber=True)
    request.param.failing = Blocking.failing = ""
    yield f"leaky://me:{PASSWORD}@host/{uuid.uuid4().hex}", request.param
    request.param.failing = Blocking.failing = ""


def save(url):
    dcp.save(STATE, storage_writer=AsyncStorageWriter(url, storage_options=OPTIONS))


def save_once(url):
    dcp.save(STATE, storage_writer=AsyncStorageWriter(url, storage_options=OPTIONS, overwrite=False))


def load(url):
    state = {"w": torch.zeros(100), "step": None}
    dcp.load(state, storage_reader=AsyncStorageReader(url, storage_options=OPTIONS), planner=ShardedLoadPlanner())


CALLS = [
    save,
    save_once,
    load,
    lambda url: verify(url, storage_options=OPTIONS),
    lambda url: prune(url, storage_options=OPTIONS),
]


def errors_of(call, url):
    """Return what a call raised, and the typed errors within."""
    try:
        call(url)
    except CheckpointException as error:
        return [error, *(cause for cause, _ in error.failures.values())]
    except DcpStorageError as error:
        return [error]
    return []


def texts_of(error):
    yield str(error)
    yield repr(error)
    yield repr(error.args)
    yield repr(vars(error))
    yield "".join(traceback.format_exception(error))
    if isinstance(error, DcpStorageError):
        yield repr(pickle.dumps(error))


def assert_silent(*texts):
    for text in texts:
        assert not [secret for secret in SECRETS if secret in text], text


@pytest.mark.parametrize("operation", OPERATIONS)
def test_whatever_fails(leaky, caplog, capfd, operation):
    url, fs_class = leaky
    caplog.set_level(logging.DEBUG)
    save(url)
    fs_class.failing = Blocking.failing = operation
    raised = [error for call in CALLS for error in errors_of(call, url)]
    # A failing deletion costs nothing but a warning.
    assert raised or "not all objects of the replaced checkpoint were deleted" in caplog.text
    assert not [error for error in raised if not isinstance(error, CheckpointException | DcpStorageError)]
    for error in raised:
        assert_silent(*texts_of(error))
    assert_silent(caplog.text, *capfd.readouterr())


def test_when_all_is_well(leaky, caplog):
    url, _ = leaky
    caplog.set_level(logging.DEBUG)
    writer, reader = (make(url, storage_options=OPTIONS) for make in (AsyncStorageWriter, AsyncStorageReader))
    for call in CALLS:
        errors_of(call, url)
    for one in (writer, reader):
        copy = pickle.loads(pickle.dumps(one))
        assert_silent(repr(one), repr(copy), repr(vars(copy)), str(one.checkpoint_id), repr(one._location))
    writer.set_up_storage_writer(is_coordinator=True)
    assert_silent(repr(writer._begun()), repr(writer.storage_meta()))
    stored = [bytes(file.getbuffer()) for path, file in Blocking.store.items() if url.rpartition("/")[2] in path]
    manifests = [zstandard.decompress(data) for data in stored if b"dcp_storage" in zstandard.decompress(data)[:100]]
    assert manifests
    assert_silent(*(data.decode() for data in manifests), *map(repr, stored), caplog.text)


def test_what_is_damaged_is_named_without_them(leaky):
    url, _ = leaky
    save(url)
    for path, file in Blocking.store.items():
        if url.rpartition("/")[2] in path and not path.endswith(".metadata"):
            file.getbuffer()[9] ^= 1
    raised = errors_of(load, url)
    assert raised
    for error in raised:
        assert_silent(*texts_of(error))
    found = verify(url, storage_options=OPTIONS)
    assert not found.sound
    assert_silent(repr(found))


def test_an_observer_is_told_no_credential(leaky):
    url, _ = leaky
    seen = []

    @contextmanager
    def watch(*told):
        seen.append(repr(told))
        yield lambda *told: seen.append(repr(told))

    dcp.save(STATE, storage_writer=AsyncStorageWriter(url, storage_options=OPTIONS, observer=watch))
    verify(url, storage_options=OPTIONS, observer=watch)
    assert any("leaky://host/" in text for text in seen)
    assert_silent(*seen)


@pytest.mark.parametrize(
    "url",
    [
        f"nosuch://me:{PASSWORD}@host/x",
        f"simplecache::s3://me:{PASSWORD}@bucket/x",
        f"s3://{KEY}:{PASSWORD}@bucket/x",
        f"https://host/x?signature={TOKEN}",
        f"abfs://c@host/x?sv=1&sig={TOKEN}&token={KEY}",
    ],
)
def test_credentials_in_urls(url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    options = {"config_kwargs": {"retries": {"total_max_attempts": 1}}, "anon": True} if url.startswith("s3") else {}
    for call in (verify, prune):
        with pytest.raises(DcpStorageError) as raised:
            call(url, storage_options=options)
        assert_silent(*texts_of(raised.value))


def test_options_for_a_local_path_are_not_shown(tmp_path):
    with pytest.raises(ConfigError) as raised:
        AsyncStorageWriter(tmp_path, storage_options=OPTIONS)
    assert_silent(*texts_of(raised.value))


def test_the_command_line(leaky, capsys):
    url, fs_class = leaky
    fs_class.failing = Blocking.failing = "cat"
    options = json.dumps({key: value for key, value in OPTIONS.items() if isinstance(value, str)})
    assert cli.main(["verify", url, "--storage-options", options]) == 2
    captured = capsys.readouterr()
    assert captured.err
    assert_silent(captured.out, captured.err)


@pytest.mark.parametrize("secret", ['it\'s \\ "odd"', "a b&c=d/e", "Bearer abcdefgh", "-----BEGIN\nabcdefgh\n-----END"])
def test_forms_of_secrets(secret):
    secrets = secrets_in("", {"password": secret})
    for text in (secret, repr(secret), repr({"a": secret}), quote(secret), quote(secret, safe=""), secret.split()[-1]):
        masked = mask(f"denied: {text}", secrets)
        assert secret not in masked
        assert "abcdefgh" not in masked
        assert "oddly" not in masked
        assert "c%3Dd" not in masked


def test_parameters_of_urls():
    url = "https://host/x?a=b&sig=S1%2F&X-Amz-Signature=S2#f"
    assert strip_userinfo(url) == "https://host/x?a=b&sig=***&X-Amz-Signature=***#f"
    assert secrets_in(url, {}) == {"S1%2F", "S1/", "S2"}
    assert mask("it said S1/ and a=b", secrets_in(url, {})) == "it said *** and a=b"
    assert strip_userinfo("s3://bucket/a?design=1&step=2") == "s3://bucket/a?design=1&step=2"


def test_short_secrets_do_not_mask_words():
    text = "an unexpected keyword argument of a memo"
    assert mask(text, secrets_in("s3://a:n@host", {"key": "a", "secret": "me", "token": "key"})) == text
    assert mask("the key is key=abc", {"key"}) == "the *** is ***=abc"
    assert mask("keyword", {"key"}) == "keyword"
