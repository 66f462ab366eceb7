"""Servers that throttle, break off, stay silent or lie: what heals, after how many requests, and what not."""

import asyncio
import random
import ssl
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
from aiohttp import ClientPayloadError, ServerDisconnectedError
from fsspec import register_implementation
from fsspec.asyn import AsyncFileSystem
from torch.distributed.checkpoint import CheckpointException

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, Transfer
from dcp_storage.errors import BlockCorrupt, ManifestCorrupt, ObjectNotFound, StoreError
from dcp_storage.store import remote, retries, s3, s3_retry
from dcp_storage.testing.place import NAME, Place, put, run, sizes
from tests.faulty_s3 import FaultyS3, faulty_s3
from tests.states import assert_same, blank_like

ATTEMPTS = 4  # s3fs waits for 0.1 s whenever it sees a failure
DATA = bytes(range(256)) * 40
URL = "s3://bucket/run/step-1"
KEY = f"bucket/run/step-1/{NAME}"
LOST = {"reset", "lost_answer"}
SILENT = {"stall", "late_answer", "stalled_body"}
EVERYWHERE = ["slow_down", "internal_error", "bad_gateway", "reset", "stall"]
WHILE_READING = ["lost_answer", "half_body", "stalled_body"]
TRANSFER = Transfer(object_bytes=1 << 20, concurrency=4)


