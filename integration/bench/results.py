"""What a run measured: plain values, so that JSON holds all of them as they are."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

Operation = Literal["save", "load after save", "load again", "load warm", "load cold"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)


@dataclass(frozen=True)
class Timing:
    """One operation of one contestant in one round. Round 0 warms up and is checked bit by bit, but not counted."""

    state: str
    store: str
    contestant: str
    round: int
    operation: Operation
    seconds: float
    raw_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class Peak:
    """The most memory that a fresh process held during one operation, above what it held before with its state."""

    store: str
    contestant: str
    operation: Literal["save", "load"]
    raw_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Stall:
    """Training steps beside one asynchronous save, and just before it without one.

    Attributes:
        call_seconds: How long `async_save` kept the caller.
        lost_seconds: Time from the call to the save's end, less what the steps done in it take alone.
    """

    contestant: str
    executor: str
    round: int
    alone_mean: float
    alone_p99: float
    mean: float
    p99: float
    steps: int
    call_seconds: float
    lost_seconds: float


@dataclass(frozen=True)
class Reshard:
    """What a load into other shards read.

    Attributes:
        needed_bytes: The raw size of the elements that were asked for.
        block_bytes: The raw size of the blocks that hold at least one of them, each counted once.
        stored_bytes: The stored size of those blocks.
        read_bytes: What the process read from files, the manifest included.
        decoded_bytes: The raw size of the blocks decoded; 0 where nothing tells.
        allowed_bytes: What the target lets the load read.
    """

    contestant: str
    case: str
    needed_bytes: int
    block_bytes: int
    stored_bytes: int
    read_bytes: int
    decoded_bytes: int
    allowed_bytes: int


@dataclass(frozen=True)
class Repeats:
    """Many saves in one fresh process, each in place of the last: their times, and the memory held after each."""

    contestant: str
    seconds: list[float]
    rss_bytes: list[int]


@dataclass(frozen=True)
class Saved:
    """A step that was saved: how long that kept training waiting, and how long it went on beside it."""

    contestant: str
    how: str
    round: int
    blocked_seconds: float
    background_seconds: float


@dataclass
class Results:
    """All of a run."""

    machine: dict[str, Any]
    options: dict[str, Any]
    timings: list[Timing] = field(default_factory=list)
    peaks: list[Peak] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)
    reshards: list[Reshard] = field(default_factory=list)
    repeats: list[Repeats] = field(default_factory=list)
    steps: list[Saved] = field(default_factory=list)

    def write(self, path: Path, checks: list[dict[str, Any]]) -> None:
        """Write everything as JSON, with the outcome of the checks."""
        path.write_text(json.dumps({**asdict(self), "checks": checks}, indent=1) + "\n", encoding="utf-8")
