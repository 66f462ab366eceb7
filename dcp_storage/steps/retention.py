"""Old steps go: what stays is decided on what the store tells, then manifests are deleted, and then objects."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from dcp_storage.format.names import MANIFEST
from dcp_storage.leftovers import save_of
from dcp_storage.steps.catalog import list_steps
from dcp_storage.steps.names import directory_of
from dcp_storage.steps.policies import Policy
from dcp_storage.steps.step import Step
from dcp_storage.store.base import Store
from dcp_storage.transfer.manifests import replaced_objects


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
    """Remove what is not kept, and return what was decided.

    Raises:
        StoreError: The store failed.
    """
    decisions = decide(await list_steps(root), keep, in_use, datetime.now(UTC))
    for decision in decisions:
        if not (decision.kept or dry_run or decision.step in in_use):
            await _remove(root.child(directory_of(decision.step)))
    return decisions


async def _remove(store: Store) -> None:
    named = await replaced_objects(store)  # of a stock checkpoint too
    await store.delete([MANIFEST])
    await store.delete([*named, *(name for name in await store.list() if save_of(name))])
