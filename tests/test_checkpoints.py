"""`Checkpoints` in one process: steps that are saved and resumed, and what fails on the way."""

import gc
import logging
import os
import pickle
import signal
import threading
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from dcp_storage import AsyncStorageReader, Checkpoints, KeepEvery, KeepLatest, ShardedLoadPlanner
from dcp_storage.dcp.staging.pool import POOL
from dcp_storage.errors import (
    BlockCorrupt,
    CheckpointExists,
    CheckpointNotFound,
    ConfigError,
    ManifestCorrupt,
    MissingKeys,
    StoreError,
    UnsupportedEntry,
)
from dcp_storage.steps import pinning
from dcp_storage.verify import verify
from tests.hooks import LIMIT_S, Gate, On, fail, hooked


def state_of(value):
    return {"weights": torch.full((1 << 12,), float(value)), "step": value}


def value_of(state):
    values = {*state["weights"].unique().tolist(), state["step"]}
    assert len(values) == 1, f"a mix of steps: {values}"
    return values.pop()


def damage(root, step):
    """Flip a byte of the largest object of a step."""
    *_, largest = sorted((root / f"step-{step}").glob("*.zst"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def test_nothing_is_touched_before_the_first_call(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with Checkpoints(tmp_path / "run", keep=KeepLatest(1)):
        assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "run").exists()


def test_the_newest_step_is_resumed_from(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        state = state_of(-1)
        assert (checkpoints.load(state), checkpoints.latest(), checkpoints.steps()) == (None, None, [])
        assert value_of(state) == -1
        assert [checkpoints.save(step, state_of(step), metrics={"loss": 1 / step}) for step in (9, 10)] == [9, 10]
        assert checkpoints.async_save(2, state_of(2)).result(LIMIT_S) == 2
        assert (checkpoints.load(state), value_of(state)) == (10, 10)
        assert (checkpoints.load(state, 2), value_of(state)) == (2, 2)
        assert [(step.step, dict(step.metrics)) for step in checkpoints.steps()] == [
            (2, {}),
            (9, {"loss": 1 / 9}),
            (10, {"loss": 0.1}),
        ]
        with pytest.raises(CheckpointNotFound, match="step-3"):
            checkpoints.load(state, 3)


def test_a_step_is_a_checkpoint_of_its_own(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state_of(5))
    assert verify(tmp_path / "step-5").sound
    state = state_of(-1)
    dcp.load(state, storage_reader=AsyncStorageReader(tmp_path / "step-5"), planner=ShardedLoadPlanner())
    assert value_of(state) == 5


def test_s3(moto_s3):
    root = moto_s3.url.removesuffix("/step-1")
    with Checkpoints(root, storage_options=moto_s3.storage_options, keep=KeepLatest(2), verify="full") as checkpoints:
        assert checkpoints.load(state_of(-1)) is None
        for step in range(9, 12):
            checkpoints.save(step, state_of(step))
            checkpoints.wait()  # else a check that is behind leaves one out, which then takes nobody's place
        future = checkpoints.async_save(12, state_of(12))
        assert future.result(LIMIT_S) == 12
        state = state_of(-1)
        assert (checkpoints.load(state), value_of(state), checkpoints.latest()) == (12, 12, 12)
    assert [(step.step, step.url) for step in checkpoints.steps()] == [(n, f"{root}/step-{n}") for n in (11, 12)]


@pytest.mark.parametrize("root", ["memory://run", "memory://run/"])
def test_a_url_is_a_root(root):
    with Checkpoints(root) as checkpoints:
        checkpoints.save(5, state_of(5), overwrite=True)
        assert checkpoints.load(state_of(-1)) == 5


def test_planners_of_dcp(tmp_path):
    with Checkpoints(
        tmp_path, save_planner=DefaultSavePlanner(), load_planner=DefaultLoadPlanner(allow_partial_load=True)
    ) as checkpoints:
        checkpoints.save(1, state_of(1))
        state = state_of(-1) | {"more": 7}
        assert (checkpoints.load(state), value_of(state), state["more"]) == (1, 1, 7)


def test_a_committed_step_is_not_replaced_unless_that_is_asked_for(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1))
        for save in (checkpoints.save, checkpoints.async_save):
            with pytest.raises(CheckpointExists, match="step-1"):
                save(1, state_of(2))
                checkpoints.wait()
            save(1, state_of(3), overwrite=True)
            state = state_of(-1)
            assert (checkpoints.load(state), value_of(state)) == (1, 3)


def test_what_a_killed_save_left_is_saved_over(tmp_path):
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "0123456789abcdef-0-0.distcp.zst").write_bytes(b"torn")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.load(state_of(-1)) is None
        assert checkpoints.save(1, state_of(1)) == 1
        assert checkpoints.load(state_of(-1)) == 1


def test_one_save_at_a_time_goes_on_in_the_background(tmp_path):
    gate = Gate()
    with Checkpoints(hooked(tmp_path, before=gate)) as checkpoints:
        state = state_of(1)
        first = checkpoints.async_save(1, state)
        state["weights"].fill_(-1)  # what training does next
        skipped = checkpoints.async_save(2, state_of(2), skip_if_busy=True)
        assert (skipped.result(), first.done(), first.cancel()) == (None, False, False)
        threading.Timer(0.2, gate.opened.set).start()
        second = checkpoints.async_save(3, state_of(3))
        assert first.done()
        assert (first.result(), second.result(LIMIT_S)) == (1, 3)
        assert checkpoints.async_save(4, state_of(4), skip_if_busy=True).result(LIMIT_S) == 4
        state = state_of(-1)
        assert (checkpoints.load(state, 1), value_of(state)) == (1, 1)


@pytest.mark.parametrize("how", ["result", "save", "async_save", "load", "wait", "close"])
def test_what_fails_in_the_background_is_raised_once(tmp_path, how):
    full = On("put", fail)
    checkpoints = Checkpoints(hooked(tmp_path, before=full))
    future = checkpoints.async_save(1, state_of(1))
    assert isinstance(future.exception(LIMIT_S), StoreError)
    full.active = False
    calls = {
        "result": future.result,
        "save": lambda: checkpoints.save(2, state_of(2)),
        "async_save": lambda: checkpoints.async_save(2, state_of(2)),
        "load": lambda: checkpoints.load(state_of(-1)),
        "wait": checkpoints.wait,
        "close": checkpoints.close,
    }
    with pytest.raises(StoreError, match="no space left"):
        calls[how]()
    checkpoints.wait()
    checkpoints.close()


def test_failures_that_are_logged_let_the_run_go_on(tmp_path, caplog):
    full = On("put", fail)
    with Checkpoints(hooked(tmp_path, before=full), on_error="log") as checkpoints:
        assert checkpoints.save(1, state_of(1)) is None
        assert checkpoints.async_save(1, state_of(1)).result(LIMIT_S) is None
        assert checkpoints.save(1, {"hook": Unsteady(RuntimeError("no state"))}) is None
        assert checkpoints.async_save(1, {"hook": threading.Lock()}).result(LIMIT_S) is None
        assert checkpoints.failed_saves == 4
        told = [record.message for record in caplog.records if "the run continues" in record.message]
        assert len(told) == 4
        assert "no space left" in told[0]
        with pytest.raises(ConfigError):
            checkpoints.save(True, state_of(1))
        full.active = False
        assert checkpoints.save(1, state_of(1)) == 1
        assert checkpoints.failed_saves == 4
        assert checkpoints.save(1, state_of(2)) is None
        state = state_of(-1)
        assert (checkpoints.load(state), value_of(state)) == (1, 1)


class Unsteady:
    """A `Stateful` that fails as long as it has an error."""

    def __init__(self, error=None):
        self.error = error
        self.loaded = None

    def state_dict(self):
        if self.error:
            raise self.error
        return {"x": 1}

    def load_state_dict(self, state):
        if self.error:
            raise self.error
        self.loaded = state


def test_a_stateful_is_asked_and_told(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        held = Unsteady(RuntimeError("no state"))
        for call in (checkpoints.save, checkpoints.async_save):
            with pytest.raises(RuntimeError, match="no state"):
                call(1, {"held": held})
        held.error = None
        checkpoints.save(1, {"held": held})
        assert checkpoints.load({"held": held}) == 1
        assert held.loaded == {"x": 1}


def test_what_cannot_be_saved_is_raised_as_it_is(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UnsupportedEntry, match="lock"):
            checkpoints.save(1, {"lock": threading.Lock()})
        future = checkpoints.async_save(1, {"lock": threading.Lock()})
        with pytest.raises(UnsupportedEntry, match="lock"):
            future.result(LIMIT_S)


def spoil_manifest(root, step):
    (root / f"step-{step}" / ".metadata").write_bytes(b"")


def lose_object(root, step):
    next((root / f"step-{step}").glob("*.zst")).unlink()


@pytest.mark.parametrize("spoil", [damage, spoil_manifest, lose_object])
def test_a_damaged_step_is_passed_over(tmp_path, spoil, caplog):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step))
        spoil(tmp_path, 3)
        state = state_of(-1)
        with pytest.raises((BlockCorrupt, ManifestCorrupt, StoreError)) as strict:
            checkpoints.load(state, strict=True)
        with pytest.raises(strict.type):
            checkpoints.load(state, 3)
        assert (checkpoints.load(state), value_of(state)) == (2, 2)
        assert "step 3 is damaged" in caplog.text
        checkpoints.save(3, state_of(3))  # it needs no leave: this run knows that it is damaged
        assert (checkpoints.load(state), value_of(state)) == (3, 3)


