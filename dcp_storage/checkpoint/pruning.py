"""Removes what interrupted saves left in a checkpoint's directory."""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from dcp_storage.checkpoint.manifests import read_manifest
from dcp_storage.checkpoint.orphans import orphans_and_foreign
from dcp_storage.errors import CheckpointNotFound
from dcp_storage.format.names import ObjectName, save_of
from dcp_storage.store.base import Store, times_of

A_DAY = timedelta(days=1)
"""Longer than any save takes, and than clocks differ."""


@dataclass(frozen=True)
class Pruning:
    """What `prune` did, or would do.

    Attributes:
        url: The checkpoint's directory.
        removed: Orphans that were removed (or would be, with `dry_run`), with their sizes in bytes.
        kept: Orphans that are too recent: their save may still be running.
    """

    url: str
    removed: dict[ObjectName, int]
    kept: dict[ObjectName, int]


async def prune_store(store: Store, older_than: timedelta, *, dry_run: bool = False) -> Pruning:
    """Remove what interrupted saves left in an open store; see `prune`."""
    now = time.time()
    listed = await store.list()
    times = times_of(store.url, listed)
    # Read after the listing: objects committed since then are named, and objects put since then are not listed.
    orphans = await _orphans(store, listed)
    old = _old_enough(orphans, times, now - older_than.total_seconds())
    if not dry_run:
        await store.delete(sorted(old))
    sizes = {name: listed[name].size for name in orphans}
    removed = {name: size for name, size in sizes.items() if name in old}
    return Pruning(store.url, removed, {name: size for name, size in sizes.items() if name not in old})


async def _orphans(store: Store, names: Iterable[ObjectName]) -> list[ObjectName]:
    try:
        return orphans_and_foreign(names, await read_manifest(store))[0]
    except CheckpointNotFound:
        left_by_the_first_save = orphans_and_foreign(names, None)[0]
        if not left_by_the_first_save:
            raise
        return left_by_the_first_save


def _old_enough(orphans: Iterable[ObjectName], times: Mapping[ObjectName, float], before: float) -> set[ObjectName]:
    """Return the orphans whose save wrote nothing after `before`."""
    by_save: defaultdict[str | None, list[ObjectName]] = defaultdict(list)
    for name in orphans:
        by_save[save_of(name)].append(name)
    dead = (names for names in by_save.values() if max(times[name] for name in names) <= before)
    return {name for names in dead for name in names}
