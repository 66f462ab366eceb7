"""Reads and checks every block of a checkpoint, and finds other objects next to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dcp_storage.checkpoint.manifests import read_manifest
from dcp_storage.checkpoint.orphans import orphans_and_foreign
from dcp_storage.errors import CheckpointNotFound, ConfigError, StoreError
from dcp_storage.format.contents import CheckedItem, Contents, HeldObject
from dcp_storage.format.names import MANIFEST, ObjectName
from dcp_storage.store.base import Store
from dcp_storage.transfer.check import BlockFault, check_runs, runs_of
from dcp_storage.transfer.context import Context
from dcp_storage.transfer.ranges import Block


@dataclass(frozen=True)
class Damage:
    """A difference between a checkpoint and what was written.

    Attributes:
        object_name: The damaged object.
        offset: Offset of the damaged block in the object, or `None` for the object as a whole.
        fqns: The entries affected.
        what: A description.
    """

    object_name: ObjectName
    offset: int | None
    fqns: tuple[str, ...]
    what: str


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        url: The checkpoint.
        stock: Whether stock DCP wrote it. It has no check values: only presence and size of its objects are checked.
        part: The rank and the world size, if it is the part of one rank that saved it alone.
        tensors: Number of tensors.
        others: Number of entries that are not tensors.
        objects: Number of data objects.
        blocks: Number of blocks that were read and checked.
        raw_bytes: Size of these blocks in memory.
        stored_bytes: Size of the data objects.
        damage: All faults, by object and offset.
        orphans: Objects of this package, with their sizes, that are not part of the checkpoint: of an interrupted save,
            or of one that is still running.
        foreign: Objects that do not belong to this package.
        sha256: The digest that covers the whole checkpoint, if it was saved with `Codec(digest="sha256")`.
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
    orphans: dict[ObjectName, int]
    foreign: tuple[ObjectName, ...]
    sha256: str | None = None

    @property
    def sound(self) -> bool:
        """Whether there is no damage."""
        return not self.damage


async def verify_store(context: Context, expect: str | None) -> Verification:
    """Read and check every block of the checkpoint in an open store; see `verify`."""
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
        raise ConfigError(f"{url} has no SHA-256 digests: save with Codec(digest='sha256') to use expect")
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
    context: Context, contents: Contents, sizes: Mapping[ObjectName, int]
) -> tuple[list[Block], list[Damage]]:
    """Check the blocks of existing objects; return them, and the damage."""
    codec = contents.codec
    if codec is None:
        return [], []
    items, names = list(contents.checked_items()), contents.object_names
    runs = list(runs_of(items, codec, [sizes.get(name, 0) for name in names]))
    faults = await check_runs(context, runs, names, codec, contents.digest)
    blocks = [block for run in runs for block in run.blocks]
    return blocks, [_damage(fault, items, names) for fault in faults]


def _damage(fault: BlockFault, items: Sequence[CheckedItem], names: Sequence[ObjectName]) -> Damage:
    run = fault.run
    block = fault.block or run.blocks[0]
    what = f"a damaged block of {block.length} bytes"
    if fault.block is None:
        what = f"the digest of {run.stop - run.start} bytes is not the one that was written, though each block is sound"
    return Damage(names[run.object], block.offset, (items[block.item].fqn,), what)


async def _require_unchanged(store: Store, contents: Contents) -> None:
    """Raise if another save replaced the checkpoint meanwhile: then its objects were deleted, not damaged."""
    try:
        now = await read_manifest(store)
    except CheckpointNotFound:
        now = None
    if now is None or now.identity != contents.identity:
        raise StoreError(f"{store.url} was replaced by another save while it was read: verify it again", url=store.url)
