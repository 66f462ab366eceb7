"""Stores on S3, against a server in this process."""

import asyncio
import gc
import os
import pickle
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import boto3
import fsspec
import pytest
from aiohttp import ClientConnectionError
from botocore.exceptions import ClientError
from fsspec.config import conf

from dcp_storage import AsyncStorageReader, AsyncStorageWriter
from dcp_storage.errors import ConfigError, ObjectExists, ObjectNotFound, StoreError
from dcp_storage.store import s3_retry
from dcp_storage.store.base import ABSENT, Store
from dcp_storage.store.open import open_store
from dcp_storage.store.s3_requests import Requests
from dcp_storage.testing.place import NAME, Place, batches_of, put, run, sizes
from dcp_storage.testing.suite import StoreSuite

OPERATIONS: dict[str, Callable[[Store], Any]] = {
    "put": lambda store: put(store, NAME, b"x"),
    "commit": lambda store: store.commit(NAME, b"x"),
    "get": lambda store: store.get(NAME),
    "get_range": lambda store: store.get_range(NAME, 0, 1),
    "size": lambda store: store.size(NAME),
    "list": lambda store: store.list(),
    "delete": lambda store: store.delete([NAME]),
}
every_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())


class TestS3Store(StoreSuite):
    creates_at_once = True
    server_in_process = True

    @pytest.fixture
    def place(self, moto_s3: Place) -> Place:
        return moto_s3

    def test_bucket_itself_is_a_prefix(self, place: Place, moto_bucket: str):
        bucket = place.beside(f"s3://{moto_bucket}")
        run(bucket, lambda store: put(store, NAME, b"data"))
        assert run(bucket, sizes) == {NAME: 4}
        assert run(bucket, lambda store: store.get_range(NAME, 1, 3)) == b"at"


@pytest.fixture
def s3_client(moto_options: dict[str, str]) -> Iterator[Any]:
    client = boto3.client(
        "s3",
        endpoint_url=moto_options["endpoint_url"],
        aws_access_key_id=moto_options["key"],
        aws_secret_access_key=moto_options["secret"],
        region_name="us-east-1",
    )
    yield client
    client.close()


def test_large_object_is_one_request(moto_s3: Place, moto_bucket: str, s3_client):
    block = bytes(1 << 20)
    assert run(moto_s3, lambda store: store.put(NAME, batches_of(*[block] * 101))) == 101 << 20
    # The tag of an object put in parts ends with their number.
    assert "-" not in s3_client.head_object(Bucket=moto_bucket, Key=f"runs/step-1/{NAME}")["ETag"]


def test_marker_of_an_empty_directory_is_no_object(moto_s3: Place, moto_bucket: str, s3_client):
    s3_client.put_object(Bucket=moto_bucket, Key="runs/step-1/", Body=b"")
    assert run(moto_s3, sizes) == {}


