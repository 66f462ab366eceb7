"""Removes what dead saves left in a checkpoint's directory."""

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dcp_storage.errors import CheckpointNotFound, ConfigError
from dcp_storage.format.names import save_of
from dcp_storage.leftovers import split
from dcp_storage.store.base import Store
from dcp_storage.store.open import open_store
from dcp_storage.transfer.manifests import read_manifest
from dcp_storage.transfer.workers import run_async

A_DAY = timedelta(days=1)
"""Longer than any one save takes, and than clocks of machines differ."""


@dataclass(frozen=True)
class Pruning:
    """What `prune` did, or would do.

    Attributes:
        url: The checkpoint's directory.
        removed: Orphans that were removed (with `dry_run`: that would be), with their sizes in bytes.
        kept: Orphans that are too young: their save may be under way.
    """

    url: str
    removed: dict[str, int]
    kept: dict[str, int]


def prune(
    path: str | os.PathLike[str],
    *,
    older_than: timedelta = A_DAY,
    storage_options: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> Pruning:
    """Remove the objects of this package that no manifest names, and temporary files of commits that died.

    Only the objects of saves whose last write is at least `older_than` ago, by the times that the store tells and this
    machine's clock: the objects of a save under way are named by no manifest either. Nothing that the manifest names
    and no foreign file is ever removed. Where nothing was committed, what a dead first save left is removed too.

    Raises:
        CheckpointNotFound: Nothing of this package is there: neither a checkpoint nor what a save left.
        ManifestCorrupt: The manifest is damaged, so that nothing tells what may be removed; nothing was.
        UnsupportedFormat: It is of a later format, or a pickle that names what no stock checkpoint does; the same.
        StoreError: The store failed, or does not tell when objects were written.
        ConfigError: An argument is impossible.
    """
    if older_than < timedelta(0):
        raise ConfigError(f"older_than is {older_than}; it must not be negative")

    async def opened() -> Pruning:
        async with open_store(path, storage_options) as store:
            return await prune_store(store, older_than, dry_run=dry_run)

    return run_async(opened())


async def prune_store(store: Store, older_than: timedelta, *, dry_run: bool = False) -> Pruning:
    """Do what `prune` does, in a store that is open."""
    now = time.time()
    times = await store.modified()
    sizes = await store.list()
    # Read after the lists: what was committed since then is named, and what was put since then is not in them.
    orphans = await _orphans(store, times.keys() & sizes.keys())
    old = _old_enough(orphans, times, now - older_than.total_seconds())
    if not dry_run:
        await store.delete(sorted(old))
    removed = {name: sizes[name] for name in orphans if name in old}
    return Pruning(store.url, removed, {name: sizes[name] for name in orphans if name not in old})


async def _orphans(store: Store, names: Iterable[str]) -> list[str]:
    try:
        return split(names, await read_manifest(store))[0]
    except CheckpointNotFound:
        left_by_the_first_save = split(names, None)[0]
        if not left_by_the_first_save:
            raise
        return left_by_the_first_save


def _old_enough(orphans: Iterable[str], times: Mapping[str, float], before: float) -> set[str]:
    """Return the orphans of those saves that wrote nothing since."""
    by_save: defaultdict[str | None, list[str]] = defaultdict(list)
    for name in orphans:
        by_save[save_of(name)].append(name)
    dead = (names for names in by_save.values() if max(times[name] for name in names) <= before)
    return {name for names in dead for name in names}
