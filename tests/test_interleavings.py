"""Every order in which the store operations of two saves and a load at one path can happen."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from xxhash import xxh3_64_hexdigest

from dcp_storage.checkpoint.manifests import read_manifest
from dcp_storage.dcp.saves.commit import commit
from dcp_storage.errors import CheckpointExists, CheckpointNotFound, CheckpointReplaced, ObjectExists, ObjectNotFound
from dcp_storage.format.manifest.draft import Draft, encode
from dcp_storage.format.manifest.frames import StoredCodec
from dcp_storage.format.manifest.manifest import Manifest, StoredObject, decode
from dcp_storage.format.manifest.schema import Segment
from dcp_storage.format.names import MANIFEST, data_object
from dcp_storage.store.base import ABSENT, ObjectInfo, Store
from tests.drafts import columns_of


class Turn:
    """Awaited before each operation: whoever drives the coroutine decides when it happens."""

    def __await__(self):
        yield


class SteppedStore(Store):
    """A dictionary; each operation is one atomic step.

    `versions`: It knows conditional commits. `sends`: How often a commit is sent, of which all answers but the last are
    lost.
    """

    url = "stepped://"
    remote = True
    put_bytes = read_bytes = 1 << 20

    def __init__(self, versions: bool, sends: int) -> None:
        self.objects: dict[str, bytes] = {}
        self.versions, self.sends = versions, sends

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        pass

    def child(self, name):
        raise NotImplementedError

    async def put(self, name, batches):
        raise NotImplementedError

    async def version(self, name):
        if not self.versions:
            return None
        await Turn()
        return self._version(name)

    async def commit(self, name, data, over=None):
        for _ in range(self.sends):
            await Turn()
            if over in {None, self._version(name)}:
                self.objects[name] = data
            elif self.objects.get(name) != data:
                raise ObjectExists(name)

    def _version(self, name):
        return xxh3_64_hexdigest(self.objects[name]) if name in self.objects else ABSENT

    async def get(self, name):
        await Turn()
        if name not in self.objects:
            raise ObjectNotFound(name)
        return self.objects[name]

    async def get_range(self, name, start, stop):
        return (await self.get(name))[start:stop]

    async def size(self, name):
        return len(await self.get(name))

    async def list(self):
        await Turn()
        return {name: ObjectInfo(len(data), None) for name, data in self.objects.items()}

    async def delete(self, names):
        for name in names:
            await Turn()
            self.objects.pop(name, None)


def manifest_of(token: str, objects: int) -> Draft:
    names = [data_object(f"{ord(token[0]):016x}", rank, 0, ".distcp") for rank in range(objects)]
    segments = [Segment(number, 0, (1,), xxh3_64_hexdigest(b"x")) for number in range(objects)]
    return Draft(
        save_id=token,
        created="now",
        libraries={},
        world_size=objects,
        codec=StoredCodec("none", 1 << 20, 1),
        objects=tuple(StoredObject(name, 1) for name in names),
        tensors={},
        entries=dict.fromkeys(names, 1),
        stored=columns_of([[segment] for segment in segments], 16),
        planner_data=None,
    )


async def load(store: Store) -> str:
    """What a reader does: it reads one whole save, or finds that there is none, or that an object is gone."""
    try:
        manifest = await read_manifest(store)
        assert isinstance(manifest, Manifest)
        for stored in manifest.objects:
            await store.get(stored.name)
    except (CheckpointNotFound, ObjectNotFound) as error:
        return type(error).__name__
    return manifest.save_id


class Scene:
    """Some saves, whose objects are put and which are about to commit, and perhaps a load."""

    def __init__(
        self,
        *,
        old: bool,
        saves: str,
        objects: int,
        loads: bool,
        replace: bool = True,
        versions: bool = False,
        sends: int = 1,
    ) -> None:
        self.saves, self.refused = saves, set()
        self.store = SteppedStore(versions, sends)
        manifests = {token: manifest_of(token, objects) for token in [*saves, "old"]}
        for token, manifest in manifests.items():
            if token != "old" or old:
                self.store.objects |= {stored.name: b"x" for stored in manifest.objects}
        if old:
            self.store.objects[MANIFEST] = encode(manifests["old"])
        self.tasks: dict[int, Any] = dict(
            enumerate(commit(self.store, manifests[token], overwrite=replace) for token in saves)
        )
        if loads:
            self.tasks[len(self.tasks)] = load(self.store)
        self.loaded: str | None = None
        for who in list(self.tasks):
            self.step(who)  # to its first operation

    def step(self, who: int) -> None:
        try:
            self.tasks[who].send(None)
        except (CheckpointExists, CheckpointReplaced):
            del self.tasks[who]
            self.refused.add(self.saves[who])
        except StopIteration as end:
            del self.tasks[who]
            self.loaded = end.value or self.loaded

    def check(self) -> None:
        """Whatever is cut off here, by a crash for one, the checkpoint that stands is whole."""
        if MANIFEST in self.store.objects:
            assert {stored.name for stored in self.standing().objects} <= self.store.objects.keys()

    def standing(self) -> Manifest:
        return decode(self.store.objects[MANIFEST], MANIFEST)


def every_order(make: Callable[[], Scene]) -> Iterator[Scene]:
    """Play each order of the tasks' operations, once, to its end."""
    waiting: list[list[int]] = [[]]
    while waiting:
        order = waiting.pop()
        scene = make()
        for who in order:
            scene.step(who)
        scene.check()
        while scene.tasks:
            first, *others = scene.tasks
            waiting += [[*order, other] for other in others]
            order = [*order, first]
            scene.step(first)
            scene.check()
        yield scene