def test_a_run_does_not_begin_anew_because_all_is_damaged(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(5):
            checkpoints.save(step, state_of(step))
        for step in (4, 3):
            damage(tmp_path, step)
        assert checkpoints.load(state_of(-1)) == 2
        for step in (2, 1):
            damage(tmp_path, step)
        with pytest.raises(BlockCorrupt, match="step-1"):
            checkpoints.load(state_of(-1))
    with Checkpoints(tmp_path / "other") as checkpoints:
        checkpoints.save(1, state_of(1))
        damage(tmp_path / "other", 1)
        with pytest.raises(BlockCorrupt, match="step-1"):
            checkpoints.load(state_of(-1))


def test_what_is_missing_is_no_damage(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1) | {"more": 1})
        checkpoints.save(2, state_of(2))
        with pytest.raises(MissingKeys, match="more"):
            checkpoints.load(state_of(-1) | {"more": 0})


def test_an_older_step_that_lacks_something_is_not_mixed_with_a_damaged_one(tmp_path):
    planner = ShardedLoadPlanner(allow_missing=("more",))
    with Checkpoints(tmp_path, load_planner=planner) as checkpoints:
        checkpoints.save(1, state_of(1))
        checkpoints.save(2, state_of(2) | {"more": torch.ones(3)})
        damage(tmp_path, 2)
        with pytest.warns(UserWarning, match="more"), pytest.raises(BlockCorrupt):
            checkpoints.load(state_of(-1) | {"more": torch.zeros(3)})


