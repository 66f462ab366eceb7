"""Every block of a checkpoint, read and checked without loading it. No torch."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any, NamedTuple

from dcp_storage.config import Transfer
from dcp_storage.errors import CheckpointNotFound, ConfigError, ManifestCorrupt, StoreError
from dcp_storage.format.digests import MAX_DIGESTED_BYTES
from dcp_storage.format.dtypes import ITEM_BYTES
from dcp_storage.format.legacy import StockManifest
from dcp_storage.format.manifest import Manifest
from dcp_storage.format.names import MANIFEST
from dcp_storage.format.schema import Segment
from dcp_storage.leftovers import object_names, split
from dcp_storage.observe import Observer, observed, silent
from dcp_storage.store.base import Store
from dcp_storage.store.open import open_store
from dcp_storage.transfer.check import Fault, Run, check_runs
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
        sha256: The one number that proves all of it, where it was saved with `Codec(digest="sha256")`.
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
    sha256: str | None = None

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
    expect: str | None = None,
) -> Verification:
    """Read and check every block of a checkpoint, and find all that is damaged, missing or left over.

    With `expect`, the `sha256` that an earlier `verify` told, what is read has to be that same checkpoint: nobody can
    have changed a bit of it. It must have been saved with `Codec(digest="sha256")`.

    Memory in flight is at most `transfer.concurrency` reads, of 16 MiB each or less, and one block a thread.

    Raises:
        CheckpointNotFound: There is no checkpoint at this path.
        ManifestCorrupt: Its manifest is damaged, so that nothing tells what it should hold.
        UnsupportedFormat: It is of a later format, or a pickle that names what no stock checkpoint does.
        StoreError: It could not be read, or another save replaced it meanwhile.
        ConfigError: The path or the options are impossible; `expect` is no SHA-256, or the checkpoint has none.
    """
    if expect is not None and not re.fullmatch("[0-9a-fA-F]{64}", expect):
        raise ConfigError(f"expect is {expect!r:.80}, which is no SHA-256: 64 hexadecimal digits")
    return run_async(_verify(open_store(path, storage_options), transfer, observer or silent, expect))


async def _verify(closed: Store, transfer: Transfer, observer: Observer, expect: str | None) -> Verification:
    async with closed as store:
        manifest = await read_manifest(store)
        if isinstance(manifest, Manifest):
            manifest.check_whole()
        sizes = await store.list()
        expected = _expected(manifest)
        damage = [fault for each in expected if (fault := _object_fault(each, sizes.get(each.name)))]
        blocks: list[Block] = []
        if isinstance(manifest, Manifest):
            blocks, damaged = await _block_damage(store, manifest, sizes, transfer, observer)
            damage += damaged
        proof = manifest.sha256 if isinstance(manifest, Manifest) and manifest.head.digest == "sha256" else None
        damage += _unexpected(store.url, proof, expect)
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
            sha256=proof,
        )


def _unexpected(url: str, proof: str | None, expect: str | None) -> list[Damage]:
    if expect is None or proof == expect.lower():
        return []
    if proof is None:
        raise ConfigError(
            f"{url} has no SHA-256 digests that one number could prove: Codec(digest='sha256') makes them"
        )
    return [Damage(MANIFEST, None, (), f"its head's SHA-256 is {proof}, and not the one that is expected")]


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
    planes: int
    segments: Sequence[Segment]
    digests: Sequence[str]


def _items(manifest: Manifest) -> Iterator[_StoredItem]:
    for fqn, tensor in manifest.tensors.items():
        item_bytes = ITEM_BYTES[tensor.dtype]
        for number, box in enumerate(tensor.boxes):
            segments, digests = tensor.segments(number), tensor.digests(number)
            yield _StoredItem(fqn, box.numel * item_bytes, tensor.planes, segments, digests)
    for fqn, entry in manifest.bytes.items():
        yield _StoredItem(fqn, entry.size, 1, entry.segments, entry.digests)


def _runs(manifest: Manifest, items: Sequence[_StoredItem], sizes: Mapping[str, int]) -> Iterator[Run]:
    """Yield the blocks that lie within their objects as these are; the others are told with the objects."""
    there = [sizes.get(name, 0) for name, _ in _table(manifest)]
    for number, item in enumerate(items):
        count = -(-item.raw_bytes // manifest.codec.block_bytes)
        blocks = locate(number, range(count), item.segments, item.raw_bytes, manifest.codec)
        for segment, digest in zip_longest(item.segments, item.digests, fillvalue=""):
            assert isinstance(segment, Segment), "there are as many digests as segments, or none"
            whole = list(islice(blocks, len(segment.lengths)))
            held = [block for block in whole if block.offset + block.length <= there[block.object]]
            if digest and held == whole:
                yield Run(_checked_size(manifest, item, whole), item.planes, digest)
            else:
                yield from (Run([block], item.planes, "") for block in held)


def _checked_size(manifest: Manifest, item: _StoredItem, blocks: Sequence[Block]) -> Sequence[Block]:
    """Return blocks that are hashed in one go, and held in memory for that."""
    if blocks[-1].stop - blocks[0].start > MAX_DIGESTED_BYTES:
        raise ManifestCorrupt(
            f"{item.fqn}: a digest of more than {MAX_DIGESTED_BYTES} bytes ({manifest!r})", fqn=item.fqn
        )
    return blocks


async def _block_damage(
    store: Store, manifest: Manifest, sizes: Mapping[str, int], transfer: Transfer, observer: Observer
) -> tuple[list[Block], list[Damage]]:
    """Check what is there of a manifest's blocks; return it, and what of it is damaged."""
    items = list(_items(manifest))
    runs = list(_runs(manifest, items, sizes))
    blocks = [block for run in runs for block in run.blocks]
    names = [name for name, _ in _table(manifest)]
    with observed(observer, "verify", store.url, sum(block.stop - block.start for block in blocks)) as advance:
        faults = await check_runs(
            store, runs, names, manifest.codec, manifest.head.digest, transfer=transfer, advance=advance
        )
    return blocks, [_damage(fault, items, names) for fault in faults]


def _damage(fault: Fault, items: Sequence[_StoredItem], names: Sequence[str]) -> Damage:
    run = fault.run
    block = fault.block or run.blocks[0]
    what = f"a damaged block of {block.length} bytes"
    if fault.block is None:
        what = (
            f"the digest of {run.stop - run.start} bytes, each block of which is sound, is not the one that was written"
        )
    return Damage(names[run.object], block.offset, (items[block.item].fqn,), what)


async def _require_unchanged(store: Store, manifest: Manifest | StockManifest) -> None:
    """Tell damage from a checkpoint that was replaced, its objects deleted, while it was read."""
    try:
        now = await read_manifest(store)
    except CheckpointNotFound:
        now = None
    if now != manifest:
        raise StoreError(f"{store.url} was replaced by another save while it was read: verify it again", url=store.url)
