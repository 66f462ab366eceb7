"""Programs that save, prune, pin and read the steps of one run, in any order of their store operations, with kills.

Their machines' clocks differ. Some runs go on from a stock step, from one of parts, or from a damaged manifest.
"""

import asyncio
import random
from collections import Counter
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache

from xxhash import xxh3_64_hexdigest

from dcp_storage.checkpoint.manifests import read_manifest
from dcp_storage.dcp.saves.commit import commit
from dcp_storage.errors import (
    CheckpointExists,
    CheckpointNotFound,
    CheckpointReplaced,
    ManifestCorrupt,
    ObjectExists,
    ObjectNotFound,
)
from dcp_storage.format.contents import Contents
from dcp_storage.format.manifest.draft import Draft
from dcp_storage.format.manifest.frames import StoredCodec, is_manifest
from dcp_storage.format.manifest.manifest import StoredObject, decode
from dcp_storage.format.manifest.merge import merge
from dcp_storage.format.manifest.schema import Segment
from dcp_storage.format.names import MANIFEST, data_object, is_stock_object, parse_part_manifest
from dcp_storage.format.stock.manifest import decode_stock_metadata
from dcp_storage.steps import pins, retention
from dcp_storage.steps.catalog import latest_step
from dcp_storage.steps.names import directory_of, parse_step
from dcp_storage.steps.policies import KeepLatest
from dcp_storage.store.base import ABSENT, ObjectInfo, Store
from tests.drafts import columns_of
from tests.first_steps import KINDS, damaged

KEEP = 1
FOREIGN = {"step-1": "notes.txt", "step-1.backup": "0123456789abcdef-0-0.distcp", "": "step-2", "step-01": ".metadata"}
FIRST = 1
PARTS = 2
_BEGUN = 1_000_000_000.0
_BEHIND = 3600
"""Seconds that the clocks of some machines are behind those of others."""
_SETTLE = 3
"""Rounds of the loop in which whoever had a turn mostly comes to the next operation."""
_LONGEST = 12
"""... and in which anybody does."""


class Broken(AssertionError):
    """Something that must never happen."""


class World:
    """What all programs see: objects by directory, a clock that each operation moves on, and whose turn it is."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.clock = _BEGUN
        self.objects: dict[str, dict[str, tuple[bytes, float]]] = {}
        self.committed: set[int] = set()
        self.waiting: list[tuple[str, asyncio.Future[None]]] = []
        self.killed: set[str] = set()
        self.changed = True
        for directory, name in FOREIGN.items():
            self.objects.setdefault(directory, {})[name] = (b"foreign", self.clock)
        self.first = KINDS[seed % len(KINDS)]
        for name, data in self.first().items():
            self.objects[directory_of(FIRST)][name] = (data, self.clock)
            self.committed.add(FIRST)

    async def turn(self, who: str) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((who, future))
        await future
        self.clock += 1

    def standing(self) -> dict[int, Contents | None]:
        """Return what stands as which step; `None` for what cannot be read."""
        found = {}
        for directory, objects in self.objects.items():
            step = parse_step(directory)
            names = [MANIFEST] if MANIFEST in objects else sorted(filter(parse_part_manifest, objects))
            if step is not None and (names == [MANIFEST] or len(names) == PARTS):
                found[step] = _decoded(*(objects[name][0] for name in names))
        return found

    def check(self) -> None:
        """Whatever is cut off here, what stands is whole, what is kept stands, and what is foreign is there."""
        if not self.changed:
            return
        self.changed = False
        standing = self.standing()
        for step, manifest in standing.items():
            if manifest and (missing := set(manifest.object_names) - self.objects[directory_of(step)].keys()):
                raise Broken(f"step {step} stands without {missing}")
        if lost := set(sorted(self.committed)[-KEEP:]) - standing.keys():
            raise Broken(f"steps {lost} are kept, and lost")
        for directory, name in FOREIGN.items():
            if name not in self.objects.get(directory, {}):
                raise Broken(f"{directory}/{name} is foreign, and gone")


class ModelStore(Store):
    """Each operation is one atomic step of the world, when it is this program's turn."""

    remote = True
    put_bytes = read_bytes = 1 << 20

    def __init__(self, world: World, who: str, directory: str = "") -> None:
        self.world, self.who, self.directory = world, who, directory
        self.url = f"model://{directory}"

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        pass

    def child(self, name):
        return ModelStore(self.world, self.who, name)

    @property
    def held(self) -> dict[str, tuple[bytes, float]]:
        return self.world.objects.setdefault(self.directory, {})

    async def put(self, name, batches=b"x"):
        await self.world.turn(self.who)
        self._set(name, batches)
        return len(batches)

    def _set(self, name, data):
        self.held[name] = (data, self.world.clock)
        self.world.changed = True

    async def version(self, name):
        await self.world.turn(self.who)
        return self._version(name)

    def _version(self, name):
        return xxh3_64_hexdigest(self.held[name][0]) if name in self.held else ABSENT

    async def commit(self, name, data, over=None):
        await self.world.turn(self.who)
        if over not in {None, self._version(name)}:
            raise ObjectExists(name)
        self._set(name, data)
        step = parse_step(self.directory)
        if name == MANIFEST and step is not None:
            self.world.committed.add(step)

    async def get(self, name):
        await self.world.turn(self.who)
        if name not in self.held:
            raise ObjectNotFound(f"{self.url}/{name}")
        return self.held[name][0]

    async def get_range(self, name, start, stop, room=None):
        return (await self.get(name))[start:stop]

    async def size(self, name):
        return len(await self.get(name))

    async def list(self):
        await self.world.turn(self.who)
        return {name: ObjectInfo(len(data), at) for name, (data, at) in self.held.items()}

    async def directories(self):
        await self.world.turn(self.who)
        return [name for name, held in self.world.objects.items() if name and held]

    async def delete(self, names):
        for name in names:
            await self.world.turn(self.who)
            self.held.pop(name, None)
            self.world.changed = True