def test_what_a_planner_of_dcp_skips_is_not_mixed_with_a_damaged_step_either(tmp_path):
    with Checkpoints(tmp_path, load_planner=DefaultLoadPlanner(allow_partial_load=True)) as checkpoints:
        checkpoints.save(1, state_of(1))
        checkpoints.save(2, state_of(2) | {"more": torch.ones(3)})
        damage(tmp_path, 2)
        with pytest.raises(BlockCorrupt):
            checkpoints.load(state_of(-1) | {"more": torch.zeros(3)})


@pytest.mark.parametrize("keep", [KeepLatest(2), KeepLatest(2) | KeepEvery(2)])
def test_a_step_that_is_pruned_before_it_is_read_is_no_damage(tmp_path, keep):
    """The newest one is loaded, not what stands below the one that is gone."""
    with Checkpoints(tmp_path, keep=keep) as trainer:

        def go_on(_):
            reading.active = False
            save_all(4, 5, 6)

        def save_all(*steps):
            for step in steps:
                trainer.save(step, state_of(step))
                trainer.wait()

        save_all(1, 2, 3)
        reading = On("get", go_on)
        with Checkpoints(hooked(tmp_path, before=reading)) as follower:
            state = state_of(-1)
            assert follower.load(state) == value_of(state) == 6


