"""Which steps policies keep, and what heads say of metrics."""

import json
import math
from datetime import UTC, datetime, timedelta

import pytest
import torch

from dcp_storage import KeepBest, KeepEvery, KeepLatest, KeepYounger
from dcp_storage.errors import ConfigError
from dcp_storage.steps.checking import Verdict, Verdicts
from dcp_storage.steps.names import directory_of, parse_step
from dcp_storage.steps.proven import ProvenOnly
from dcp_storage.steps.retention import decide
from dcp_storage.steps.step import Step, info_of, metrics_of, time_of

NOW = datetime(2030, 1, 10, tzinfo=UTC)


def steps(*numbers, **metrics):
    named = metrics.get("loss", {})
    return [
        Step(n, f"run/step-{n}", NOW - timedelta(days=9 - n), metrics={"loss": named[n]} if n in named else {})
        for n in numbers
    ]


def kept(policy, found):
    return sorted(policy.kept(found, NOW))


@pytest.mark.parametrize(
    ("policy", "numbers"),
    [
        (KeepLatest(2), [8, 9]),
        (KeepLatest(99), list(range(10))),
        (KeepEvery(4), [0, 4, 8]),
        (KeepYounger(timedelta(days=2)), [8, 9]),
        (KeepLatest(1) | KeepEvery(5), [0, 5, 9]),
        (KeepLatest(1) | (KeepEvery(5) | KeepYounger(timedelta(days=2))), [0, 5, 8, 9]),
    ],
)
def test_policies(policy, numbers):
    assert kept(policy, steps(*range(10))) == numbers


@pytest.mark.parametrize(
    ("mode", "losses", "best"),
    [
        ("min", {1: 0.5, 2: 0.0, 3: -1.0, 4: math.nan, 5: math.inf}, [2, 3]),
        ("max", {1: 0.5, 2: 0.0, 3: -1.0, 4: math.nan, 5: math.inf}, [1, 5]),
        ("min", {1: 2.0, 2: 2.0, 3: 2.0}, [2, 3]),
        ("min", {1: math.nan}, []),
        ("min", {}, []),
    ],
)
def test_the_best_by_a_metric(mode, losses, best):
    assert kept(KeepBest(2, "loss", mode=mode), steps(*range(6), loss=losses)) == best


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepLatest(0),
        lambda: KeepLatest(True),
        lambda: KeepEvery(-1),
        lambda: KeepBest(0, "loss"),
        lambda: KeepBest(1, "loss", mode="least"),
        lambda: KeepYounger(timedelta()),
        lambda: KeepYounger(7),
    ],
)
def test_what_keeps_nothing_is_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_the_newest_and_those_in_use_stay_whatever_the_policy():
    decisions = decide(steps(1, 2, 3), KeepEvery(100), {2}, NOW)
    assert [(each.step, each.kept, each.reasons) for each in decisions] == [
        (1, False, ()),
        (2, True, ("in use",)),
        (3, True, ("the newest", "the last saved")),
    ]
    assert all(each.kept for each in decide(steps(1, 2, 3), None, (), NOW))


def test_only_steps_that_passed_take_the_place_of_others():
    verdicts = Verdicts()
    for step in (2, 3, 4, 5):
        verdicts.expect(step)
    verdicts.settle(
        [{3: Verdict.SOUND, 4: Verdict.SOUND}, {3: Verdict.UNCHECKED, 4: Verdict.DAMAGED, 5: Verdict.SOUND}]
    )
    assert (verdicts.pending, verdicts.unchecked, verdicts.damaged) == ({2, 5}, {3}, {4})
    assert kept(ProvenOnly(KeepLatest(1), verdicts), steps(0, 1, 2, 3, 4, 5)) == [1, 5]
    verdicts.settle([{5: Verdict.SOUND}] * 2)
    assert kept(ProvenOnly(KeepLatest(1), verdicts), steps(0, 1, 2, 3, 4, 5)) == [5]
    verdicts.expect(4)
    assert kept(ProvenOnly(KeepLatest(2), verdicts), steps(0, 1, 2, 3, 4, 5)) == [1, 4, 5]


def test_names():
    assert [parse_step(directory_of(step)) for step in (0, 7, 10**9)] == [0, 7, 10**9]
    for name in ("step-", "step-07", "step-1x", "step-1.backup", "Step-1", "step--1", "step-1\n", "step-\u0661"):
        assert parse_step(name) is None


def test_metrics_come_back_from_json():
    metrics = {"zero": 0.0, "low": -1, "nan": math.nan, "inf": math.inf, "-inf": -math.inf}
    info = json.loads(json.dumps(info_of(3, metrics), allow_nan=False))
    read = metrics_of(info)
    assert math.isnan(read.pop("nan"))
    assert read == {"zero": 0.0, "low": -1.0, "inf": math.inf, "-inf": -math.inf}
    assert info["metrics"]["nan"] == "NaN"
    for strange in ({}, {"metrics": 3}, {"metrics": {"a": None, "b": [], "c": "text", "d": True}}):
        assert metrics_of(strange) == {}


@pytest.mark.parametrize(
    "metrics", [{"loss": torch.tensor(1.0)}, {"loss": "1"}, {"loss": None}, {1: 1.0}, {"up": True}]
)
def test_what_is_no_metric_is_refused(metrics):
    with pytest.raises(ConfigError, match="metrics"):
        info_of(1, metrics)


def test_numbers_and_times_that_are_beyond_python_s_types():
    assert metrics_of(info_of(1, {"loss": 10**400, "gain": -(10**400)})) == {"loss": math.inf, "gain": -math.inf}
    assert metrics_of({"metrics": {"loss": 10**400}}) == {"loss": math.inf}
    assert time_of("2026-01-02T03:04:05") == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert time_of("yesterday") is None