@pytest.fixture
def server(monkeypatch) -> Iterator[FaultyS3]:
    monkeypatch.setattr(retries, "_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(s3_retry, "_ATTEMPTS", ATTEMPTS)
    with faulty_s3() as state:
        yield state


def place(server: FaultyS3, **config: Any) -> Place:
    return Place(URL, server.storage_options(**config))


@pytest.mark.parametrize("fault", [*EVERYWHERE, "lost_answer", "late_answer"])
def test_a_put_heals_and_is_no_duplicate(server: FaultyS3, fault: str):
    times = 1 if fault in SILENT else ATTEMPTS - 1
    server.fail_first(fault, times, "PUT")
    assert run(place(server), lambda store: put(store, NAME, DATA)) == len(DATA)
    assert server.objects == {KEY: DATA}
    assert server.requests == [("PUT", NAME)] * (times + 1)


@pytest.mark.parametrize("fault", [*EVERYWHERE, *WHILE_READING])
def test_a_read_heals(server: FaultyS3, fault: str):
    server.objects[KEY] = DATA
    times = 1 if fault in SILENT else ATTEMPTS - 1
    server.fail_first(fault, times, "GET")
    assert run(place(server), lambda store: store.get_range(NAME, 100, 5000)) == DATA[100:5000]
    assert server.requests == [("GET", NAME)] * (times + 1)


@pytest.mark.parametrize("fault", EVERYWHERE)
def test_deletes_and_lists_heal(server: FaultyS3, fault: str):
    server.objects[KEY] = DATA
    server.fail_first(fault, 1, "GET")
    assert run(place(server), sizes) == {NAME: len(DATA)}
    server.fail_first(fault, 1, "DELETE")
    run(place(server), lambda store: store.delete([NAME]))
    assert not server.objects


@pytest.mark.parametrize(
    ("method", "fault"),
    [*(("GET", fault) for fault in [*EVERYWHERE, *WHILE_READING]), *(("PUT", fault) for fault in EVERYWHERE)],
)
def test_what_never_heals_is_tried_so_many_times_and_no_more(server: FaultyS3, method: str, fault: str):
    server.objects[KEY] = DATA
    server.fault = lambda asked, name: fault
    with pytest.raises(StoreError, match=f"{URL}/{NAME}") as caught:
        run(place(server), (lambda store: store.get(NAME)) if method == "GET" else lambda store: put(store, NAME, DATA))
    assert not isinstance(caught.value, ObjectNotFound)
    attempts = 2 if fault in SILENT else ATTEMPTS
    # aiohttp sends again, once and at once, what it has lost a connection with.
    most = 2 * attempts if fault in LOST else attempts
    assert attempts <= len(server.requests) <= most


def test_faults_of_several_kinds_share_one_count(server: FaultyS3):
    server.objects[KEY] = DATA
    faults = iter(["slow_down", "half_body", "internal_error"] * 9)
    server.fault = lambda method, name: next(faults)
    with pytest.raises(StoreError):
        run(place(server), lambda store: store.get(NAME))
    assert len(server.requests) == ATTEMPTS


def test_an_absent_object_is_asked_for_once(server: FaultyS3):
    with pytest.raises(ObjectNotFound):
        run(place(server), lambda store: store.get(NAME))
    assert len(server.requests) == 1


@pytest.mark.parametrize("how", ["total_max_attempts", "max_attempts", "environment", "profile"])
@pytest.mark.parametrize("mode", ["adaptive", None])
def test_who_says_how_many_attempts(server: FaultyS3, monkeypatch, tmp_path, how: str, mode: str | None):
    config: dict[str, Any] = {}
    if mode:
        monkeypatch.setenv("AWS_RETRY_MODE", mode)
    if how == "environment":
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    elif how == "profile":
        file = tmp_path / "config"
        file.write_text("[profile job]\nmax_attempts = 3\nregion = us-east-1\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(file))
        monkeypatch.setenv("AWS_PROFILE", "job")
    else:
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "7")  # the options are stronger
        config = {"retries": {how: 3 if how == "total_max_attempts" else 2}}
    server.fault = lambda method, name: "internal_error"
    with pytest.raises(StoreError):
        run(place(server, **config), lambda store: store.get(NAME))
    assert len(server.requests) == 3


def test_pauses_grow_and_differ_and_all_ends_in_half_a_minute():
    assert retries.MOST_TIMEOUTS * s3._CONFIG_DEFAULTS["read_timeout"] <= 30
    pauses = [[retries.pause(attempt) for attempt in range(1, s3_retry._ATTEMPTS)] for _ in range(200)]
    assert max(map(sum, pauses)) < 30
    for step, column in enumerate(zip(*pauses, strict=True)):
        longest = min(0.25 * 2**step, 4)
        assert longest / 2 <= min(column) < 0.7 * longest
        assert 0.8 * longest < max(column) <= longest


def state_of(value):
    return {"parts": [torch.full((1 << 18,), float(value)) for _ in range(3)], "step": value}


def save(server: FaultyS3, value=1):
    writer = AsyncStorageWriter(URL, storage_options=server.storage_options(), transfer=TRANSFER)
    dcp.save(state_of(value), storage_writer=writer)


def load(server: FaultyS3, value=1):
    state = blank_like(state_of(0))
    reader = AsyncStorageReader(URL, storage_options=server.storage_options(), transfer=TRANSFER)
    dcp.load(state, storage_reader=reader)
    assert_same(state, state_of(value))


def test_saves_and_loads_through_many_faults(server: FaultyS3):
    dice = random.Random(0)

    def fault(method, name):
        kinds = ["slow_down", "internal_error", "reset", "lost_answer", *(["half_body"] if method == "GET" else [])]
        return dice.choice(kinds) if dice.random() < 0.2 else None

    server.fault = fault
    for value in range(3):
        save(server, value)
        load(server, value)
    manifest_and_objects = Counter(name.rpartition("/")[2].split("-")[0] for name in server.objects)
    assert len(manifest_and_objects) == 2, "one save's objects and .metadata"


def test_a_save_that_is_throttled_for_ever_fails_and_leaves_the_old(server: FaultyS3):
    save(server, 1)
    server.requests.clear()
    server.fault = lambda method, name: "slow_down" if method == "PUT" else None
    with pytest.raises(CheckpointException):
        save(server, 2)
    assert not server.count("PUT", ".metadata")
    assert max(Counter(server.requests).values()) == ATTEMPTS
    server.fault = lambda method, name: None
    load(server, 1)


@pytest.mark.parametrize("name", [".zst", ".metadata"])
def test_a_flipped_bit_in_one_answer_heals_by_one_more_request(server: FaultyS3, name: str):
    save(server)
    server.requests.clear()
    load(server)
    needed = server.count("GET", name)
    server.requests.clear()
    server.fail_first("flipped_bit", 1, "GET", name)
    load(server)
    assert server.count("GET", name) == needed + 1


def test_a_flipped_bit_in_two_answers_is_damage(server: FaultyS3):
    save(server)
    server.fault = lambda method, name: "flipped_bit" if name.endswith(".zst") else None
    with pytest.raises(CheckpointException) as raised:
        load(server)
    assert isinstance(raised.value.failures[0][0], BlockCorrupt)
    server.fault = lambda method, name: "flipped_bit" if name == ".metadata" else None
    with pytest.raises(CheckpointException) as raised:
        load(server)
    assert isinstance(raised.value.failures[0][0], ManifestCorrupt)


class Shaky(AsyncFileSystem):
    """Another client, over whose connections the first requests of each kind fail, and that does not try again."""

    protocol = "shaky"
    objects: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[Counter] = Counter()
    error: ClassVar[Exception | None] = None
    times = 0

    seconds = 0

    async def _fail_at_first(self, kind):
        self.requests[kind] += 1
        await asyncio.sleep(self.seconds)
        if self.requests[kind] <= self.times:
            raise self.error

    async def _pipe_file(self, path, value, **_):
        self.objects[path] = value
        await self._fail_at_first("put")

    async def _cat_file(self, path, start=None, end=None, **_):
        await self._fail_at_first("get")
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path][start:end]

    async def _ls(self, path, detail=True, **_):
        await self._fail_at_first("list")
        return [{"name": name, "size": len(data), "type": "file"} for name, data in self.objects.items()]

    async def _rm_file(self, path, **_):
        await self._fail_at_first("delete")
        self.objects.pop(path)