def test_a_failed_save_lets_its_copy_go(tmp_path):
    full = On("put", fail)
    with Checkpoints(hooked(tmp_path, before=full), on_error="log") as checkpoints:
        assert checkpoints.async_save(1, {"weights": torch.ones(1 << 12)}).result() is None
        until = time.monotonic() + LIMIT_S
        while POOL._lent() is not None:  # DCP's thread ends a moment later
            gc.collect()
            assert time.monotonic() < until


@pytest.mark.parametrize("step", [True, -1, 1.0, "1", None, torch.tensor(1)])
def test_what_is_no_step_is_refused(tmp_path, step):
    with Checkpoints(tmp_path) as checkpoints:
        for call in (checkpoints.save, checkpoints.async_save):
            with pytest.raises(ConfigError, match="non-negative integer"):
                call(step, state_of(1))
        with pytest.raises(ConfigError, match="should_save"):
            checkpoints.should_save(step)
        if step is not None:
            with pytest.raises(ConfigError, match="non-negative integer"):
                checkpoints.load(state_of(1), step)
    assert not list(tmp_path.iterdir())


def test_what_is_no_state_or_no_metrics_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1))
        for call in (checkpoints.save, checkpoints.async_save):
            with pytest.raises(ConfigError, match="state is"):
                call(2, torch.ones(1))
            with pytest.raises(ConfigError, match="metrics is"):
                call(2, state_of(2), metrics=[1])
        with pytest.raises(ConfigError, match="state is"):
            checkpoints.load(torch.ones(1))
        assert checkpoints.latest() == 1


@pytest.mark.parametrize(
    "arguments", [{"verify": "all"}, {"on_error": "ignore"}, {"keep": 3}, {"storage_options": {"key": "x"}}]
)
def test_impossible_arguments_are_refused(tmp_path, arguments):
    with pytest.raises(ConfigError):
        Checkpoints(tmp_path, **arguments)


def test_a_file_is_no_root(tmp_path):
    (tmp_path / "root").write_text("mine")
    with Checkpoints(tmp_path / "root") as checkpoints:
        for call in (checkpoints.steps, checkpoints.latest, lambda: checkpoints.load(state_of(1))):
            with pytest.raises(StoreError):
                call()
        with pytest.raises(StoreError):
            checkpoints.save(1, state_of(1))
    assert (tmp_path / "root").read_text() == "mine"


