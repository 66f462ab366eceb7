"""Old steps go: what stays is decided on what the store tells, then manifests are deleted, and then objects."""

import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from dcp_storage.format.names import MANIFEST, save_of
from dcp_storage.steps.catalog import list_steps, step_directories
from dcp_storage.steps.names import directory_of
from dcp_storage.steps.pins import bury, is_pin, is_tombstone
from dcp_storage.steps.policies import Policy
from dcp_storage.steps.step import Step
from dcp_storage.store.base import Store
from dcp_storage.transfer.manifests import is_committed, replaced_objects

_DEAD_S = 24 * 3600
"""A save that wrote nothing for so long is dead, by the times that the store tells and this machine's clock."""


@dataclass(frozen=True)
class Decision:
    """Whether a step is kept, and why."""

    step: int
    kept: bool
    reasons: tuple[str, ...] = ()


def decide(steps: Sequence[Step], keep: Policy | None, in_use: Container[int], now: datetime) -> list[Decision]:
    """Return which of the committed steps, ascending, are kept: the newest and those in use always."""
    reasons = {step.step: ["there is no policy"] for step in steps} if keep is None else keep.kept(steps, now)
    for step in steps[-1:]:
        reasons.setdefault(step.step, []).append("the newest")
    for step in steps:
        if step.step in in_use:
            reasons.setdefault(step.step, []).append("in use")
    return [Decision(step.step, step.step in reasons, tuple(reasons.get(step.step, ()))) for step in steps]


async def prune_steps(
    root: Store, keep: Policy | None, *, in_use: Container[int] = (), dry_run: bool = False
) -> list[Decision]:
    """Remove what is not kept, and return what was decided; a dry run does not see pins.

    Raises:
        StoreError: The store failed.
    """
    decisions = decide(await list_steps(root), keep, in_use, datetime.now(UTC))
    if dry_run:
        return decisions
    await _finish(root, {decision.step for decision in decisions}, in_use)
    for number, decision in enumerate(decisions):
        if decision.kept or decision.step in in_use:
            continue
        store = root.child(directory_of(decision.step))
        if await bury(store):
            await _remove(store)
        else:
            decisions[number] = Decision(decision.step, kept=True, reasons=("pinned",))
    return decisions


async def _finish(root: Store, committed: Container[int], in_use: Container[int]) -> None:
    """Remove what is left of steps whose removal was cut short, and of saves that died."""
    for step in await step_directories(root):
        store = root.child(directory_of(step))
        if step in committed or step in in_use:
            continue
        times = await store.modified()
        is_left = any(map(is_tombstone, times)) or max(times.values(), default=0) < time.time() - _DEAD_S
        # Asked after the times: what another job has committed meanwhile stays.
        if is_left and not await is_committed(store, parts=True):
            await _remove(store)


async def _remove(store: Store) -> None:
    named = await replaced_objects(store)  # of a stock checkpoint too
    await store.delete([MANIFEST])
    there = await store.list()
    await store.delete([*named, *(name for name in there if save_of(name) or is_pin(name))])
    await store.delete([name for name in there if is_tombstone(name)])  # last: it tells that there is more to do