@cache
def _decoded(*manifests: bytes) -> Contents | None:
    if len(manifests) > 1:
        return merge([decode(data, "model") for data in manifests], "model")
    with suppress(ManifestCorrupt):
        if is_manifest(manifests[0]):
            return decode(manifests[0], "model")
        return decode_stock_metadata(manifests[0], where="model")
    return None


@cache
def draft_of(program: int, step: int) -> Draft:
    """Return what a program saves as a step: two objects, which no other save names alike."""
    token = f"{program:08x}{step:08x}"
    names = [data_object(token, rank, 0, ".distcp") for rank in range(2)]
    segments = [[Segment(number, 0, (1,), xxh3_64_hexdigest(b"x"))] for number in range(2)]
    return Draft(
        save_id=token,
        created=datetime.fromtimestamp(_BEGUN + 100 * step - _BEHIND * (program % 2), UTC).isoformat(),
        libraries={},
        world_size=2,
        codec=StoredCodec("none", 1 << 20, 1),
        objects=[StoredObject(name, 1) for name in names],
        tensors={},
        entries=dict.fromkeys(("a", "b"), 1),
        stored=columns_of(segments, 16),
        planner_data=None,
    )


class Claims:
    """What a program writes or reads, and what it removes: as `Upkeep`, without threads."""

    def __init__(self, world: World, who: str) -> None:
        self._world, self._who = world, who
        self._in_use: Counter[int] = Counter()
        self._removing: set[int] = set()

    def __contains__(self, step):
        return self._in_use[step] > 0

    async def hold(self, step):
        while step in self._removing:
            await self._world.turn(self._who)
        self._in_use[step] += 1

    def release(self, step):
        self._in_use[step] -= 1

    @contextmanager
    def claim(self, step):
        is_free = step not in self
        if is_free:
            self._removing.add(step)
        try:
            yield is_free
        finally:
            self._removing.discard(step)


async def save(world: World, who: str, program: int, steps: int, claims: Claims) -> None:
    """Go on from the newest step, as a training job does; now and then save an earlier step anew, which may be gone."""
    root = ModelStore(world, who)
    first = (await latest_step(root) or 0) + 1
    for step in range(first, first + steps):
        earlier = step - world.chance.choice((1, 1, 2))
        again = earlier if earlier in world.committed and world.chance.random() < 0.2 else None
        for number, overwrite in ((again, True), (step, False)):
            if number is None:
                continue
            await claims.hold(number)
            store, draft = (
                root.child(directory_of(number)),
                draft_of(program + 50 * (step - number) * overwrite, number),
            )
            for stored in draft.objects:
                await store.put(stored.name)
            with suppress(CheckpointExists, CheckpointReplaced):
                await commit(store, draft, overwrite=overwrite)
            claims.release(number)
            await prune(world, who, claims)


