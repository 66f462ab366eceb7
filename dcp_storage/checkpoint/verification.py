"""Reads and checks every block of a checkpoint, and finds what else lies there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dcp_storage.checkpoint.manifests import read_manifest
from dcp_storage.checkpoint.orphans import orphans_and_foreign
from dcp_storage.errors import CheckpointNotFound, ConfigError, StoreError
from dcp_storage.format.contents import CheckedItem, Contents, HeldObject
from dcp_storage.format.names import MANIFEST
from dcp_storage.store.base import Store
from dcp_storage.transfer.check import BlockFault, check_runs, runs_of
from dcp_storage.transfer.context import Context
from dcp_storage.transfer.ranges import Block


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
        others: Entries in it that are not tensors.
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


async def verify_store(context: Context, expect: str | None) -> Verification:
    """Read and check every block of the checkpoint in a store that is open; see `verify`."""
    store = context.store
    contents = await read_manifest(store)
    contents.check_whole()
    sizes = {name: listed.size for name, listed in (await store.list()).items()}
    held = contents.objects_held()
    damage = [fault for each in held if (fault := _object_fault(each, sizes.get(each.name)))]
    blocks, damaged = await _block_damage(context, contents, sizes)
    damage += damaged
    damage += _unexpected(store.url, contents.proof, expect)
    if damage:
        await _require_unchanged(store, contents)
    orphans, foreign = orphans_and_foreign(sizes, contents)
    return Verification(
        url=store.url,
        stock=contents.stock,
        part=contents.part,
        tensors=len(contents.tensors),
        others=len(contents.bytes),
        objects=len(held),
        blocks=len(blocks),
        raw_bytes=sum(block.stop - block.start for block in blocks),
        stored_bytes=sum(sizes.get(each.name, 0) for each in held),
        damage=tuple(sorted(damage, key=lambda fault: (fault.object_name, fault.offset or 0))),
        orphans={name: sizes[name] for name in orphans},
        foreign=tuple(foreign),
        sha256=contents.proof,
    )


def _unexpected(url: str, proof: str | None, expect: str | None) -> list[Damage]:
    if expect is None or proof == expect.lower():
        return []
    if proof is None:
        raise ConfigError(f"{url} has no SHA-256 digests: save with Codec(digest='sha256') to prove it by one number")
    return [Damage(MANIFEST, None, (), f"its head's SHA-256 is {proof}, not the expected one")]


def _object_fault(expected: HeldObject, size: int | None) -> Damage | None:
    if size is None:
        return Damage(expected.name, None, expected.fqns, "the object is missing")
    if size < expected.size:
        what = f"the object ends {expected.size - size} bytes too early"
    elif size > expected.size and expected.exact:
        what = f"the object is {size - expected.size} bytes too long"
    else:
        return None
    return Damage(expected.name, None, expected.fqns, what)


async def _block_damage(
    context: Context, contents: Contents, sizes: Mapping[str, int]
) -> tuple[list[Block], list[Damage]]:
    """Check the blocks that are there; return them, and what is damaged."""
    codec = contents.codec
    if codec is None:
        return [], []
    items, names = list(contents.checked_items()), contents.object_names
    runs = list(runs_of(items, codec, [sizes.get(name, 0) for name in names]))
    faults = await check_runs(context, runs, names, codec, contents.digest)
    blocks = [block for run in runs for block in run.blocks]
    return blocks, [_damage(fault, items, names) for fault in faults]


def _damage(fault: BlockFault, items: Sequence[CheckedItem], names: Sequence[str]) -> Damage:
    run = fault.run
    block = fault.block or run.blocks[0]
    what = f"a damaged block of {block.length} bytes"
    if fault.block is None:
        what = (
            f"the digest of {run.stop - run.start} bytes, each block of which is sound, is not the one that was written"
        )
    return Damage(names[run.object], block.offset, (items[block.item].fqn,), what)


async def _require_unchanged(store: Store, contents: Contents) -> None:
    """Raise if another save replaced the checkpoint meanwhile: then its objects are gone, not damaged."""
    try:
        now = await read_manifest(store)
    except CheckpointNotFound:
        now = None
    if now is None or now.identity != contents.identity:
        raise StoreError(f"{store.url} was replaced by another save while it was read: verify it again", url=store.url)
