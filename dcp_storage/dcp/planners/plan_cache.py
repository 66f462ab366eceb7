"""A cache of plans, so that ranks whose plan has not changed need not send it again, nor receive a new one.

A rank claims its part of the last global plan by that plan's id; the coordinator, which created the id, either answers
with the same claim or makes a new plan.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from uuid import uuid4

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from dcp_storage.errors import ConfigError

MOST_PLANNERS = 32
"""The number of planners whose entries are kept; the least recently used is dropped, and makes a new plan next time."""


@dataclass(frozen=True)
class Claim:
    """A rank's part of a global plan: sent to the coordinator and back instead of an unchanged plan."""

    plan_id: str
    part: int


@dataclass(frozen=True)
class Answer:
    """Sent to a rank with a new plan: the claim to it, and the planner's own data."""

    claim: Claim
    planner_data: Any


@dataclass(frozen=True)
class LocalMemory:
    """A rank's memory of its last save: its local plan, the final plan, and the claim to both."""

    local: SavePlan
    final: SavePlan
    claim: Claim


@dataclass(frozen=True)
class GlobalMemory:
    """A coordinator's memory of the last global plan that it made."""

    plan_id: str
    local_plans: Sequence[SavePlan]
    metadata: Metadata


@dataclass
class Entry:
    """The memory of one planner."""

    local: LocalMemory | None = None
    whole: GlobalMemory | None = None
    pending: bool = field(default=False)  # between a local plan and its global one; if that fails, `local` is invalid


_entries: OrderedDict[str, Entry] = OrderedDict()
_lock = threading.Lock()

GlobalPlan = tuple[list[SavePlan], Metadata]


class Plans(Protocol):
    """Sends plans to the coordinator and back."""

    def send(self, local: SavePlan) -> SavePlan:
        """Return what a rank sends for its local plan."""

    def plan(self, sent: list[SavePlan], make: Callable[[list[SavePlan]], GlobalPlan]) -> GlobalPlan:
        """Return what the coordinator sends each rank, and the metadata; `make` makes a new plan of local plans."""

    def receive(self, local: SavePlan, answered: SavePlan) -> SavePlan:
        """Return the plan that a rank follows, from what the coordinator sent."""


class Uncached:
    """Sends plans unchanged."""

    def send(self, local: SavePlan) -> SavePlan:
        """Send the plan."""
        return local

    def plan(self, sent: list[SavePlan], make: Callable[[list[SavePlan]], GlobalPlan]) -> GlobalPlan:
        """Make a new plan."""
        return make(sent)

    def receive(self, local: SavePlan, answered: SavePlan) -> SavePlan:  # noqa: ARG002
        """Follow the plan that was sent."""
        return answered


class PlanCache:
    """Remembers plans, and sends claims if nothing has changed.

    The memory belongs to one planner, identified by a token that is pickled with it: the process of `async_save`
    unpickles a new planner for every save.
    """

    def __init__(self) -> None:
        self._token = uuid4().hex

    @property
    def _entry(self) -> Entry:
        with _lock:
            entry = _entries.setdefault(self._token, Entry())
            _entries.move_to_end(self._token)
            while len(_entries) > MOST_PLANNERS:
                _entries.popitem(last=False)
            return entry

    def send(self, local: SavePlan) -> SavePlan:
        """Send the plan, or a claim if it is the same as last time."""
        entry = self._entry
        if entry.pending:  # the last save may have been planned without this rank's knowledge
            entry.local = None
        entry.pending = True
        if entry.local is None or entry.local.local != local:
            return local
        return SavePlan([], planner_data=entry.local.claim, usable=False)

    def plan(self, sent: list[SavePlan], make: Callable[[list[SavePlan]], GlobalPlan]) -> GlobalPlan:
        """Answer with claims if every rank sent one, else make a new plan.

        Raises:
            ConfigError: A claim does not refer to the last plan of this coordinator.
        """
        entry = self._entry
        local_plans = [_local_plan(entry.whole, plan, part) for part, plan in enumerate(sent)]
        whole = entry.whole
        if whole and len(sent) == len(whole.local_plans) and not any(plan.usable for plan in sent):
            claims = (Claim(whole.plan_id, part) for part in range(len(sent)))
            # A copy, because writers add their own data to the metadata.
            return [SavePlan([], planner_data=claim, usable=False) for claim in claims], replace(whole.metadata)
        plans, metadata = make(local_plans)
        entry.whole = whole = GlobalMemory(uuid4().hex, local_plans, replace(metadata))
        answers = [
            SavePlan(plan.items, plan.storage_data, Answer(Claim(whole.plan_id, part), plan.planner_data), plan.usable)
            for part, plan in enumerate(plans)
        ]
        return answers, metadata

    def receive(self, local: SavePlan, answered: SavePlan) -> SavePlan:
        """Follow the plan that was sent, or the previous one, and remember it.

        Raises:
            ConfigError: The coordinator's claim is not this rank's.
        """
        entry = self._entry
        if answered.usable:
            given: Answer = answered.planner_data
            final = SavePlan(answered.items, answered.storage_data, given.planner_data)
            entry.local = LocalMemory(local, final, given.claim)
        elif entry.local is None or entry.local.claim != answered.planner_data:
            raise ConfigError("the coordinator refers to a plan that this rank does not have: use a new planner")
        else:
            # Storage data belongs to the writer and to this save.
            final = replace(entry.local.final, storage_data=answered.storage_data)
            entry.local = LocalMemory(local, final, entry.local.claim)
        entry.pending = False
        return entry.local.final


def _local_plan(whole: GlobalMemory | None, plan: SavePlan, part: int) -> SavePlan:
    """Return the local plan that a rank sent, or the one that its claim stands for."""
    if plan.usable:
        return plan
    if whole is None or plan.planner_data != Claim(whole.plan_id, part):
        raise ConfigError(
            f"rank {part} of the process group refers to a plan that the coordinator did not make: with "
            "enable_plan_caching=True, keep one ShardedSavePlanner on each rank for each process group and use it for "
            "all saves of that group. The next save with these planners makes a new plan"
        )
    return whole.local_plans[part]