async def prune(world: World, who: str, claims: Claims) -> None:
    root = ModelStore(world, who)
    await retention.prune_steps(root, KeepLatest(KEEP), in_use=claims, claim=claims.claim)


async def read(world: World, who: str) -> None:
    """Pin the newest step or the one before it, and read it."""
    root = ModelStore(world, who)
    step = await latest_step(root)
    if step is None:
        return
    store, pin = root.child(directory_of(max(1, step - world.chance.randrange(2)))), pins.new_pin(who)
    try:
        await pins.put_pin(store, pin)
    except CheckpointNotFound:
        return
    try:
        manifest = await read_manifest(store)
        for name in manifest.object_names:
            await store.get(name)
    except (CheckpointNotFound, ObjectNotFound) as error:
        standing = world.standing().get(parse_step(store.directory) or 0)
        if standing is None or standing.identity == manifest.identity:  # else it was saved anew meanwhile
            raise Broken(f"{store.url} was pinned, and removed: {error}") from error
    except ManifestCorrupt:
        if world.first is not damaged or step > FIRST + 1:
            raise
    await pins.remove_pin(store, pin)


async def play(seed: int) -> World:
    """Play one interleaving, chosen by a seed; raise `Broken` where anything goes wrong."""
    world = World(seed)
    retention.time.time = lambda: world.clock  # type: ignore[attr-defined]
    chance = world.chance
    claims = Claims(world, "job")
    programs = [
        ("job", lambda: save(world, "job", 1, 4, claims)),
        ("chores", lambda: prune(world, "chores", claims)),
        ("eval", lambda: read(world, "eval")),
        ("eval-2", lambda: read(world, "eval-2")),
        ("cleaner", lambda: prune(world, "cleaner", Claims(world, "cleaner"))),
    ]
    tasks = {who: asyncio.ensure_future(make()) for who, make in programs}
    restarted = False
    try:
        while await _next(world, tasks):
            world.check()
            if chance.random() < 0.01:
                world.killed.add(chance.choice(["eval", "eval-2", "cleaner"]))
            if not restarted and chance.random() < 0.02:
                world.killed |= {"job", "chores"}  # one process
                restarted = True
                again = Claims(world, "again")
                tasks["again"] = asyncio.ensure_future(save(world, "again", 2, 3, again))
            if chance.random() < 0.05 and tasks["cleaner"].done():
                tasks["cleaner"] = asyncio.ensure_future(prune(world, "cleaner", Claims(world, "cleaner")))
        await _end(world, tasks)
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
    return world


async def _next(world: World, tasks: dict[str, asyncio.Future[None]]) -> bool:
    """Let one program that lives do its next operation; return whether any is left."""
    for _ in range(_SETTLE):
        await asyncio.sleep(0)
    for who, task in tasks.items():
        if task.done() and who not in world.killed:
            task.result()
    for _ in range(_LONGEST):
        ready = [at for at, (who, future) in enumerate(world.waiting) if who not in world.killed and not future.done()]
        if ready:
            break
        await asyncio.sleep(0)
    else:
        return False
    world.waiting.pop(world.chance.choice(ready))[1].set_result(None)
    return True


async def _end(world: World, tasks: dict[str, asyncio.Future[None]]) -> None:
    """Two days later a last prune leaves what is kept, and nothing else of this package."""
    world.clock += 2 * 24 * 3600
    tasks["last"] = asyncio.ensure_future(prune(world, "last", Claims(world, "last")))
    world.killed |= tasks.keys() - {"last"}
    while await _next(world, tasks):
        world.check()
    tasks["last"].result()
    standing = world.standing()
    kept = sorted(world.committed)[-KEEP:]
    for directory, objects in world.objects.items():
        step, foreign = parse_step(directory), {FOREIGN.get(directory)}
        left = objects.keys() - foreign
        if world.killed:  # a save that replaced a stock step, and was killed before it deleted that
            left -= set(filter(is_stock_object, left))
        if step is None or step in kept:
            continue
        if step not in standing and left:
            raise Broken(f"step {step} is gone, and these are left: {sorted(left)}")
