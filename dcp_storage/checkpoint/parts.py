"""Checkpoints of saves without collectives: each rank's part manifest, grouped by attempt, and merged."""

import asyncio
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from dcp_storage.checkpoint.fetch import fetch_manifest
from dcp_storage.errors import CheckpointNotFound, ManifestCorrupt, ObjectNotFound
from dcp_storage.format.contents import Contents
from dcp_storage.format.manifest.manifest import Manifest
from dcp_storage.format.manifest.merge import is_complete, merge
from dcp_storage.format.names import MANIFEST, ObjectName, parse_part_manifest
from dcp_storage.format.stock.manifest import StockManifest
from dcp_storage.format.stock.merge import merge_stock
from dcp_storage.store.base import Store
from dcp_storage.words import counted

_MOST_NAMED = 5

logger = logging.getLogger(__name__)

Attempts = dict[str | None, dict[int, ObjectName]]
"""The names of manifests, by attempt and by rank; the attempt of DCP's own writers is `None`."""


async def read_parts(store: Store) -> Contents:
    """Read and merge the parts of the newest complete attempt.

    Raises:
        CheckpointNotFound: There are no parts.
        ManifestCorrupt: A part is damaged, no attempt is complete, or there are parts of DCP's own writers, too.
        StoreError: A part could not be read.
    """
    try:
        names = await store.list()
    except ObjectNotFound:
        names = {}
    attempts = group_parts(names)
    if not attempts:
        raise await _not_found(store, len(names))
    if None not in attempts:
        return await _read_newest(store, attempts)
    if len(attempts) > 1:
        raise _mixed(store)
    parts = await _read_all(store, None, attempts[None])
    stock = {rank: part for rank, part in parts.items() if isinstance(part, StockManifest)}
    if len(stock) < len(parts):
        raise _mixed(store)
    return merge_stock(stock, store.url)


async def _not_found(store: Store, objects: int) -> CheckpointNotFound:
    below = sorted(await store.directories(), key=_by_number)
    found = f"{counted(objects, 'object')} there, but no committed checkpoint" if objects else "nothing is there"
    advice = "Check the path, or list its parent directory"
    if below:
        found = found if objects else "only directories are there"
        newest = ", ".join(below[-_MOST_NAMED:])
        advice = f"Use one of the directories below it: {'..., ' if len(below) > _MOST_NAMED else ''}{newest}"
    return CheckpointNotFound(f"no checkpoint at {store.url}: {found} (no {MANIFEST}). {advice}", url=store.url)


def _by_number(name: str) -> list[str | int]:
    """Return a key that sorts `step-9` before `step-10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def group_parts(names: Iterable[ObjectName]) -> Attempts:
    """Return the part manifests among the names, by attempt and rank."""
    attempts: defaultdict[str | None, dict[int, ObjectName]] = defaultdict(dict)
    for name in names:
        if part := parse_part_manifest(name):
            attempts[part.attempt][part.rank] = name
    return dict(attempts)


async def complete_attempts(store: Store, attempts: Attempts) -> list[Manifest]:
    """Return the lowest rank's part of each complete attempt, newest attempt first."""
    return [part for part in await _first_parts(store, attempts) if is_complete(part, attempts[part.attempt])]


async def read_attempt(store: Store, attempt: str | None, names: Mapping[int, ObjectName]) -> list[Manifest]:
    """Read all parts of an attempt of this package's writers."""
    parts = await _read_all(store, attempt, names)
    return [part for part in parts.values() if isinstance(part, Manifest)]


async def _read_newest(store: Store, attempts: Attempts) -> Manifest:
    firsts = await _first_parts(store, attempts)
    incomplete = [part for part in firsts if not is_complete(part, attempts[part.attempt])]
    chosen = next((part for part in firsts if part not in incomplete), firsts[0])
    for part in incomplete:
        if part.created > chosen.created:
            there = sorted(attempts[part.attempt])
            logger.warning(
                "%s: loading the save of %s, not the one of %s by %d ranks, of which only these committed: %s",
                *(store.url, chosen.created, part.created, part.world_size, there),
            )
    return merge(await read_attempt(store, chosen.attempt, attempts[chosen.attempt]), store.url)


async def _first_parts(store: Store, attempts: Attempts) -> list[Manifest]:
    """Return the lowest rank's part of each attempt, newest attempt first."""
    ours = {attempt: names for attempt, names in attempts.items() if attempt is not None}
    firsts = await asyncio.gather(
        *(read_attempt(store, attempt, {min(names): names[min(names)]}) for attempt, names in ours.items())
    )
    return sorted((part for parts in firsts for part in parts), key=lambda part: part.created, reverse=True)


async def _read_all(store: Store, attempt: str | None, names: Mapping[int, ObjectName]) -> dict[int, Contents]:
    parts = dict(
        zip(names, await asyncio.gather(*(fetch_manifest(store, name) for name in names.values())), strict=True)
    )
    for rank, part in parts.items():
        if isinstance(part, Manifest) and (part.attempt, part.rank) != (attempt, rank):
            raise ManifestCorrupt(
                f"{store.url}/{names[rank]} is the part of rank {part.rank} of attempt {part.attempt}: it was renamed",
                url=store.url,
                object_name=names[rank],
            )
    return parts


def _mixed(store: Store) -> ManifestCorrupt:
    return ManifestCorrupt(f"{store.url} mixes parts of DCP's own writers and of this package", url=store.url)
