"""Five thousand interleavings of programs that save, prune, pin and read the steps of a run, with kills.

Never is a step lost that is kept, never does one stand that is not whole, never does a pinned step go, and never is a
foreign object touched; and a last prune leaves nothing behind. Planted mistakes are caught.
"""

import asyncio
import time
from functools import cache
from types import SimpleNamespace

import pytest

from dcp_storage.checkpoint import fetch as fetch_manifest
from dcp_storage.checkpoint import manifests, pruning
from dcp_storage.errors import CheckpointNotFound
from dcp_storage.steps import catalog, pins, retention
from tests.first_steps import KINDS
from tests.steps_model import Broken, play

RUNS = 5000


@pytest.fixture(autouse=True)
def own_clock(monkeypatch):
    """The model's clock in place of the machine's, where ages are told; and no manifest is made or decoded twice."""
    clock = SimpleNamespace(time=time.time)
    monkeypatch.setattr(retention, "time", clock)
    monkeypatch.setattr(pruning, "time", clock)
    monkeypatch.setattr(catalog, "_HEADS_IN_FLIGHT", 4)
    made = {}
    encode = manifests.encode

    def encode_once(draft):
        if draft.save_id not in made:
            made[draft.save_id] = encode(draft)
        return made[draft.save_id]

    monkeypatch.setattr(manifests, "encode", encode_once)
    for name in ("_decode", "unpack_head"):
        monkeypatch.setattr(fetch_manifest, name, cache(getattr(fetch_manifest, name)))


def play_all(seeds):
    async def main():
        return [await play(seed) for seed in seeds]

    return asyncio.run(main(), debug=False)


@pytest.mark.timeout(300)
def test_no_order_and_no_kill_loses_anything():
    worlds = play_all(range(RUNS))
    assert len(worlds) == RUNS
    assert sum(bool(world.killed & {"job"}) for world in worlds) > RUNS / 10
    assert {max(world.committed) for world in worlds} >= {3, 4, 5}
    assert {world.first for world in worlds} == set(KINDS)


def broken(most=RUNS):
    """Play until something is found."""
    with pytest.raises(Broken) as caught:
        play_all(range(most))
    return str(caught.value)


def test_objects_that_are_deleted_before_the_manifest_are_noticed(monkeypatch):
    async def bury_badly(step, is_same):
        named = await pins.replaced_objects(step)
        await step.delete(named)
        await step.delete([pins.MANIFEST])

    monkeypatch.setattr(retention, "bury", bury_badly)
    assert "stands without" in broken()


def test_a_prune_that_does_not_look_for_pins_is_noticed(monkeypatch):
    monkeypatch.setattr(pins, "held_pins", lambda times, now: [])
    assert "was pinned, and removed" in broken()


def test_a_pin_that_does_not_look_for_tombstones_is_noticed(monkeypatch):
    async def pin_badly(step, pin):
        if not await pins.is_committed(step, parts=True):
            raise CheckpointNotFound(step.url)
        await pins.refresh_pin(step, pin)

    monkeypatch.setattr(pins, "put_pin", pin_badly)
    assert "was pinned, and removed" in broken()


def test_a_prune_that_trusts_a_stale_list_is_noticed(monkeypatch):
    async def prune_badly(store, older_than):
        there = await store.list()  # before it looks whether a save is under way
        await store.delete([name for name in there if name.endswith(".distcp")])

    monkeypatch.setattr(retention, "prune_store", prune_badly)
    assert "stands without" in broken()
