"""`Save`: one save of one rank, from the first hook that DCP calls to its end."""

import threading
import time
from dataclasses import dataclass, field

from dcp_storage.checkpoint.place import Location
from dcp_storage.dcp.saves.pace import Pace
from dcp_storage.format.names import new_token


@dataclass(frozen=True)
class Role:
    """What a rank has to do in a save.

    Attributes:
        rank: Its number in the process group of the save.
        world_size: The ranks of that group.
        coordinator: Whether it is the one that DCP has commit, where there are collectives.
        attempt: Without collectives, where every rank commits its own part: what the parts of one save share.
        alone: Whether it saves without the others (`no_dist=True`), to a place of its own.
    """

    rank: int
    world_size: int
    coordinator: bool
    attempt: str | None = None
    alone: bool = False

    @property
    def commits(self) -> bool:
        """Whether this rank writes a manifest."""
        return self.coordinator or self.attempt is not None


@dataclass(eq=False)
class Save:
    """One save of one rank. No other save meets it, and nothing of it outlives it.

    Attributes:
        location: Where it goes.
        token: Names its objects, as no other save's.
        pace: How it shares the machine with training.
        thread: DCP calls all hooks of a save in one.
        role: What this rank has to do, once DCP has told.
        objects: The names of the objects that it began to put.
        number: Which of this process's saves to that place it is, from 1.
        begun: When, by `time.monotonic`.
        blocked_s: How long training waited until its state was copied; `None` where it waits for the whole save.
        done: Whether this rank has done all that it had to do for it.
        told: Whether its failure was logged.
    """

    location: Location
    token: str = field(default_factory=new_token)
    pace: Pace = field(default_factory=Pace.here)
    thread: threading.Thread = field(default_factory=threading.current_thread)
    role: Role | None = None
    objects: list[str] = field(default_factory=list)
    number: int = 0
    begun: float = field(default_factory=time.monotonic)
    blocked_s: float | None = None
    done: bool = False
    told: bool = False

    @property
    def url(self) -> str:
        """Where it goes, for messages."""
        return self.location.url
