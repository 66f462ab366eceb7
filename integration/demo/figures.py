"""What the demo measures, and what follows from it. No torch: the parent process only collects and prints."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

OURS, STOCK, STOCK_ZSTD = "dcp_storage", "stock", "stock_zstd"
CONTESTANTS = (STOCK, STOCK_ZSTD, OURS)


@dataclass(frozen=True)
class Place:
    """Where the checkpoints of a run go; each contestant has a directory below."""

    url: str
    storage_options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        """Whether this is a directory of this machine."""
        return "://" not in self.url or self.url.startswith("file://")

    def below(self, contestant: str) -> str:
        """Return the URL, or the plain path, of a contestant's checkpoint."""
        return f"{self.url.removeprefix('file://').rstrip('/')}/demo-{contestant.replace('_', '-')}"


@dataclass(frozen=True)
class Config:
    """What the ranks are told."""

    place: Place
    scratch: str
    model_dir: str
    steps: int


@dataclass(frozen=True)
class Part:
    """The tensors of one top-level key and one dtype: their bytes in memory and in the store."""

    key: str
    dtype: str
    raw_bytes: int
    stored_bytes: int

    @property
    def ratio(self) -> float:
        """Stored size as a share of the raw size."""
        return self.stored_bytes / self.raw_bytes if self.raw_bytes else 1.0


@dataclass(frozen=True)
class Check:
    """One contestant's checkpoint, loaded and compared with the reference of the step that it holds."""

    step: int
    tensors: int
    raw_bytes: int
    different: list[str]


@dataclass
class Resume:
    """The checkpoint on one number of ranks."""

    ranks: int
    load_s: dict[str, list[float]] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    loss: float | None = None
    next_loss: float | None = None


@dataclass
class Results:
    """All figures of a run.

    Attributes:
        evaluated: Loss on fixed text by step, before the kill; a resumed model must give the same.
        save_s: Seconds of every save, by contestant.
        parts: Bytes by contestant.
        killed_after_s: When, into the second save, the ranks were killed.
        second_save_finished: Whether the second save won the race against the kill.
    """

    machine: dict[str, Any]
    place: Place
    ranks: int
    weights: dict[str, int] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    evaluated: dict[int, float] = field(default_factory=dict)
    save_s: dict[str, list[float]] = field(default_factory=dict)
    parts: dict[str, list[Part]] = field(default_factory=dict)
    killed_after_s: float = 0.0
    second_save_finished: bool = False
    resumes: list[Resume] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """What did not hold, one sentence each; empty when the run is a success."""
        return [text for resume in self.resumes for text in _failures(resume, self.evaluated)]


def merge(parts: Iterable[Part], key: str = "all", dtype: str = "") -> Part:
    """Return the sum of some parts under a new name."""
    found = list(parts)
    return Part(key, dtype, sum(part.raw_bytes for part in found), sum(part.stored_bytes for part in found))


def rate(raw_bytes: int, seconds: list[float]) -> float:
    """Return MB/s at the median time."""
    return raw_bytes / 1e6 / median(seconds)


def document(results: Results) -> dict[str, Any]:
    """Return all figures as what `--json` prints."""
    raw_bytes = merge(results.parts[OURS]).raw_bytes
    return {
        "ok": not results.failures,
        "failures": results.failures,
        "machine": results.machine,
        "url": results.place.url,
        "weights": results.weights,
        "train": {"ranks": results.ranks, "losses": results.losses, "evaluated": results.evaluated},
        "raw_bytes": raw_bytes,
        "contestants": {name: _contestant(name, results) for name in (OURS, STOCK, STOCK_ZSTD)},
        "kill": {"after_s": results.killed_after_s, "second_save_finished": results.second_save_finished},
        "resumes": [_resume(resume) for resume in results.resumes],
    }


def _contestant(name: str, results: Results) -> dict[str, Any]:
    parts = results.parts[name]
    return {
        "stored_bytes": merge(parts).stored_bytes,
        "ratio": merge(parts).ratio,
        "save_s": results.save_s[name],
        "save_median_s": median(results.save_s[name]),
        "parts": [vars(part) | {"ratio": part.ratio} for part in parts],
    }


def _resume(resume: Resume) -> dict[str, Any]:
    checks = {name: vars(check) for name, check in resume.checks.items()}
    medians = {name: median(seconds) for name, seconds in resume.load_s.items()}
    return vars(resume) | {"checks": checks, "load_median_s": medians}


def _failures(resume: Resume, evaluated: dict[int, float]) -> Iterable[str]:
    for name in CONTESTANTS:
        if name not in resume.checks:
            yield f"{name} on {resume.ranks} ranks was not checked"
        elif different := resume.checks[name].different:
            yield f"{name} on {resume.ranks} ranks: {len(different)} entries differ, first {different[0]}"
    if OURS in resume.checks and resume.loss != (expected := evaluated.get(resume.checks[OURS].step)):
        yield f"on {resume.ranks} ranks the model evaluates to {resume.loss} and not to {expected}"
