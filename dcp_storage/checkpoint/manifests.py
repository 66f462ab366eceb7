"""Finds, reads and commits manifests."""

import logging

from dcp_storage.checkpoint.fetch import fetch_manifest
from dcp_storage.checkpoint.parts import complete_attempts, group_parts, read_attempt, read_parts
from dcp_storage.errors import (
    AccessDenied,
    CheckpointNotFound,
    DcpStorageError,
    ManifestCorrupt,
    ObjectNotFound,
    UnsupportedFormat,
)
from dcp_storage.format.contents import Contents
from dcp_storage.format.manifest.draft import Draft, encode
from dcp_storage.format.names import MANIFEST, ObjectName, Part, parse_part_manifest, part_manifest
from dcp_storage.store.base import Store

logger = logging.getLogger(__name__)

_LISTINGS = 5
"""How often parts are listed, if a newer save deletes what was listed."""


async def read_manifest(store: Store) -> Contents:
    """Read, decode and validate the manifest of the checkpoint at a store's prefix.

    If there is no `.metadata`, but manifests of single ranks (a save without collectives), they are merged.

    Raises:
        CheckpointNotFound: There is neither.
        ManifestCorrupt: A manifest is damaged or invalid, or that of a rank is missing.
        UnsupportedFormat: It has a newer format, or is a pickle that names globals no stock checkpoint uses.
        StoreError: It could not be read.
    """
    for listings_left in reversed(range(_LISTINGS)):
        try:
            return await fetch_manifest(store, MANIFEST)
        except ObjectNotFound:
            pass
        try:
            return await read_parts(store)
        except ObjectNotFound:
            if not listings_left:
                raise
        except DcpStorageError as error:
            # A commit may have replaced them with one for all ranks while they were listed and read.
            try:
                return await fetch_manifest(store, MANIFEST)
            except ObjectNotFound:
                raise error from error.__cause__
    raise AssertionError("the last listing returns or raises")


async def write_manifest(store: Store, draft: Draft, *, over: str | None) -> None:
    """Commit a manifest atomically: the last step of a save.

    `over` is the version of the manifest that may be replaced, `ABSENT`, or `None` for any.

    Raises:
        ObjectExists: There is a manifest with another version.
    """
    name = MANIFEST  # also for one rank's part, if there are no others to merge it with
    if draft.rank is not None and draft.attempt is not None:
        name = part_manifest(Part(draft.attempt, draft.rank))
    await store.commit(name, encode(draft), over)


async def is_committed(store: Store, *, parts: bool) -> bool:
    """Return whether a checkpoint is committed here: a `.metadata`, or parts of DCP's own writers.

    With `parts`, a complete attempt of this package counts too, and so do parts that cannot be read.
    """
    if await store.probe(MANIFEST):
        return True
    for listings_left in reversed(range(_LISTINGS)):
        attempts = group_parts(await _names(store))
        try:
            return None in attempts or (parts and bool(await complete_attempts(store, attempts)))
        except (ManifestCorrupt, UnsupportedFormat):
            return True
        except ObjectNotFound:  # a newer save or a prune deleted what was listed
            if not listings_left:
                raise
    raise AssertionError("the last listing returns or raises")


async def _names(store: Store) -> list[ObjectName]:
    """List the names; none if listing is denied, since parts could not be read either."""
    try:
        return list(await store.list())
    except AccessDenied:
        return []


async def replaced_objects(store: Store) -> list[ObjectName]:
    """Return the objects and parts of the checkpoint that a new manifest replaces.

    If the manifest cannot be read, its objects are unknown, so they stay. Names that no save uses are left out: a
    manifest must not make a save delete foreign files.
    """
    names = await _names(store)
    parts = [name for name in names if parse_part_manifest(name) is not None]
    if names and not parts and MANIFEST not in names:
        return []
    try:
        old = await read_manifest(store)
        named = old.deletable()
    except (CheckpointNotFound, AccessDenied):  # if access is denied, the save was refused before data moved
        return []
    except (ManifestCorrupt, UnsupportedFormat) as error:
        logger.warning("cannot read the manifest to replace or remove, so its objects are left for now: %s", error)
        return []
    return [*parts, *named]


async def superseded_objects(store: Store, part: Draft) -> list[ObjectName]:
    """Return the objects of older complete attempts, if this part completes its own."""
    attempts = group_parts(await _names(store))
    complete = [first.attempt for first in await complete_attempts(store, attempts)]
    if part.attempt not in complete:
        return []
    superfluous: list[ObjectName] = []
    for older in complete[complete.index(part.attempt) + 1 :]:
        superfluous += attempts[older].values()
        for each in await read_attempt(store, older, attempts[older]):
            superfluous += each.deletable()
    return superfluous
