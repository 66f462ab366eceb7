"""Every block of a checkpoint, read and checked without loading it. No torch."""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dcp_storage.config import Transfer
from dcp_storage.errors import CheckpointNotFound, StoreError
from dcp_storage.format.legacy import StockManifest
from dcp_storage.format.manifest import Manifest, Segment
from dcp_storage.leftovers import object_names, split
from dcp_storage.observe import Observer, observed, silent
from dcp_storage.store.base import Store
from dcp_storage.store.open import open_store
from dcp_storage.transfer.check import check_blocks
from dcp_storage.transfer.manifests import read_manifest
from dcp_storage.transfer.ranges import Block, locate
from dcp_storage.transfer.workers import run_async


@dataclass(frozen=True)
class Damage:
    """Something in a checkpoint that is not as it was written.

    Attributes:
        object_name: The object that it is in.
        offset: Where in the object the damaged block begins, or `None` where it is the object as a whole.
        fqns: The entries that it is part of.
        what: What is wrong, in words.
    """

    object_name: str
    offset: int | None
    fqns: tuple[str, ...]
    what: str


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        url: The checkpoint.
        stock: Whether stock DCP wrote it. Its blocks carry no checks: only presence and size of its objects are known.
        part: The rank whose part it is, and of how many, where one rank saved it alone.
        tensors: Tensors in it.
        others: Entries in it that are no tensors.
        objects: Data objects in it.
        blocks: Blocks that were read and checked.
        raw_bytes: Size of these blocks in memory.
        stored_bytes: Size of the data objects.
        damage: All that is wrong, by object and offset.
        orphans: Objects, with their sizes, of this package that are not part of the checkpoint: of a save that died,
            or of one that is under way.
        foreign: Objects that are not this package's.
    """

    url: str
    stock: bool
    part: tuple[int, int] | None
    tensors: int
    others: int
    objects: int
    blocks: int
    raw_bytes: int
    stored_bytes: int
    damage: tuple[Damage, ...]
    orphans: dict[str, int]
    foreign: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damage


def verify(
    path: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    transfer: Transfer = Transfer(),  # noqa: B008 (frozen)
    observer: Observer | None = None,
) -> Verification:
    """Read and check every block of a checkpoint, and find all that is damaged, missing or left over.

    Memory in flight is at most `transfer.concurrency` reads, of 16 MiB each or less, and one block a thread.

    Raises:
        CheckpointNotFound: There is no checkpoint at this path.
        ManifestCorrupt: Its manifest is damaged, so that nothing tells what it should hold.
        UnsupportedFormat: It is of a later format, or a pickle that names what no stock checkpoint does.
        StoreError: It could not be read, or another save replaced it meanwhile.
        ConfigError: The path or the options are impossible.
    """
    return run_async(_verify(open_store(path, storage_options), transfer, observer or silent))


async def _verify(closed: Store, transfer: Transfer, observer: Observer) -> Verification:
    async with closed as store:
        manifest = await read_manifest(store)
        sizes = await store.list()
        expected = _expected(manifest)
        damage = [fault for each in expected if (fault := _object_fault(each, sizes.get(each.name)))]
        blocks: list[Block] = []
        if isinstance(manifest, Manifest):
            blocks, damaged = await _block_damage(store, manifest, sizes, transfer, observer)
            damage += damaged
        if damage:
            await _require_unchanged(store, manifest)
        orphans, foreign = split(sizes, manifest)
        return Verification(
            url=store.url,
            stock=isinstance(manifest, StockManifest),
            part=_part(manifest),
            tensors=len(manifest.tensors),
            others=len(manifest.bytes),
            objects=len(object_names(manifest)),
            blocks=len(blocks),
            raw_bytes=sum(block.stop - block.start for block in blocks),
            stored_bytes=sum(sizes.get(name, 0) for name in object_names(manifest)),
            damage=tuple(sorted(damage, key=lambda fault: (fault.object_name, fault.offset or 0))),
            orphans={name: sizes[name] for name in orphans},
            foreign=tuple(foreign),
        )


def _part(manifest: Manifest | StockManifest) -> tuple[int, int] | None:
    if isinstance(manifest, StockManifest) or manifest.rank is None:
        return None
    return manifest.rank, manifest.world_size


class _Expected(NamedTuple):
    """An object as the manifest describes it; `exact` where it must be of just this size."""

    name: str
    size: int
    exact: bool
    fqns: tuple[str, ...]


def _expected(manifest: Manifest | StockManifest) -> list[_Expected]:
    fqns: defaultdict[str, dict[str, None]] = defaultdict(dict)
    if isinstance(manifest, Manifest):
        for item in _items(manifest):
            for segment in item.segments:
                fqns[manifest.objects[segment.object].name][item.fqn] = None
        return [_Expected(name, size, exact=True, fqns=tuple(fqns[name])) for name, size in _table(manifest)]
    stops: defaultdict[str, int] = defaultdict(int)
    for (fqn, _), stored in manifest.storage.items():
        stops[stored.object_name] = max(stops[stored.object_name], stored.offset + stored.length)
        fqns[stored.object_name][fqn] = None
    return [_Expected(name, stop, exact=False, fqns=tuple(fqns[name])) for name, stop in stops.items()]


def _table(manifest: Manifest) -> Iterator[tuple[str, int]]:
    return ((stored.name, stored.size) for stored in manifest.objects)


def _object_fault(expected: _Expected, size: int | None) -> Damage | None:
    if size is None:
        return Damage(expected.name, None, expected.fqns, "the object is missing")
    if size < expected.size:
        what = f"the object ends {expected.size - size} bytes too early"
    elif size > expected.size and expected.exact:
        what = f"the object is {size - expected.size} bytes too long"
    else:
        return None
    return Damage(expected.name, None, expected.fqns, what)


class _StoredItem(NamedTuple):
    fqn: str
    raw_bytes: int
    segments: Sequence[Segment]


def _items(manifest: Manifest) -> Iterator[_StoredItem]:
    for fqn, tensor in manifest.tensors.items():
        for stored in tensor.chunks:
            yield _StoredItem(fqn, tensor.chunk_bytes(stored), stored.segments)
    for fqn, entry in manifest.bytes.items():
        yield _StoredItem(fqn, entry.size, entry.segments)


def _blocks(manifest: Manifest, items: Sequence[_StoredItem], sizes: Mapping[str, int]) -> list[Block]:
    """Return the blocks that lie within their objects as these are; the others are told with the objects."""
    codec = manifest.codec
    there = [sizes.get(name, 0) for name, _ in _table(manifest)]
    return [
        block
        for number, item in enumerate(items)
        for block in locate(
            number, range(-(-item.raw_bytes // codec.block_bytes)), item.segments, item.raw_bytes, codec
        )
        if block.offset + block.length <= there[block.object]
    ]


async def _block_damage(
    store: Store, manifest: Manifest, sizes: Mapping[str, int], transfer: Transfer, observer: Observer
) -> tuple[list[Block], list[Damage]]:
    """Check what is there of a manifest's blocks; return it, and what of it is damaged."""
    items = list(_items(manifest))
    blocks = _blocks(manifest, items, sizes)
    names = [name for name, _ in _table(manifest)]
    with observed(observer, "verify", store.url, sum(block.stop - block.start for block in blocks)) as advance:
        damaged = await check_blocks(store, blocks, names, manifest.codec, transfer=transfer, advance=advance)
    return blocks, [
        Damage(names[block.object], block.offset, (items[block.item].fqn,), f"a damaged block of {block.length} bytes")
        for block in damaged
    ]


async def _require_unchanged(store: Store, manifest: Manifest | StockManifest) -> None:
    """Tell damage from a checkpoint that was replaced, its objects deleted, while it was read."""
    try:
        now = await read_manifest(store)
    except CheckpointNotFound:
        now = None
    if now != manifest:
        raise StoreError(f"{store.url} was replaced by another save while it was read: verify it again", url=store.url)
