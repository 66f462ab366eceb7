"""A failed save leaves no objects behind, neither on the rank that failed nor on those that DCP informs.

DCP sends the error to all ranks and calls no hook there. So the error carries a mark, which ends the save of the thread
that unpickles it.
"""

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dcp_storage.checkpoint.manifests import read_manifest
from dcp_storage.dcp.saves.ending import ending
from dcp_storage.dcp.saves.pace import Pace
from dcp_storage.dcp.saves.save import Save
from dcp_storage.errors import CheckpointExists, CheckpointNotFound, DcpStorageError
from dcp_storage.format.names import ObjectName
from dcp_storage.store.base import Store

logger = logging.getLogger(__name__)

_CLEAN_UP_S = 5
"""How long a failed save may try to delete its objects: the store may be the reason for the failure."""


class _Thread(threading.local):
    save: Save | None = None


_thread = _Thread()


class _Mark:
    """Pickled with an error, so that it ends the save on every rank."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _end_elsewhere, ()


@contextmanager
def ending_on_error(save: Save, *, commits: bool = False) -> Iterator[None]:
    """End the save if a hook fails: log it if nobody may ever check its future, and delete what it put.

    `commits`: The hook writes the manifest. If the response of a remote store is lost, the manifest may still arrive
    and name the objects, so they are left in place.
    """
    _thread.save = save
    try:
        yield
    except BaseException as error:
        _thread.save = None
        _log(save, str(error))
        if not commits or isinstance(error, CheckpointExists):
            error.__dict__["_dcp_storage_mark"] = _Mark()
            _discard(save, named_perhaps=False)
        elif not save.location.store().remote:
            error.__dict__["_dcp_storage_mark"] = _Mark()
            _discard(save, named_perhaps=True)
        raise
    if commits:
        _thread.save = None


def _end_elsewhere() -> _Mark:
    """End this thread's save, which failed on another rank; the coordinator passes the mark on to the rest."""
    save, _thread.save = _thread.save, None
    if save:
        _log(save, "on another rank")
        _discard(save, named_perhaps=True)
    return _Mark()


def _log(save: Save, why: str) -> None:
    if save.pace is Pace.IN_THREAD:
        save.told = True
        logger.error("the save to %s, in the background, failed: %s", save.url, why)
        ending.note_failure()


def _discard(save: Save, *, named_perhaps: bool) -> None:
    """Delete the save's objects if the store responds: the next save may need the space."""
    if not save.objects:
        return

    async def discard(store: Store) -> None:
        async with asyncio.timeout(_CLEAN_UP_S):
            named = await _named(store) if named_perhaps else set()
            await store.delete([name for name in save.objects if name not in named])

    with suppress(DcpStorageError, TimeoutError):  # the original error is raised
        save.location.run(discard)


async def _named(store: Store) -> set[ObjectName]:
    try:
        return set((await read_manifest(store)).object_names)
    except CheckpointNotFound:
        return set()