@pytest.mark.parametrize("old", [True, False], ids=["over-an-old-one", "first"])
def test_of_two_saves_one_stands_whole_at_every_moment(old):
    scenes = list(every_order(lambda: Scene(old=old, saves="ab", objects=2, loads=False)))
    assert len(scenes) > (50 if old else 5)
    assert {scene.standing().save_id for scene in scenes} == {"a", "b"}
    for scene in scenes:
        assert not any(name.startswith(f"{ord('o'):016x}") for name in scene.store.objects)


@pytest.mark.parametrize("sends", [1, 2])
@pytest.mark.parametrize("old", [True, False], ids=["over-an-old-one", "first"])
def test_of_two_conditional_commits_one_stands_whole_though_answers_are_lost(old, sends):
    scenes = list(every_order(lambda: Scene(old=old, saves="ab", objects=1, loads=False, versions=True, sends=sends)))
    assert len(scenes) > (50 if old else 15)
    assert {scene.standing().save_id for scene in scenes} == {"a", "b"}
    for scene in scenes:
        assert scene.standing().save_id not in scene.refused
        assert len(scene.refused) < 2
        orphans = {name for name in scene.store.objects if name != MANIFEST} - {scene.standing().objects[0].name}
        assert len(orphans) <= len(scene.refused), "what was replaced is deleted"


def test_a_commit_that_is_sent_twice_needs_a_condition():
    with pytest.raises(AssertionError):
        list(every_order(lambda: Scene(old=True, saves="ab", objects=1, loads=False, sends=2)))


@pytest.mark.parametrize("old", [True, False], ids=["where-one-stands", "first"])
def test_of_two_saves_that_may_not_replace_at_most_one_commits_and_nothing_is_deleted(old):
    for scene in every_order(lambda: Scene(old=old, saves="ab", objects=2, loads=False, replace=False)):
        assert len(scene.refused) == 1 + old
        assert scene.standing().save_id == "old" if old else scene.standing().save_id not in scene.refused
        assert len(scene.store.objects) == 1 + 2 * (2 + old)


@pytest.mark.parametrize("old", [True, False], ids=["over-an-old-one", "first"])
def test_a_load_beside_two_saves_is_of_one_or_none(old):
    loaded = {scene.loaded for scene in every_order(lambda: Scene(old=old, saves="ab", objects=1, loads=True))}
    assert loaded == {"a", "b", "ObjectNotFound", "old" if old else "CheckpointNotFound"}
