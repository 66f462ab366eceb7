"""Old steps are only replaced by steps that passed their check."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from dcp_storage.steps.checking import Verdicts
from dcp_storage.steps.policies import Policy
from dcp_storage.steps.step import Step


@dataclass(frozen=True)
class ProvenOnly(Policy):
    """Keeps what a policy keeps of the sound steps, and of the sound and unchecked steps together.

    So an unchecked step does not replace any other, and a damaged one is ignored. Steps of earlier runs count as sound.
    """

    policy: Policy
    verdicts: Verdicts

    def kept(self, steps: Sequence[Step], now: datetime) -> dict[int, list[str]]:
        """Return the steps that either choice keeps."""
        unknown = self.verdicts.pending | self.verdicts.unchecked
        whole = [step for step in steps if step.step not in self.verdicts.damaged]
        sound = [step for step in whole if step.step not in unknown]
        return self.policy.kept(whole, now) | self.policy.kept(sound, now)
