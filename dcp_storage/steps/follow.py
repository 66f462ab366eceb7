"""Following a run from another program."""

import asyncio

from dcp_storage.steps.catalog import latest_step
from dcp_storage.store.base import Store

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


async def wait_for(root: Store, step: int | None, timeout_s: float | None) -> int:
    """Return the newest committed step, once it is at least `step`; polls with growing pauses.

    Raises:
        TimeoutError: There was none in time.
        StoreError: The store failed.
    """
    newest, pause_s = None, _FIRST_PAUSE_S
    try:
        async with asyncio.timeout(timeout_s):
            while (newest := await latest_step(root)) is None or newest < (step or 0):
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    except TimeoutError as error:
        asked = "step" if step is None else f"step from {step} on"
        raise TimeoutError(f"{root.url}: no {asked} within {timeout_s} s; the newest is {newest}") from error
    return newest