@pytest.fixture
def shaky(monkeypatch):
    monkeypatch.setattr(retries, "_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(Shaky, "objects", {})
    monkeypatch.setattr(Shaky, "requests", Counter())
    register_implementation("shaky", Shaky, clobber=True)
    return Place("shaky://bucket")


BROKEN = [ConnectionResetError("reset"), ClientPayloadError("broken off"), ServerDisconnectedError()]


@pytest.mark.parametrize("error", BROKEN, ids=lambda error: type(error).__name__)
def test_every_client_s_broken_connections_heal(shaky, monkeypatch, error):
    monkeypatch.setattr(Shaky, "error", error)
    monkeypatch.setattr(Shaky, "times", 3)

    async def use(store):
        await put(store, NAME, DATA)
        assert await store.get_range(NAME, 5, 10) == DATA[5:10]
        assert list(await store.list()) == [NAME]
        await store.delete([NAME])

    run(shaky, use)
    assert Shaky.requests == {"put": 4, "get": 4, "list": 4, "delete": 4}


@pytest.mark.parametrize(
    ("error", "requests"),
    [
        (ConnectionRefusedError("refused"), 4),
        (TimeoutError("silent"), retries.MOST_TIMEOUTS),
        (ssl.SSLError("no such certificate"), 1),
        (PermissionError("denied"), 1),
        (ValueError("a mistake"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_does_not_heal_is_raised(shaky, monkeypatch, error, requests):
    monkeypatch.setattr(Shaky, "error", error)
    monkeypatch.setattr(Shaky, "times", 99)
    with pytest.raises(StoreError, match=str(error)):
        run(shaky, lambda store: store.get(NAME))
    assert Shaky.requests == {"get": requests}


def test_what_a_client_has_tried_for_long_is_not_tried_again(shaky, monkeypatch):
    monkeypatch.setattr(Shaky, "error", ConnectionResetError("reset"))
    monkeypatch.setattr(Shaky, "times", 99)
    monkeypatch.setattr(Shaky, "seconds", 0.05)
    monkeypatch.setattr(remote, "_RETRIES", replace(remote._RETRIES, slow_s=0.01))
    with pytest.raises(StoreError, match="reset"):
        run(shaky, lambda store: store.get(NAME))
    assert Shaky.requests == {"get": 1}


def test_an_absent_object_of_any_client_is_asked_for_once(shaky):
    with pytest.raises(ObjectNotFound):
        run(shaky, lambda store: store.get(NAME))
    assert Shaky.requests == {"get": 1}