def test_a_closed_one_says_so(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.close()
    checkpoints.close()
    for call in (
        lambda: checkpoints.save(1, state_of(1)),
        lambda: checkpoints.async_save(1, state_of(1)),
        lambda: checkpoints.load(state_of(1)),
        lambda: checkpoints.should_save(1),
        checkpoints.prune,
    ):
        with pytest.raises(ConfigError, match="closed"):
            call()
    assert checkpoints.latest() is None


def test_it_belongs_to_its_process(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ConfigError, match="process"):
            pickle.dumps(checkpoints)
        future = checkpoints.async_save(1, state_of(1))
        child = os.fork()
        if not child:
            try:
                checkpoints.should_save(1)
            except ConfigError:
                checkpoints.close()  # at once, though the thread of the save is not here
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert future.result(LIMIT_S) == 1


def test_an_error_in_the_block_is_raised_and_the_save_ends(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(KeyError), checkpoints:
        checkpoints.async_save(1, state_of(1))
        raise KeyError("a mistake of training's")
    assert checkpoints.latest() == 1
    assert not [record for record in caplog.records if record.name.startswith("dcp_storage")]


def test_a_save_that_fails_after_an_error_is_logged(tmp_path, caplog):
    with pytest.raises(KeyError), Checkpoints(hooked(tmp_path, before=On("put", fail))) as checkpoints:
        checkpoints.async_save(1, state_of(1))
        raise KeyError("a mistake of training's")
    assert "the save in the background also failed" in caplog.text


def test_old_steps_go_once_a_new_one_is_committed(tmp_path):
    gate = Gate("commit", 2)
    with Checkpoints(hooked(tmp_path, before=gate), keep=KeepLatest(1)) as checkpoints:
        checkpoints.save(1, state_of(1))
        future = checkpoints.async_save(2, state_of(2))
        assert gate.reached.wait(LIMIT_S)
        assert checkpoints.latest() == 1
        gate.opened.set()
        future.result(LIMIT_S)
        checkpoints.wait()
        assert [step.step for step in checkpoints.steps()] == [2]
    assert not list((tmp_path / "step-1").glob("*"))


def test_steps_that_are_in_use_stay(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step))
    gate = Gate("commit", 1)
    with Checkpoints(hooked(tmp_path, before=gate), keep=KeepLatest(1)) as checkpoints:
        future = checkpoints.async_save(1, state_of(1), overwrite=True)
        assert gate.reached.wait(LIMIT_S)
        decisions = checkpoints.prune()
        gate.opened.set()
        assert [(each.step, each.kept) for each in decisions] == [(1, True), (2, True)]
        assert decisions[0].reasons == ("in use",)
        assert future.result(LIMIT_S) == 1


def test_what_is_not_a_step_s_stays(tmp_path):
    dcp.save(state_of(1), checkpoint_id=tmp_path / "step-1", no_dist=True)  # stock's
    strange = ["step-2.backup", "step-03", "step-x", "notes"]
    for name in strange:
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").write_bytes(b"mine")
    (tmp_path / "step-1" / "mine.txt").write_text("mine")
    with Checkpoints(tmp_path, keep=KeepLatest(1)) as checkpoints:
        assert checkpoints.latest() == 1
        assert checkpoints.load(state_of(-1)) == 1
        checkpoints.save(4, state_of(4))
        checkpoints.wait()
        assert [step.step for step in checkpoints.steps()] == [4]
    assert [path.name for path in (tmp_path / "step-1").iterdir()] == ["mine.txt"]
    assert all((tmp_path / name / ".metadata").read_bytes() == b"mine" for name in strange)


def test_a_follower_waits_for_a_step(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TimeoutError):
            checkpoints.wait_for(timeout=0.1)
        checkpoints.save(1, state_of(1))
        assert checkpoints.wait_for() == checkpoints.wait_for(1) == 1
        saving = threading.Timer(0.2, checkpoints.save, (3, state_of(3)))
        saving.start()
        assert checkpoints.wait_for(2, timeout=LIMIT_S) == 3
        saving.join()


def test_a_pinned_step_stays_until_it_is_let_go(tmp_path):
    with Checkpoints(tmp_path, keep=KeepLatest(1)) as checkpoints:
        checkpoints.save(1, state_of(1))
        with Checkpoints(tmp_path).pin(1, "eval"):
            checkpoints.save(2, state_of(2))
            checkpoints.wait()
            assert [(each.step, each.reasons) for each in checkpoints.prune() if each.step == 1] == [(1, ("pinned",))]
            assert checkpoints.load(state_of(-1), 1) == 1
        assert not checkpoints.prune()[0].kept
        assert [step.step for step in checkpoints.steps()] == [2]
        for step, name in ((1, "eval"), (3, "eval")):
            with pytest.raises(CheckpointNotFound), checkpoints.pin(step, name):
                pass
        for name in ("", "a/b", "x" * 65, None):
            with pytest.raises(ConfigError), checkpoints.pin(2, name):
                pass
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def test_a_dead_pin_counts_no_more(tmp_path):
    with Checkpoints(tmp_path, keep=KeepLatest(1)) as checkpoints:
        checkpoints.save(1, state_of(1))
        pin = tmp_path / "step-1" / ".pin-eval-0123456789abcdef"
        pin.write_bytes(b"{}")
        os.utime(pin, (0, 0))
        checkpoints.save(2, state_of(2))
        checkpoints.wait()
        assert [step.step for step in checkpoints.steps()] == [2]
    assert not (tmp_path / "step-1").exists()


def test_a_pin_is_refused_while_a_step_is_being_removed_and_the_next_prune_ends_it(tmp_path):
    killed = On("delete", lambda delete: delete.name == ".metadata" and fail(delete))
    with Checkpoints(hooked(tmp_path, after=killed), keep=KeepLatest(1)) as checkpoints:
        checkpoints.save(1, state_of(1))
        (tmp_path / "step-1" / ".removing-0123456789abcdef").write_bytes(b"{}")
        with pytest.raises(CheckpointNotFound), checkpoints.pin(1, "eval"):
            pass
        assert not list((tmp_path / "step-1").glob(".pin*"))
        checkpoints.save(2, state_of(2))
        checkpoints.wait()
        assert list((tmp_path / "step-1").glob("*.zst"))
        assert [step.step for step in checkpoints.steps()] == [2]
        checkpoints.prune()
        assert not (tmp_path / "step-1").exists()


def test_a_pin_is_refreshed_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(pinning, "_REFRESH_S", 0.01)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1))
        with checkpoints.pin(1, "eval"):
            [pin] = (tmp_path / "step-1").glob(".pin-eval-*")
            os.utime(pin, (0, 0))
            deadline = time.monotonic() + LIMIT_S
            while pin.stat().st_mtime == 0:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert not list((tmp_path / "step-1").glob(".pin*"))


