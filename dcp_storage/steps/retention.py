"""Removes old steps: decides by the store's listing, deletes the manifests, and then the objects."""

import logging
import time
from collections.abc import Callable, Collection, Container, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial

from dcp_storage.checkpoint.manifests import is_committed
from dcp_storage.checkpoint.pruning import A_DAY, prune_store
from dcp_storage.errors import CheckpointNotFound, ManifestCorrupt
from dcp_storage.steps.catalog import describe, list_steps, step_directories
from dcp_storage.steps.names import directory_of
from dcp_storage.steps.pins import bury, held_pins, unearth
from dcp_storage.steps.policies import Policy
from dcp_storage.steps.step import Step
from dcp_storage.store.base import Store

logger = logging.getLogger(__name__)

Claim = Callable[[int], AbstractContextManager[bool]]
"""Claims a step for removal while the block runs; yields whether it is free, neither written nor read here."""


@dataclass(frozen=True)
class Decision:
    """Whether a step is kept, and why."""

    step: int
    kept: bool
    reasons: tuple[str, ...] = ()


def decide(steps: Sequence[Step], keep: Policy | None, in_use: Container[int], now: datetime) -> list[Decision]:
    """Decide which of the committed steps, ascending, to keep; always the newest, the last saved and those in use."""
    reasons = {step.step: ["no policy"] for step in steps} if keep is None else keep.kept(steps, now)
    for step in steps[-1:]:
        reasons.setdefault(step.step, []).append("the newest")
    # After a run has returned to an earlier step, new steps have lower numbers than those it left behind.
    if dated := [(step.created, step.step) for step in steps if step.created is not None]:
        reasons.setdefault(max(dated)[1], []).append("the last saved")
    for step in steps:
        if step.step in in_use:
            reasons.setdefault(step.step, []).append("in use")
    return [Decision(step.step, step.step in reasons, tuple(reasons.get(step.step, ()))) for step in steps]


async def prune_steps(
    root: Store,
    keep: Policy | None,
    *,
    in_use: Container[int],
    claim: Claim,
    dry_run: bool = False,
) -> list[Decision]:
    """Remove steps that are not kept, and what saves left that wrote nothing for a day; return the decisions.

    Raises:
        StoreError: The store failed.
    """
    steps = await list_steps(root)
    decisions = decide(steps, keep, in_use, datetime.now(UTC))
    if not dry_run:
        await _finish(root, {decision.step for decision in decisions}, claim)
    for number, decision in enumerate(decisions):
        if decision.kept:
            continue
        if dry_run:
            times = await root.child(directory_of(decision.step)).modified()
            why_not = "pinned" if held_pins(times, time.time()) else None
        else:
            why_not = await _remove(root, steps[number], claim)
        if why_not:
            decisions[number] = Decision(decision.step, kept=True, reasons=(why_not,))
    return decisions


async def _remove(root: Store, step: Step, claim: Claim) -> str | None:
    """Remove a step, as it was listed; return the reason if it was not removed."""
    store = root.child(directory_of(step.step))
    with claim(step.step) as is_free:
        if not is_free:
            return "in use"
        if await store.is_link():
            return "a symbolic link"
        if why_not := await bury(store, partial(_is_same, root, step)):
            return why_not
        await _clear(store)
    return None


async def _is_same(root: Store, step: Step) -> bool:
    """Return whether a step is as it was listed: another program, or this one, may have saved it again."""
    now = await describe(root, step.step)
    return now is None or now.created == step.created


async def _finish(root: Store, committed: Collection[int], claim: Claim) -> None:
    """Remove what is left of steps whose removal was interrupted, and of interrupted saves."""
    for step in await step_directories(root):
        if step in committed:
            continue
        store = root.child(directory_of(step))
        with claim(step) as is_free:
            if not is_free or await store.is_link() or await is_committed(store, parts=True):
                continue
            await _clear(store)


async def _clear(store: Store) -> None:
    """Remove what was buried, and what interrupted saves left, from a step without a manifest."""
    await unearth(store)
    try:
        await prune_store(store, A_DAY)
    except CheckpointNotFound:  # there is nothing from this package's saves
        pass
    except ManifestCorrupt as error:  # parts of some ranks: the others may be elsewhere
        _tell_left(store.url, str(error))
    await store.remove_directory()


@cache
def _tell_left(url: str, why: str) -> None:
    """Log it once: the next prune finds the same."""
    logger.warning("%s is left as it is: %s", url, why)
