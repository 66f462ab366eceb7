"""The manifest in its store: found, read and committed."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from dcp_storage.errors import (
    CheckpointNotFound,
    DcpStorageError,
    ManifestCorrupt,
    ObjectNotFound,
    UnsupportedFormat,
)
from dcp_storage.format.legacy import StockManifest, decode_stock_metadata
from dcp_storage.format.manifest import Manifest, decode, encode, is_manifest
from dcp_storage.format.merge import merge, merge_stock
from dcp_storage.format.names import MANIFEST, is_data_object, is_stock_object, parse_rank_manifest, rank_manifest
from dcp_storage.format.validate import validate
from dcp_storage.store.base import Store

logger = logging.getLogger(__name__)

R = TypeVar("R")


async def read_manifest(store: Store) -> Manifest | StockManifest:
    """Read, decode and validate the manifest of the checkpoint at a store's prefix.

    Where there is no `.metadata` but manifests of single ranks (a save without collectives), they are merged.

    Raises:
        CheckpointNotFound: There is neither.
        ManifestCorrupt: There is one, and it is damaged or cannot be right; or a rank's is missing.
        UnsupportedFormat: It is of a later format, or a pickle that names what no stock checkpoint does.
        StoreError: It could not be read.
    """
    try:
        return await _read_whole(store)
    except ObjectNotFound:
        pass
    try:
        return await _read_rank_manifests(store)
    except DcpStorageError as error:
        # A commit may have replaced them by one for all while they were listed and read.
        try:
            return await _read_whole(store)
        except ObjectNotFound:
            raise error from error.__cause__


async def _read_whole(store: Store) -> Manifest | StockManifest:
    return await _read(store, MANIFEST, partial(_decode, where=f"{store.url}/{MANIFEST}"))


async def _read(store: Store, name: str, parse: Callable[[bytes], R]) -> R:
    """Read and parse; what is damaged is read once more, as a block is."""
    try:
        return parse(await store.get(name))
    except ManifestCorrupt:
        return parse(await store.get(name))


async def _read_rank_manifests(store: Store) -> Manifest | StockManifest:
    try:
        names = await store.list()
    except ObjectNotFound:
        names = {}
    ranks = sorted(rank for name in names if (rank := parse_rank_manifest(name)) is not None)
    if not ranks:
        found = f"the {len(names)} objects there are no committed checkpoint" if names else "nothing is there"
        raise CheckpointNotFound(
            f"no checkpoint at {store.url}: {found} (no {MANIFEST}). Check the path, or list the steps beside it",
            url=store.url,
        )
    parts = dict(zip(ranks, await asyncio.gather(*(_read_part(store, rank) for rank in ranks)), strict=True))
    ours = [part for part in parts.values() if isinstance(part, Manifest)]
    if not ours:
        return merge_stock({rank: part for rank, part in parts.items() if isinstance(part, StockManifest)}, store.url)
    if len(ours) < len(parts):
        raise ManifestCorrupt(f"{store.url} holds parts of DCP's own writers and of this package, mixed", url=store.url)
    return validate(merge(ours, store.url), store.url)


async def _read_part(store: Store, rank: int) -> Manifest | StockManifest:
    name = rank_manifest(rank)
    return await _read(store, name, partial(_decode, where=f"{store.url}/{name}"))


def _decode(data: bytes, where: str) -> Manifest | StockManifest:
    return validate(decode(data, where), where) if is_manifest(data) else decode_stock_metadata(data, where=where)


async def commit_manifest(store: Store, manifest: Manifest, *, replace: bool = True) -> None:
    """Make a checkpoint of the objects that a manifest names: the last act of a save, and an atomic one.

    Raises:
        ObjectExists: One was committed meanwhile, and `replace` is false.
    """
    name = MANIFEST if manifest.rank is None else rank_manifest(manifest.rank)
    await (store.commit if replace else store.create)(name, encode(manifest))


async def is_committed(store: Store, rank: int | None) -> bool:
    """Return whether a checkpoint stands here: any at all, or for a rank by itself, one that its own would change."""
    names = {MANIFEST, rank_manifest(0)} if rank is None else {MANIFEST, rank_manifest(rank)}
    for name in names:
        try:
            await store.size(name)
        except ObjectNotFound:
            continue
        return True
    return False


async def replaced_objects(store: Store) -> list[str]:
    """Return what a new manifest makes superfluous: objects, and rank manifests, of the checkpoint that it replaces.

    A manifest that cannot be read names nothing: what it stood for stays where it is. So does what one names that is
    not of the form of a save's objects: a manifest must not make a save delete somebody else's file.
    """
    try:
        old = await read_manifest(store)
    except CheckpointNotFound:
        return []
    except (ManifestCorrupt, UnsupportedFormat) as error:
        logger.warning("the checkpoint that is being replaced cannot be read, so its objects are left: %s", error)
        return []
    parts = [name for name in await store.list() if parse_rank_manifest(name) is not None]
    if isinstance(old, StockManifest):
        return [*parts, *sorted(filter(is_stock_object, {item.object_name for item in old.storage.values()}))]
    return [*parts, *(stored.name for stored in old.objects if is_data_object(stored.name))]