def test_what_killed_saves_left_goes_after_a_day(tmp_path):
    names = ["0123456789abcdef-0-0.distcp.zst", ".metadata.tmp-0123456789abcdef", "mine.txt"]
    for step, age_s in ((7, 25 * 3600), (8, 23 * 3600)):
        (tmp_path / f"step-{step}").mkdir()
        for name in names:
            path = tmp_path / f"step-{step}" / name
            path.write_bytes(b"torn")
            os.utime(path, (time.time() - age_s,) * 2)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.prune(dry_run=True) == []
        assert len(list((tmp_path / "step-7").iterdir())) == 3
        assert checkpoints.prune() == []
    assert [path.name for path in (tmp_path / "step-7").iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in (tmp_path / "step-8").iterdir()) == sorted(names)


def test_prune_says_what_it_would_remove(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step))
    with Checkpoints(tmp_path, keep=KeepLatest(1)) as checkpoints:
        for dry_run in (True, False):
            decisions = checkpoints.prune(dry_run=dry_run)
            assert [(each.step, each.kept) for each in decisions] == [(1, False), (2, False), (3, True)]
        assert [step.step for step in checkpoints.steps()] == [3]


def test_a_prune_that_fails_is_told_and_fails_no_save(tmp_path, caplog):
    denied = On("delete", fail)
    with Checkpoints(hooked(tmp_path, before=denied), keep=KeepLatest(1)) as checkpoints:
        checkpoints.save(1, state_of(1))
        checkpoints.save(2, state_of(2))
        checkpoints.wait()
        assert "not all old steps were removed" in caplog.text
        denied.active = False
        checkpoints.save(3, state_of(3))
        checkpoints.wait()
        assert [step.step for step in checkpoints.steps()] == [3]


