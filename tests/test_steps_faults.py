"""A full disk, lost rights and a store that fails, at every store operation of a run that saves, pins and prunes.

What was saved stays, what fails is told by typed errors, nothing hangs, and once the store works again so does the run.
"""

import itertools
import os

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException

from dcp_storage import Checkpoints, KeepLatest
from dcp_storage.checkpoint.place import Location
from dcp_storage.errors import AccessDenied, DcpStorageError, StoreError
from dcp_storage.testing.faulty import Faulty
from dcp_storage.verify import verify

WRITES = {"put", "commit"}
CHANGES = {*WRITES, "delete", "remove_directory"}


def full_disk(operation, at_fault):
    """From some operation on nothing more can be written."""
    if at_fault and operation.method in WRITES:
        raise StoreError(f"{operation.url}/{operation.name}: no space left on device", url=operation.url)


def lost_rights(operation, at_fault):
    """From some operation on nothing may be changed any more."""
    if at_fault and operation.method in CHANGES:
        raise AccessDenied(f"{operation.url}/{operation.name}: permission denied", url=operation.url)


def one_failure(operation, at_fault):
    """A single operation of any kind fails."""
    if at_fault == 1:
        raise StoreError(f"{operation.url}/{operation.name}: timed out", url=operation.url)


class Counter:
    """Counts operations, and fails by a rule from one of them on."""

    def __init__(self, rule, at):
        self.seen, self._rule, self._at = 0, rule, at

    async def before(self, operation):
        self.seen += 1
        self._rule(operation, max(0, self.seen - self._at))


def state_of(value):
    return {"weights": torch.full((64,), float(value)), "step": value}


def attempt(call):
    """Return what a call returned, or `None` where it failed by a typed error."""
    try:
        return call()
    except DcpStorageError:
        return None
    except CheckpointException as failed:
        assert all(isinstance(error, DcpStorageError) for error, _ in failed.failures.values())
        return None


def run(root, counter, on_error):
    """Resume, pin, save, save beside, prune: return the steps that were reported as saved."""
    saved = []
    location = Location(root, opener=Faulty(before=counter.before))
    checkpoints = Checkpoints(location, keep=KeepLatest(1), verify="sizes", on_error=on_error)
    attempt(lambda: checkpoints.load(state_of(-1)))

    def pinned():
        with checkpoints.pin(2, "eval"):
            return saved.append(attempt(lambda: checkpoints.save(3, state_of(3))))

    attempt(pinned)
    saved.append(attempt(lambda: checkpoints.async_save(4, state_of(4)).result()))
    saved.append(attempt(lambda: checkpoints.save(2, state_of(22), overwrite=True)))
    for call in (checkpoints.wait, checkpoints.prune, checkpoints.steps, checkpoints.close):
        attempt(call)
    return [step for step in saved if step is not None]


@pytest.fixture
def begun(tmp_path):
    """Make a run of two steps."""

    def begin(number):
        root = tmp_path / str(number)
        with Checkpoints(root) as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, state_of(step))
        return root

    return begin


def check(root, saved):
    with Checkpoints(root, keep=KeepLatest(1)) as checkpoints:
        steps = [step.step for step in checkpoints.steps()]
        assert steps, "no step is left"
        assert max(saved, default=2) <= max(steps), f"of {saved} only {steps} stand"
        assert all(verify(root / f"step-{step}").sound for step in steps)
        state = state_of(-1)
        if saved[-1:] == [2]:
            assert checkpoints.load(state, 2) == 2
            assert state["step"] == 22
        newest = checkpoints.load(state)
        assert newest == max(steps)
        assert state["step"] in {newest, 22 if newest == 2 else newest}
        assert state["weights"].unique().tolist() == [state["step"]]
        for path in root.rglob(".*"):  # pins and tombstones of programs that are gone
            if path.name != ".metadata":
                os.utime(path, (0, 0))
        for path in root.rglob("*.distcp*"):
            os.utime(path, (0, 0))
        checkpoints.save(5, state_of(5))
        checkpoints.wait()
        checkpoints.prune()
    assert os.listdir(root) == ["step-5"]
    found = verify(root / "step-5")
    assert (found.sound, found.orphans, found.foreign) == (True, {}, ())


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("rule", "on_error"), [(full_disk, "raise"), (lost_rights, "log"), (one_failure, "raise")])
def test_whatever_fails_what_was_saved_stays(begun, rule, on_error):
    for at in itertools.count():
        counter = Counter(rule, at)
        root = begun(at)
        check(root, run(root, counter, on_error))
        if counter.seen <= at:
            break
    assert at > 60, "the run is shorter than it was"
