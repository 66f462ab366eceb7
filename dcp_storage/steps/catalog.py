"""Lists the steps below a root, by the current state of the store."""

from dcp_storage.checkpoint.fetch import fetch_head
from dcp_storage.checkpoint.manifests import is_committed
from dcp_storage.errors import ManifestCorrupt, ObjectNotFound, UnsupportedFormat
from dcp_storage.format.names import MANIFEST
from dcp_storage.steps.names import directory_of, parse_step
from dcp_storage.steps.step import Step, metrics_of, time_of
from dcp_storage.store.base import Store
from dcp_storage.transfer.workers import for_each

_HEADS_IN_FLIGHT = 64


async def step_directories(root: Store) -> list[int]:
    """Return the steps that have a directory, committed or not, ascending.

    Raises:
        StoreError: The store failed; a failure is never returned as an empty list.
    """
    return sorted(step for name in await root.directories() if (step := parse_step(name)) is not None)


async def list_steps(root: Store) -> list[Step]:
    """Return the committed steps, ascending; only their heads are read.

    Raises:
        StoreError: The store failed.
    """
    found: dict[int, Step] = {}

    async def look(step: int) -> None:
        if held := await describe(root, step):
            found[step] = held

    steps = await step_directories(root)
    await for_each(min(_HEADS_IN_FLIGHT, len(steps)), steps, look)
    return [found[step] for step in sorted(found)]


async def describe(root: Store, step: int) -> Step | None:
    """Return a step as its head describes it, or `None` if it is not committed.

    Raises:
        StoreError: The store failed.
    """
    store = root.child(directory_of(step))
    try:
        head = await fetch_head(store, MANIFEST)
    except (ObjectNotFound, UnsupportedFormat, ManifestCorrupt):
        return Step(step, store.url) if await is_committed(store, parts=True) else None
    return Step(step, store.url, time_of(head.created), head.raw_bytes, head.stored_bytes, metrics_of(head.info))


async def latest_step(root: Store, below: int | None = None) -> int | None:
    """Return the newest committed step (below `below`, if given), or `None` if there is none.

    Raises:
        StoreError: The store failed.
    """
    for step in reversed(await step_directories(root)):
        if (below is None or step < below) and await is_committed(root.child(directory_of(step)), parts=True):
            return step
    return None