@pytest.mark.parametrize(("how", "spoil"), [("sizes", lose_object), ("full", lose_object), ("full", damage)])
def test_a_step_that_a_check_finds_damaged_counts_for_nothing(tmp_path, caplog, how, spoil):
    caplog.set_level(logging.ERROR)
    spoilt = hooked(tmp_path, after=On("commit", lambda _: spoil(tmp_path, 2), 2))
    with Checkpoints(spoilt, keep=KeepLatest(1), verify=how) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step))
            checkpoints.wait()
        assert "step-2 is damaged" in caplog.text
        assert {1, 2} <= {step.step for step in checkpoints.steps()}
        checkpoints.save(3, state_of(3))
        checkpoints.wait()
        assert {1, 3} <= {step.step for step in checkpoints.steps()}, "step 3 was not told to be sound yet"
    assert [step.step for step in checkpoints.steps()] == [3]


def test_a_step_that_is_saved_again_while_it_is_checked_is_not_damaged(tmp_path, caplog):
    gate = Gate("size", 1)
    with Checkpoints(hooked(tmp_path, before=gate), verify="full", keep=KeepLatest(1)) as checkpoints:
        checkpoints.save(1, state_of(1))
        assert gate.reached.wait(LIMIT_S)
        checkpoints.save(1, state_of(2), overwrite=True)
        gate.opened.set()
        checkpoints.wait()
        assert "damaged" not in caplog.text
        with pytest.raises(CheckpointExists):
            checkpoints.save(1, state_of(3))
        checkpoints.save(2, state_of(2))
    assert [step.step for step in checkpoints.steps()] == [2]


def test_a_check_that_cannot_be_made_says_nothing_of_the_step(tmp_path, caplog):
    denied = On("size", fail)
    denied.active = False
    with Checkpoints(hooked(tmp_path, before=denied), keep=KeepLatest(1), verify="sizes") as checkpoints:
        checkpoints.save(1, state_of(1))
        checkpoints.wait()
        denied.active = True
        checkpoints.save(2, state_of(2))
        checkpoints.wait()
        assert "could not be checked" in caplog.text
    assert [step.step for step in checkpoints.steps()] == [1, 2], "2 did not pass, and did not fail"


def test_nothing_is_deleted_on_the_word_of_a_damaged_manifest(tmp_path):
    with Checkpoints(tmp_path, keep=KeepLatest(1)) as checkpoints:
        checkpoints.save(1, state_of(1))
        manifest = tmp_path / "step-1" / ".metadata"
        manifest.write_bytes(manifest.read_bytes()[:-9])
        checkpoints.save(2, state_of(2))
        checkpoints.wait()
        assert [step.step for step in checkpoints.steps()] == [2]
        left = list((tmp_path / "step-1").iterdir())
        assert left
        assert all(path.name.endswith(".distcp.zst") for path in left)
        for path in left:
            os.utime(path, (0, 0))
        checkpoints.prune()
    assert not (tmp_path / "step-1").exists()


def test_after_a_return_to_an_earlier_step_what_is_saved_stays(tmp_path):
    with Checkpoints(tmp_path, keep=KeepLatest(2)) as checkpoints:
        for step in (100, 200, 300):
            checkpoints.save(step, state_of(step))
            checkpoints.wait()
        assert checkpoints.load(state_of(-1), 200) == 200
        checkpoints.save(210, state_of(210))
        checkpoints.wait()
        assert 210 in [step.step for step in checkpoints.steps()]
        assert checkpoints.load(state_of(-1), 210) == 210


def test_a_save_waits_for_the_removal_of_its_step(tmp_path):
    gate = Gate("delete")
    with Checkpoints(hooked(tmp_path, after=gate), keep=KeepLatest(1)) as checkpoints:
        checkpoints.save(1, state_of(1))
        checkpoints.save(2, state_of(2))
        assert gate.reached.wait(LIMIT_S)
        assert not (tmp_path / "step-1" / ".metadata").exists()
        threading.Timer(0.2, gate.opened.set).start()
        checkpoints.save(1, state_of(7))
        assert gate.opened.is_set()
        checkpoints.wait()
        state = state_of(-1)
        assert checkpoints.load(state, 1) == 1
        assert state["step"] == 7
    assert verify(tmp_path / "step-1").sound