def test_more_objects_than_one_answer_lists(moto_s3: Place, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    names = [f"aa-0-{n}.distcp.zst" for n in range(10)]

    async def use(store: Store):
        await asyncio.gather(*(put(store, name, b"1") for name in names))
        assert await sizes(store) == dict.fromkeys(names, 1)

    run(moto_s3, use)


@pytest.mark.parametrize("operation", [OPERATIONS[name] for name in OPERATIONS if name != "delete"])
def test_missing_bucket(moto_options: dict[str, str], operation):
    place = Place("s3://no-such-bucket/step-1", dict(moto_options))
    start = time.monotonic()
    with pytest.raises(StoreError, match="s3://no-such-bucket/step-1") as caught:
        run(place, operation)
    assert time.monotonic() - start < 5
    if operation in (OPERATIONS["put"], OPERATIONS["commit"], OPERATIONS["list"]):
        assert not isinstance(caught.value, ObjectNotFound)


@pytest.fixture
def refused_port() -> Iterator[int]:
    """A port that is taken but not listened to."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@every_operation
def test_refused_connection(refused_port: int, operation):
    options = {"key": "k-1234", "secret": "s-1234", "endpoint_url": f"http://127.0.0.1:{refused_port}"}
    place = Place("s3://bucket/step-1", options | {"config_kwargs": {"retries": {"total_max_attempts": 1}}})
    start = time.monotonic()
    with pytest.raises(StoreError, match=r"s3://bucket/step-1.*127\.0\.0\.1") as caught:
        run(place, operation)
    assert time.monotonic() - start < 5
    assert not isinstance(caught.value, ObjectNotFound)


def test_silent_endpoint(silent_port: int):
    limits = {"read_timeout": 0.2, "connect_timeout": 0.2, "retries": {"total_max_attempts": 2}}
    options = {"key": "k-1234", "secret": "s-1234", "endpoint_url": f"http://127.0.0.1:{silent_port}"}
    start = time.monotonic()
    with pytest.raises(StoreError, match=r"s3://bucket/step-1/\.metadata.*imeout"):
        run(Place("s3://bucket/step-1", options | {"config_kwargs": limits}), lambda store: store.get(".metadata"))
    assert time.monotonic() - start < 10


def test_a_server_may_be_given_all_the_time_it_wants(moto_s3: Place):
    place = moto_s3.beside(moto_s3.url, config_kwargs={"read_timeout": None})
    run(place, lambda store: store.commit(NAME, b"data"))
    assert run(place, lambda store: store.get(NAME)) == b"data"


# aiohttp closes a connection once it is flushed, which this one never is.
@pytest.mark.filterwarnings("ignore:.*unclosed.*:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("size", [100, 30_000_000], ids=["asked before the body", "in the body"])
def test_endpoint_that_falls_silent_in_a_put(silent_port: int, monkeypatch, size: int):
    """More than the sockets' buffers hold blocks the client while it writes."""
    monkeypatch.setattr(s3_retry, "_READ_TIMEOUTS", 10)
    limits = {"read_timeout": 0.2, "connect_timeout": 0.2, "retries": {"total_max_attempts": 2}}
    options = {"key": "k-1234", "secret": "s-1234", "endpoint_url": f"http://127.0.0.1:{silent_port}"}
    place = Place("s3://bucket/step-1", options | {"config_kwargs": limits})
    start = time.monotonic()
    with pytest.raises(StoreError, match=r"s3://bucket/step-1/\.metadata.*(not finish within 2 s|imeout)") as caught:
        run(place, lambda store: store.commit(".metadata", bytes(size)))
    assert time.monotonic() - start < 10
    del caught
    gc.collect()


class ScriptedServer(BaseHTTPRequestHandler):
    """Answers each request with the next of its answers: status, announced length and body."""

    protocol_version = "HTTP/1.1"
    answers: ClassVar[list[tuple[int, int, bytes]]] = []

    def do_GET(self):
        status, length, body = self.answers.pop(0)
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = length != len(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def scripted_place() -> Iterator[Place]:
    with ThreadingHTTPServer(("127.0.0.1", 0), ScriptedServer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        options = {"key": "k-1234", "secret": "s-1234", "endpoint_url": f"http://127.0.0.1:{server.server_port}"}
        yield Place("s3://bucket/step-1", options)
        server.shutdown()
        thread.join()


_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


def test_denied_access_is_not_tried_again(scripted_place: Place):
    ScriptedServer.answers[:] = [(403, len(_DENIED), _DENIED)] * 9
    with pytest.raises(StoreError, match=r"s3://bucket/step-1/.*PermissionError: Access Denied"):
        run(scripted_place, lambda store: store.get(NAME))
    assert len(ScriptedServer.answers) == 8


def test_server_that_ignores_ranges(scripted_place: Place):
    ScriptedServer.answers[:] = [(200, 10, b"0123456789")]
    with pytest.raises(StoreError, match="ignored the range 2 to 4"):
        run(scripted_place, lambda store: store.get_range(NAME, 2, 4))


def test_options_override_the_defaults_one_by_one(moto_s3: Place):
    async def main():
        async with moto_s3.open(read_timeout=77, s3={"addressing_style": "path"}) as store:
            await store.commit(".metadata", b"{}")
            config = store._requests.client.meta.config
            assert (config.read_timeout, config.connect_timeout) == (77, 5)
            assert config.s3 == {"addressing_style": "path", "payload_signing_enabled": False}
            assert config.max_pool_connections >= 256

    asyncio.run(main())


def test_storage_options_are_left_as_they_are(moto_s3: Place):
    before = pickle.dumps(moto_s3.storage_options)
    run(moto_s3, lambda store: store.commit(".metadata", b"{}"))
    assert pickle.dumps(moto_s3.storage_options) == before


def test_settings_from_the_environment(moto_s3: Place, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", moto_s3.storage_options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", moto_s3.storage_options["secret"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_s3.storage_options["endpoint_url"])
    run(Place(moto_s3.url), lambda store: store.commit(".metadata", b"{}"))
    assert run(moto_s3, lambda store: store.get(".metadata")) == b"{}"


@pytest.mark.parametrize("how", ["AWS_PROFILE", "profile"])
def test_settings_from_a_profile(moto_s3: Place, monkeypatch, tmp_path, how: str):
    options = moto_s3.storage_options
    config = tmp_path / "config"
    config.write_text(
        f"[profile job]\nendpoint_url = {options['endpoint_url']}\nregion = us-east-1\n"
        f"aws_access_key_id = {options['key']}\naws_secret_access_key = {options['secret']}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    if how == "AWS_PROFILE":
        monkeypatch.setenv("AWS_PROFILE", "job")
    place = Place(moto_s3.url, {"profile": "job"} if how == "profile" else {})
    run(place, lambda store: store.commit(".metadata", b"{}"))
    assert run(moto_s3, lambda store: store.get(".metadata")) == b"{}"


def test_settings_from_the_configuration_of_fsspec(moto_s3: Place, monkeypatch):
    monkeypatch.setitem(conf, "s3", moto_s3.storage_options | {"config_kwargs": {"read_timeout": 33}})

    async def main():
        async with open_store(moto_s3.url) as store:
            await store.commit(".metadata", b"{}")
            assert store._requests.client.meta.config.read_timeout == 33

    asyncio.run(main())
    assert run(moto_s3, lambda store: store.get(".metadata")) == b"{}"


def test_file_systems_are_not_kept(moto_s3: Place):
    cached = fsspec.get_filesystem_class("s3")._cache
    before = len(cached)
    run(moto_s3, lambda store: store.list())
    assert len(cached) == before


def test_connections_are_closed(moto_s3: Place):
    async def main():
        async with moto_s3.open() as store:
            await store.list()
            client = store._requests.client
        return client._endpoint.http_session._sessions

    assert not asyncio.run(main())


def test_clients_of_several_regions_are_closed(moto_s3: Place, monkeypatch):
    """With `cache_regions` s3fs makes a client for each region that it is told of."""
    options = dict(moto_s3.storage_options)
    monkeypatch.setenv("AWS_ENDPOINT_URL", options.pop("endpoint_url"))
    place = Place(moto_s3.url, options | {"cache_regions": True})

    def save():
        run(place, lambda store: store.commit(".metadata", b"{}"))
        return len(os.listdir("/proc/self/fd"))

    save()
    gc.collect()
    gc.disable()
    try:
        first = save()
        assert [save() for _ in range(30)][-1] <= first + 10, "the server's ends may close later"
    finally:
        gc.enable()
    assert run(moto_s3, lambda store: store.get(".metadata")) == b"{}"


@pytest.mark.parametrize("secret", ["s3cr3t/v@lue+x", "plain-secret-value"])
@every_operation
def test_no_secret_is_shown(refused_port: int, secret: str, operation):
    options = {
        "key": "AKIAVISIBLE",
        "secret": secret,
        "token": "session-token",
        "client_kwargs": {"aws_session_token": "session-token"},
        "endpoint_url": f"http://{secret.replace('/', '')}:pw-in-url@127.0.0.1:{refused_port}",
        "config_kwargs": {"retries": {"total_max_attempts": 1}},
    }
    with pytest.raises(StoreError) as caught:
        run(Place("s3://bucket/step-1", options), operation)
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    for hidden in (secret, secret.replace("/", ""), "session-token", "pw-in-url", "AKIAVISIBLE"):
        assert hidden not in shown


def lose_answers(monkeypatch, meanwhile=None):
    """Break the connection after each PUT was done, twice; `meanwhile` is done by another writer."""
    real, lost = Requests.send_once, []

    async def broken(requests, operation, parameters):
        answer = await real(requests, operation, parameters)
        if operation == "put_object" and len(lost) < 2:
            lost.append(parameters["Key"])
            if meanwhile:
                await meanwhile(requests, parameters["Key"])
            raise ClientConnectionError("the connection broke")
        return answer

    monkeypatch.setattr(Requests, "send_once", broken)
    monkeypatch.setattr("dcp_storage.store.retries._PAUSE_SECONDS", 0)
    return lost


def test_a_create_whose_answer_was_lost_is_known_for_what_it_did(moto_s3: Place, monkeypatch):
    lost = lose_answers(monkeypatch)
    run(moto_s3, lambda store: store.commit(".metadata", b"mine", over=ABSENT))
    assert len(lost) == 1, "the second attempt is refused, and what is there is ours"
    assert run(moto_s3, lambda store: store.get(".metadata")) == b"mine"


def test_a_create_whose_answer_was_lost_does_not_replace_what_came_after_it(moto_s3: Place, monkeypatch):
    async def replace(requests, key):
        await requests._fs._call_s3("put_object", Bucket=requests.bucket, Key=key, Body=b"another writer's")

    lose_answers(monkeypatch, replace)
    with pytest.raises(ObjectExists):
        run(moto_s3, lambda store: store.commit(".metadata", b"mine", over=ABSENT))
    assert run(moto_s3, lambda store: store.get(".metadata")) == b"another writer's"


def test_a_commit_whose_answer_was_lost_does_not_replace_what_came_after_it(moto_s3: Place, monkeypatch):
    async def commit(store):
        await store.commit(".metadata", b"mine", await store.version(".metadata"))

    run(moto_s3, lambda store: store.commit(".metadata", b"old"))
    with monkeypatch.context() as patch:
        lost = lose_answers(patch)
        run(moto_s3, commit)
        assert len(lost) == 1, "the second attempt is refused, and what is there is ours"
    run(moto_s3, lambda store: store.commit(".metadata", b"old"))

    async def replace(requests, key):
        await requests._fs._call_s3("put_object", Bucket=requests.bucket, Key=key, Body=b"another writer's")

    lose_answers(monkeypatch, replace)
    with pytest.raises(ObjectExists, match="another one was written in the meantime"):
        run(moto_s3, commit)
    assert run(moto_s3, lambda store: store.get(".metadata")) == b"another writer's"


@pytest.mark.parametrize("rival", ["replaces", "deletes"])
def test_a_commit_over_what_changed_meanwhile_is_refused(moto_s3: Place, rival):
    async def commit(store):
        version = await store.version(".metadata")
        if rival == "replaces":
            await store.commit(".metadata", b"another writer's")
        else:
            await store.delete([".metadata"])
        await store.commit(".metadata", b"mine", version)

    run(moto_s3, lambda store: store.commit(".metadata", b"old"))
    with pytest.raises(ObjectExists):
        run(moto_s3, commit)


def test_a_bucket_that_is_missing_is_no_change(moto_s3: Place):
    async def commit(store):
        store._requests.bucket = "no-such-bucket"
        await store.commit(".metadata", b"mine", await store.version(".metadata"))

    with pytest.raises(StoreError, match="bucket does not exist") as raised:
        run(moto_s3, commit)
    assert not isinstance(raised.value, ObjectExists)


def test_a_server_that_does_not_implement_conditions_takes_commits_without(moto_s3: Place, monkeypatch):
    real = Requests.send_once

    async def refuse(requests, operation, parameters):
        if "IfMatch" in parameters or "IfNoneMatch" in parameters:
            answer = {"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {"HTTPStatusCode": 501}}
            raise ClientError(answer, "PutObject")
        return await real(requests, operation, parameters)

    async def commit(store):
        for data in (b"first", b"second"):
            await store.commit(".metadata", data, await store.version(".metadata"))

    monkeypatch.setattr(Requests, "send_once", refuse)
    run(moto_s3, commit)
    assert run(moto_s3, lambda store: store.get(".metadata")) == b"second"


def test_a_client_too_old_for_conditions_only_has_the_look_before(moto_s3: Place, monkeypatch):
    monkeypatch.setattr(Requests, "takes", lambda requests, operation, parameter: False)
    run(moto_s3, lambda store: store.commit(".metadata", b"first", over=ABSENT))
    with pytest.raises(ObjectExists):
        run(moto_s3, lambda store: store.commit(".metadata", b"second", over=ABSENT))


@pytest.mark.parametrize("option", ["region_name", "aws_access_key_id", "endpoint", "verify"])
def test_options_that_nothing_takes_are_refused_by_the_constructor(option):
    with pytest.raises(ConfigError, match=f"has no storage option {option}.*client_kwargs"):
        AsyncStorageWriter("s3://bucket/run", storage_options={option: "x"})


def test_a_profile_that_is_not_there_is_refused_by_the_constructor():
    with pytest.raises(ConfigError, match="nosuch"):
        AsyncStorageReader("s3://bucket/run", storage_options={"profile": "nosuch"})


def test_options_that_s3fs_and_fsspec_take():
    options = {
        "key": "k",
        "secret": "s",
        "token": "t",
        "anon": False,
        "client_kwargs": {"region_name": "x"},
        "use_ssl": True,
    }
    more = {
        "endpoint_url": "http://x",
        "default_block_size": 5,
        "skip_instance_cache": True,
        "s3_additional_kwargs": {},
    }
    AsyncStorageWriter(
        "s3://bucket/run", storage_options=options | more | {"config_kwargs": {}, "version_aware": False}
    )
