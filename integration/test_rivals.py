"""Another writer commits at every operation of a save: what stands is one of the two, whole."""

import asyncio
import itertools
from contextlib import contextmanager

import pytest
import torch
import torch.distributed.checkpoint as dcp
from aiohttp import ClientConnectionError
from torch.distributed.checkpoint import CheckpointException

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner, Transfer
from dcp_storage.errors import CheckpointExists, CheckpointReplaced
from dcp_storage.store.local import LocalStore
from dcp_storage.store.s3 import S3Store
from dcp_storage.store.s3_requests import Requests
from dcp_storage.verify import verify
from tests.conftest import moto_bucket, moto_endpoint, moto_options, moto_s3  # noqa: F401 - fixtures

OPERATIONS = ("put", "commit", "get", "list", "size", "version", "delete")
OURS, RIVAL = 2, 3


def state_of(value):
    return {"weight": torch.full((1 << 19,), float(value)), "step": value}


class Place:
    """Where two writers save."""

    def __init__(self, store, url, options=None):
        self.store, self.url, self.options = store, url, options

    def save(self, value, *, overwrite=True):
        writer = AsyncStorageWriter(
            self.url, storage_options=self.options, overwrite=overwrite, transfer=Transfer(object_bytes=1 << 20)
        )
        dcp.save(state_of(value), storage_writer=writer, planner=ShardedSavePlanner(), no_dist=True)

    def load(self):
        state = state_of(-1)
        reader = AsyncStorageReader(self.url, storage_options=self.options)
        dcp.load(state, storage_reader=reader, planner=ShardedLoadPlanner(), no_dist=True)
        assert verify(self.url, storage_options=self.options).sound
        [value] = {*state["weight"].unique().tolist(), state["step"]}
        return value

    @contextmanager
    def rival(self, at, when):
        """Have another writer save before or after the operation of this number; yield the operations seen."""
        seen, real = [], {name: getattr(self.store, name) for name in OPERATIONS}

        def wrap(name):
            async def call(store, *args, **kwargs):
                number = len(seen)
                seen.append((name, args[0] if args else ""))
                if number == at and when == "before":
                    await asyncio.to_thread(self._save_as_rival, real)
                try:
                    return await real[name](store, *args, **kwargs)
                finally:
                    if number == at and when == "after":
                        await asyncio.to_thread(self._save_as_rival, real)

            return call

        for name in OPERATIONS:
            setattr(self.store, name, wrap(name))
        try:
            yield seen
        finally:
            for name in OPERATIONS:
                setattr(self.store, name, real[name])

    def _save_as_rival(self, real):
        for name in OPERATIONS:
            setattr(self.store, name, real[name])
        self.save(RIVAL)


@pytest.fixture(params=["local", "moto", "seaweedfs"])
def place(request, tmp_path):
    """Return what makes a new place."""
    numbers = itertools.count()
    if request.param == "local":
        return lambda: Place(LocalStore, str(tmp_path / str(next(numbers))))
    server = request.getfixturevalue("moto_s3" if request.param == "moto" else "seaweedfs_server")
    if request.param == "moto":
        return lambda: Place(S3Store, f"{server.url}/{next(numbers)}", server.storage_options)
    return lambda: Place(S3Store, server.new_prefix(), server.storage_options)


def outcome(save):
    try:
        save()
    except CheckpointException as error:
        [(cause, _)] = error.failures.values()
        return type(cause)
    return None


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "over-an-old-one"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_rival_s_commit_at_every_operation(place, first, overwrite, when):
    if not (first or overwrite):
        pytest.skip("refused before anything is written")
    outcomes = []
    for at in itertools.count():
        here = place()
        if not first:
            here.save(1)
        with here.rival(at, when) as seen:
            failed = outcome(lambda here=here: here.save(OURS, overwrite=overwrite))
        if len(seen) <= at and here.load() == OURS:
            break
        standing = here.load()
        outcomes.append((seen[at][0], failed, standing))
        assert failed in ({None, CheckpointReplaced} if overwrite else {None, CheckpointExists}), seen[at]
        if failed:
            assert standing == RIVAL
    assert {standing for _, _, standing in outcomes} == ({OURS, RIVAL} if overwrite else {RIVAL})
    if here.store is S3Store or not overwrite:
        assert any(failed for _, failed, _ in outcomes)


@pytest.mark.parametrize("first", [True, False], ids=["first", "over-an-old-one"])
def test_a_rival_s_commit_while_the_answer_to_ours_is_lost(place, first, monkeypatch):
    here = place()
    if here.store is LocalStore:
        pytest.skip("no answers are lost")
    if not first:
        here.save(1)
    real = Requests.send_once
    monkeypatch.setattr("dcp_storage.store.retries._PAUSE_SECONDS", 0)

    async def lossy(requests, operation, parameters):
        answer = await real(requests, operation, parameters)
        if operation == "put_object" and parameters["Key"].endswith(".metadata"):
            Requests.send_once = real
            await asyncio.to_thread(here.save, RIVAL)
            raise ClientConnectionError("the connection broke")
        return answer

    monkeypatch.setattr(Requests, "send_once", lossy)
    assert outcome(lambda: here.save(OURS)) is CheckpointReplaced
    assert here.load() == RIVAL, "and not ours, whose objects are gone"
