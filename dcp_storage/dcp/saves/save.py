"""`Save`: one save of one rank, from the first hook that DCP calls to its end."""

import threading
import time
from dataclasses import dataclass, field

from dcp_storage.checkpoint.place import Location
from dcp_storage.dcp.saves.pace import Pace
from dcp_storage.format.names import ObjectName, new_token


@dataclass(frozen=True)
class Role:
    """A rank's role in a save.

    Attributes:
        rank: Its rank in the process group of the save.
        world_size: The size of that group.
        coordinator: Whether it is the rank that commits, if there are collectives.
        attempt: The id that the parts of one save without collectives share, in which every rank commits its own.
        alone: Whether it saves without the others (`no_dist=True`), to its own path.
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
    """One save of one rank. It shares nothing with other saves.

    Attributes:
        location: Where it goes.
        token: Part of the names of its objects, and of no other save's.
        pace: How it shares the host with training.
        thread: The thread in which DCP calls all its hooks.
        announced: Whether DCP's planner was told of it, the first thing that happens on every rank.
        role: This rank's role, once DCP has set it up.
        objects: The names of the objects that it began to put.
        number: Its number among this process's saves to that path, from 1.
        begun: When it began, by `time.monotonic`.
        blocked_s: How long training waited until its state was copied; `None` if it waits for the whole save.
        done: Whether this rank's work for it is done.
        told: Whether its failure was logged.
    """

    location: Location
    token: str = field(default_factory=new_token)
    pace: Pace = field(default_factory=Pace.here)
    thread: threading.Thread = field(default_factory=threading.current_thread)
    announced: bool = False
    role: Role | None = None
    objects: list[ObjectName] = field(default_factory=list)
    number: int = 0
    begun: float = field(default_factory=time.monotonic)
    blocked_s: float | None = None
    done: bool = False
    told: bool = False

    @property
    def url(self) -> str:
        """Where it goes, for messages."""
        return self.location.url
