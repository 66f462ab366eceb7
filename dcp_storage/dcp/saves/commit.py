"""The commit of a save."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from dcp_storage.checkpoint.manifests import is_committed, replaced_objects, superseded_objects, write_manifest
from dcp_storage.errors import CheckpointExists, CheckpointReplaced, ManifestCorrupt, ObjectExists, StoreError
from dcp_storage.format.manifest.draft import Draft
from dcp_storage.format.names import MANIFEST
from dcp_storage.store.base import ABSENT, Store

logger = logging.getLogger(__name__)


async def check_place(store: Store, *, overwrite: bool, part: bool) -> None:
    """Check, before data moves, that a save may commit here.

    Raises:
        CheckpointExists: A checkpoint already exists here and may not be replaced.
        AccessDenied: An existing one may not be read, or nothing may be written here.
    """
    if part or not overwrite:
        await check_vacant(store, overwrite=overwrite)
    else:
        await store.probe(MANIFEST)


async def check_vacant(store: Store, *, overwrite: bool) -> None:
    """Check that there is no checkpoint here; with `overwrite`, none that parts cannot replace.

    Raises:
        CheckpointExists: There is one.
    """
    if await is_committed(store, parts=not overwrite):
        raise _exists(store, overwrite=overwrite)


async def commit(store: Store, draft: Draft, *, overwrite: bool = True) -> None:
    """Write the manifest, and only then delete the objects of the one that it replaced.

    Raises:
        CheckpointExists: Another save committed here meanwhile, and this one may not replace it.
        CheckpointReplaced: Another save committed here at the same moment, and may have deleted this one's objects.
        StoreError: The manifest could not be written; the previous checkpoint is still there.
    """
    if draft.attempt is not None:
        await _commit_part(store, draft, overwrite=overwrite)
    elif overwrite:
        await _replace(store, draft)
    else:
        await _create(store, draft, overwrite=False)


async def _replace(store: Store, draft: Draft) -> None:
    # The version is looked up first: the manifest that is replaced must not be newer than the one that is read.
    over = await store.version(MANIFEST)
    superfluous = await replaced_objects(store)
    try:
        await write_manifest(store, draft, over=over)
    except ObjectExists as error:
        raise CheckpointReplaced(
            f"another save committed at {store.url} at the same moment, so this one was discarded: let only one job at "
            "a time save to a path, and save again",
            url=store.url,
        ) from error
    with _warning():
        await store.delete(superfluous)


async def _commit_part(store: Store, part: Draft, *, overwrite: bool) -> None:
    await check_vacant(store, overwrite=overwrite)
    await _create(store, part, overwrite=overwrite)
    if overwrite:
        with _warning():
            await store.delete(await superseded_objects(store, part))


async def _create(store: Store, draft: Draft, *, overwrite: bool) -> None:
    try:
        await write_manifest(store, draft, over=ABSENT)
    except ObjectExists as error:
        raise _exists(store, overwrite=overwrite) from error


@contextmanager
def _warning() -> Iterator[None]:
    """Log a failure instead of raising it: the new checkpoint is complete, and `prune` removes the rest."""
    try:
        yield
    except (StoreError, ManifestCorrupt) as error:
        logger.warning("not all objects of the replaced checkpoint were deleted: %s", error)


def _exists(store: Store, *, overwrite: bool) -> CheckpointExists:
    why = "without collectives it cannot be replaced atomically" if overwrite else "overwrite=False"
    advice = "delete it first" if overwrite else "pass overwrite=True to replace it"
    return CheckpointExists(
        f"Checkpoint already exists at {store.url} and {why}: choose another path, or {advice}", url=store.url
    )
