"""Old steps are removed only for steps that passed their check."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from dcp_storage.steps.checking import Verdicts
from dcp_storage.steps.policies import Policy
from dcp_storage.steps.step import Step


@dataclass(frozen=True)
class ProvenOnly(Policy):
    """What a policy keeps of the sound steps, and of these together with those of which nothing is known.

    So a step that was not checked takes nobody's place, and a damaged one counts for nothing. Steps of earlier runs
    count as sound.
    """

    policy: Policy
    verdicts: Verdicts

    def kept(self, steps: Sequence[Step], now: datetime) -> dict[int, list[str]]:
        """Return what either choice keeps."""
        unknown = self.verdicts.pending | self.verdicts.unchecked
        whole = [step for step in steps if step.step not in self.verdicts.damaged]
        sound = [step for step in whole if step.step not in unknown]
        return self.policy.kept(whole, now) | self.policy.kept(sound, now)
