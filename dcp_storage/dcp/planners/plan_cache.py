"""Plans of earlier saves, so that ranks whose plan has not changed need not send it again, nor get it back.

A rank claims its part of the last global plan by that plan's number; the coordinator, which made the number, either
answers with the same or plans anew. An entry belongs to one planner, by a token that the planner pickles along: the
process that saves for `async_save` unpickles a new planner for every save.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from dcp_storage.errors import ConfigError

MOST_PLANNERS = 32
"""How many planners' entries are kept; the one used longest ago goes first, and plans anew if it comes back."""


@dataclass(frozen=True)
class Claim:
    """A rank's part of a global plan: sent up instead of an unchanged local plan, and down in place of one."""

    plan_id: str
    part: int


@dataclass(frozen=True)
class Answer:
    """What comes down beside a new plan: the claim to it, and the planner's own data."""

    claim: Claim
    planner_data: Any


@dataclass(frozen=True)
class Planned:
    """What a rank remembers of its last save: its local plan, what became of it, and the claim to both."""

    local: SavePlan
    final: SavePlan
    claim: Claim


@dataclass(frozen=True)
class Made:
    """What a coordinator remembers of the last global plan that it made."""

    plan_id: str
    local_plans: Sequence[SavePlan]
    metadata: Metadata


@dataclass
class Entry:
    """What one planner remembers."""

    planned: Planned | None = None
    made: Made | None = None
    pending: bool = field(default=False)  # between a local plan and its global one: if that fails, so must the entry


_entries: OrderedDict[str, Entry] = OrderedDict()
_lock = threading.Lock()


def entry_of(token: str) -> Entry:
    """Return the entry of the planner with this token."""
    with _lock:
        entry = _entries.setdefault(token, Entry())
        _entries.move_to_end(token)
        while len(_entries) > MOST_PLANNERS:
            _entries.popitem(last=False)
        return entry


def begin(token: str, local: SavePlan) -> SavePlan:
    """Return what a rank sends: its plan, or a claim if it is the same as last time."""
    entry = entry_of(token)
    if entry.pending:  # the last save was never planned: nobody knows what the others remember of it
        entry.planned = entry.made = None
    entry.pending = True
    if entry.planned is None or entry.planned.local != local:
        return local
    return SavePlan([], planner_data=entry.planned.claim, usable=False)


def complete(token: str, sent: Sequence[SavePlan]) -> list[SavePlan]:
    """Return the ranks' local plans, those of claims from memory.

    Raises:
        ConfigError: A claim is on a plan that this coordinator did not make last.
    """
    made = entry_of(token).made
    return [_resolve(made, plan, part) for part, plan in enumerate(sent)]


def _resolve(made: Made | None, plan: SavePlan, part: int) -> SavePlan:
    if plan.usable:
        return plan
    if made is None or plan.planner_data != Claim(made.plan_id, part):
        raise ConfigError(
            f"rank {part} of the process group refers to a plan that the coordinator did not make: with "
            "enable_plan_caching=True, keep one ShardedSavePlanner on each rank for each process group and use it for "
            "all saves of that group. The next save with these planners plans anew"
        )
    return made.local_plans[part]


def unchanged(token: str, sent: Sequence[SavePlan]) -> Made | None:
    """Return the last global plan if every rank claims its part of it."""
    made = entry_of(token).made
    return made if made and len(sent) == len(made.local_plans) and not any(plan.usable for plan in sent) else None


def answer_unchanged(made: Made) -> list[SavePlan]:
    """Return what the coordinator sends where every rank's claim holds."""
    return [SavePlan([], planner_data=Claim(made.plan_id, part), usable=False) for part in range(len(made.local_plans))]


def answer(token: str, local_plans: Sequence[SavePlan], plans: Sequence[SavePlan], metadata: Metadata) -> list[Any]:
    """Return what the coordinator sends of a new global plan: each rank's part, and its claim to it."""
    made = Made(uuid4().hex, local_plans, metadata)
    entry_of(token).made = made
    return [
        SavePlan(plan.items, plan.storage_data, Answer(Claim(made.plan_id, part), plan.planner_data), plan.usable)
        for part, plan in enumerate(plans)
    ]


def finish(token: str, local: SavePlan, answered: SavePlan) -> SavePlan:
    """Return the plan that a rank follows, and remember it.

    Raises:
        ConfigError: The coordinator answered to another claim than this rank's.
    """
    entry = entry_of(token)
    if answered.usable:
        given: Answer = answered.planner_data
        entry.planned = Planned(local, SavePlan(answered.items, answered.storage_data, given.planner_data), given.claim)
    elif entry.planned is None or entry.planned.claim != answered.planner_data:
        raise ConfigError("the coordinator refers to a plan that this rank does not have: use a new planner")
    else:
        # Storage data is the writer's, and of this save.
        final = replace(entry.planned.final, storage_data=answered.storage_data)
        entry.planned = Planned(local, final, entry.planned.claim)
    entry.pending = False
    return entry.planned.final
