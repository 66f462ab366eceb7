"""Loads the newest sound step, the same on all ranks."""

import logging
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.stateful import Stateful

from dcp_storage.checkpoint.fetch import fetch_head
from dcp_storage.checkpoint.manifests import is_committed
from dcp_storage.config import require_type
from dcp_storage.dcp.load import load as load_alike
from dcp_storage.dcp.planners.load_planner import ShardedLoadPlanner
from dcp_storage.errors import ManifestCorrupt, ObjectNotFound, UnsupportedFormat
from dcp_storage.format.names import MANIFEST
from dcp_storage.steps.access import Access
from dcp_storage.steps.catalog import latest_step
from dcp_storage.steps.failures import cause_of, is_damage, unwrapped
from dcp_storage.steps.groups import Ranks
from dcp_storage.steps.names import directory_of
from dcp_storage.steps.per_rank import Place, places, standing_in, take, to_load
from dcp_storage.steps.upkeep import Upkeep
from dcp_storage.store.base import Store

logger = logging.getLogger(__name__)

_MOST_PASSED_OVER = 3
"""More damaged steps than this are not a single accident, and need attention."""
_MOST_REMOVED = 10
"""Steps that other programs may remove while this one tries to load them."""


@dataclass(frozen=True)
class Candidate:
    """A step to load, and the number of ranks that saved it, if known."""

    step: int
    ranks: int | None


async def newest_below(root: Store, below: int | None) -> Candidate | None:
    """Return the newest committed step (below `below`, if given), or `None` if there is none.

    Raises:
        StoreError: The store failed; a failure is never returned as `None`.
    """
    step = await latest_step(root, below)
    return None if step is None else await given(root, step)


async def given(root: Store, step: int) -> Candidate:
    """Return a step, whether it exists or not: its load will report that."""
    return Candidate(step, await _ranks_of(root.child(directory_of(step))))


async def _ranks_of(store: Store) -> int | None:
    with suppress(ObjectNotFound, ManifestCorrupt, UnsupportedFormat):  # its load will report that
        return (await fetch_head(store, MANIFEST)).world_size
    return None


class Template:
    """A state dict for DCP to fill, without `Stateful`s at the top level, which may raise on a single rank."""

    def __init__(self, state: dict[str, Any]) -> None:
        require_type("state", state, MutableMapping)
        self._state = state
        self.plain = {
            key: held.state_dict() if isinstance(held, Stateful) else held
            for key, held in sorted(state.items())  # DCP sorts them, too
        }
        self.places: Sequence[Place] = places(self.plain)

    def hand_over(self) -> None:
        """Pass the loaded values to the state dict and its `Stateful`s."""
        for key, held in self._state.items():
            if isinstance(held, Stateful):
                held.load_state_dict(self.plain[key])
            else:
                self._state[key] = self.plain[key]


class Resume:
    """One call of `Checkpoints.load`, with the same steps on all ranks."""

    def __init__(
        self,
        ranks: Ranks,
        access: Access,
        upkeep: Upkeep,
        template: Template,
        planner: LoadPlanner | None,
    ) -> None:
        self._ranks, self._access, self._upkeep = ranks, access, upkeep
        self._template, self._planner = template, planner
        self._damages: list[BaseException] = []
        self._removals: list[BaseException] = []

    def load(self, step: int) -> int:
        """Load a step, or raise."""
        with unwrapped():
            self._load(self._ranks.on_first(lambda: self._access.root.run(partial(given, step=step))))
        return step

    def load_newest(self, *, strict: bool) -> int | None:
        """Load the newest sound step, or with `strict` only the newest; return `None` if there is none."""
        below: int | None = None
        while found := self._ranks.on_first(lambda: self._access.root.run(partial(newest_below, below=below))):  # noqa: B023
            try:
                self._load(found)
            except CheckpointException as error:
                cause = cause_of(error)
                if not is_damage(error):
                    raise cause from cause.__cause__
                if self._was_removed(found.step, cause):
                    continue
                if strict or len(self._damages) == _MOST_PASSED_OVER:
                    raise cause from cause.__cause__
                self._pass_over(found.step, cause)
                below = found.step
            else:
                return found.step
        if self._damages:
            raise self._damages[0] from self._damages[0].__cause__
        return None

    def _was_removed(self, step: int, cause: BaseException) -> bool:
        """Return whether another program removed the step meanwhile: then there are newer ones."""
        if len(self._removals) == _MOST_REMOVED:
            return False
        store = self._access.root.child(directory_of(step))
        committed = self._ranks.on_first(lambda: store.run(partial(is_committed, parts=True)))
        if not committed:
            self._removals.append(cause)
        return not committed

    def _pass_over(self, step: int, cause: BaseException) -> None:
        self._damages.append(cause)
        self._upkeep.verdicts.damaged.add(step)
        if self._ranks.rank == 0:
            logger.warning("step %d is damaged; loading the one before it instead: %s", step, cause)

    def _load(self, found: Candidate) -> None:
        planner = self._planner or ShardedLoadPlanner()
        template, ranks = self._template, self._ranks
        # A `PerRank` may fail on a single rank.
        slots, _ = ranks.meet(lambda: (to_load(template.places, ranks.rank, ranks.size, found.ranks), None))
        reader = self._access.reader(found.step)
        with self._upkeep.using(found.step), standing_in(template.plain, template.places, slots):
            load_alike(template.plain, reader, planner=planner, process_group=ranks.asked)
        ranks.on_each(partial(self._take, slots, planner, regrouped=found.ranks not in {None, ranks.size}))

    def _take(self, slots: Sequence[Any], planner: LoadPlanner, *, regrouped: bool) -> None:
        if (failures := [*self._damages, *self._removals]) and _skips(planner):
            raise failures[0]  # entries missing from this step may have been filled from another one
        take(self._template.places, slots, regrouped=regrouped)
        self._template.hand_over()


def _skips(planner: LoadPlanner) -> bool:
    """Return whether a planner left entries of the state as they were, or may have."""
    if isinstance(planner, ShardedLoadPlanner):
        return bool(planner.skipped)
    if isinstance(planner, DefaultLoadPlanner) and planner.metadata is not None:
        return not planner.metadata.state_dict_metadata.keys() >= planner.state_dict.keys()
    return True
