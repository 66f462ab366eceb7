"""Another writer commits before or after every operation of a save: what stands is one of the two, whole."""

import asyncio
import itertools
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from aiohttp import ClientConnectionError
from torch.distributed.checkpoint import CheckpointException

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner, Transfer
from dcp_storage.errors import CheckpointExists, CheckpointReplaced
from dcp_storage.store.s3_requests import Requests
from dcp_storage.verify import verify
from tests.conftest import moto_bucket, moto_endpoint, moto_options, moto_s3  # noqa: F401 - fixtures
from tests.hooks import hooked

OURS, RIVAL = 2, 3


def state_of(value):
    return {"weight": torch.full((1 << 19,), float(value)), "step": value}


class Place:
    """Where two writers save."""

    def __init__(self, url, options=None):
        self.url, self.options, self.remote = url, options, options is not None

    def save(self, value, *, overwrite=True, **hooks):
        location = hooked(self.url, self.options, **hooks)
        writer = AsyncStorageWriter(location, overwrite=overwrite, transfer=Transfer(object_bytes=1 << 20))
        dcp.save(state_of(value), storage_writer=writer, planner=ShardedSavePlanner(), no_dist=True)

    def load(self):
        state = state_of(-1)
        reader = AsyncStorageReader(self.url, storage_options=self.options)
        dcp.load(state, storage_reader=reader, planner=ShardedLoadPlanner(), no_dist=True)
        assert verify(self.url, storage_options=self.options).sound
        [value] = {*state["weight"].unique().tolist(), state["step"]}
        return value


class Rival:
    """A hook, for before and after: at one of its calls, counted from 1, another writer saves."""

    def __init__(self, place, at):
        self.seen, self._place, self._at = [], place, at

    async def __call__(self, operation):
        self.seen.append(operation)
        if len(self.seen) == self._at:
            await asyncio.to_thread(self._place.save, RIVAL)


@pytest.fixture(params=["local", "moto", "seaweedfs"])
def place(request, tmp_path):
    """Return what makes a new place."""
    numbers = itertools.count()
    if request.param == "local":
        return lambda: Place(str(tmp_path / str(next(numbers))))
    server = request.getfixturevalue("moto_s3" if request.param == "moto" else "seaweedfs_server")
    if request.param == "moto":
        return lambda: Place(f"{server.url}/{next(numbers)}", server.storage_options)
    return lambda: Place(server.new_prefix(), server.storage_options)


def outcome(save):
    try:
        save()
    except CheckpointException as error:
        [(cause, _)] = error.failures.values()
        return type(cause)
    return None


@pytest.mark.parametrize("first", [True, False], ids=["first", "over-an-old-one"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_rival_s_commit_at_every_operation(place, first, overwrite):
    if not (first or overwrite):
        pytest.skip("refused before anything is written")
    outcomes = []
    for at in itertools.count(1):
        here = place()
        if not first:
            here.save(1)
        rival = Rival(here, at)
        failed = outcome(partial(here.save, OURS, overwrite=overwrite, before=rival, after=rival))
        standing = here.load()
        if len(rival.seen) < at and standing == OURS:
            break
        operation = rival.seen[at - 1]
        outcomes.append((operation.method, failed, standing))
        assert failed in ({None, CheckpointReplaced} if overwrite else {None, CheckpointExists}), operation
        if failed:
            assert standing == RIVAL
    assert {standing for _, _, standing in outcomes} == ({OURS, RIVAL} if overwrite else {RIVAL})
    if here.remote or not overwrite:
        assert any(failed for _, failed, _ in outcomes)


@pytest.mark.parametrize("first", [True, False], ids=["first", "over-an-old-one"])
def test_a_rival_s_commit_while_the_answer_to_ours_is_lost(place, first, monkeypatch):
    here = place()
    if not here.remote:
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
