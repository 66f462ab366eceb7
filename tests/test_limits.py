"""Odd names, long paths, directories that take nothing, full disks and clocks that jump: it works, or says why not."""

import multiprocessing
import os
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, Codec, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.errors import CheckpointNotFound, StoreError, UnsupportedTensor
from dcp_storage.prune import prune
from dcp_storage.verify import verify
from tests.states import assert_same, blank_like

NOBODY = 65_534


def state_of(value, count=300_000):
    return {"w": torch.full((count,), float(value)), "step": value}


def save(path, state, **options):
    dcp.save(state, storage_writer=AsyncStorageWriter(path, **options), planner=ShardedSavePlanner())


def load(path, state, **options):
    loaded = blank_like(state)
    dcp.load(loaded, storage_reader=AsyncStorageReader(path, **options), planner=ShardedLoadPlanner())
    assert_same(loaded, state)


def failure(call, *args, **options):
    with pytest.raises(CheckpointException) as raised:
        call(*args, **options)
    return raised.value.failures[0][0]


NAMES = [
    "".join(map(chr, range(128))),
    "".join(map(chr, range(128, 0x250))),
    "\u2028\u2029\ufeff\uffff\U0010ffff \u200b",
    "\u05d0\u0627\u4e2d\U0001f600",
    "e\u0301 and \u00e9",
    "../../etc/passwd",
    "s3://bucket/key",
    "__0.metadata",
    ".metadata",
    "[red]name[/red]",
    "%s %d {} {0} $HOME `id`",
    "x" * 100_000,
    " ",
    "",
]


def test_names_of_every_odd_character(tmp_path):
    state = {name: torch.full((3,), number) for number, name in enumerate(NAMES)}
    save(tmp_path, {"tensors": state, "others": {name: number for number, name in enumerate(NAMES)}})
    load(tmp_path, {"tensors": state, "others": {name: number for number, name in enumerate(NAMES)}})
    assert verify(tmp_path).sound


def test_a_name_that_is_no_text_is_refused(tmp_path):
    """Half a surrogate pair has no UTF-8."""
    error = failure(save, tmp_path, {"half \ud800": torch.ones(3)})
    assert isinstance(error, UnsupportedTensor)
    assert "half \\ud800" in str(error)
    assert not (tmp_path / ".metadata").exists()


def test_a_path_of_2000_characters(tmp_path):
    long = tmp_path.joinpath(*["d" * 99] * 20)
    save(long, state_of(1))
    load(long, state_of(1))
    assert verify(long).sound
    assert prune(long).removed == {}


def test_a_name_of_2000_characters_in_a_path(tmp_path):
    long = tmp_path / ("d" * 2000)
    error = failure(save, long, state_of(1))
    assert isinstance(error, StoreError)
    assert "File name too long" in str(error)
    error = failure(load, long, state_of(1))
    assert isinstance(error, StoreError | CheckpointNotFound)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("only root may mount")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_disk_that_fills_up(small_disk):
    place = small_disk / "step-1"
    save(place, state_of(1), codec=Codec("none"))
    before = sorted(place.iterdir())
    error = failure(save, place, state_of(2, 600_000), codec=Codec("none"))
    assert isinstance(error, StoreError)
    assert "No space left on device" in str(error)
    assert str(place) in str(error)
    assert sorted(place.iterdir()) == before
    load(place, state_of(1))
    save(place, state_of(3), codec=Codec("none"))
    load(place, state_of(3))


def test_a_read_only_disk(small_disk):
    place = small_disk / "step-1"
    save(place, state_of(1))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for path in (place, small_disk / "step-2"):
        error = failure(save, path, state_of(2))
        assert isinstance(error, StoreError)
        assert "Read-only file system" in str(error)
    load(place, state_of(1))
    assert verify(place).sound


def as_nobody(call, *args):
    """Do in a process without root's rights; return its exit code."""
    context = multiprocessing.get_context("fork")

    def child():
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        call(*args)

    process = context.Process(target=child)
    process.start()
    process.join(60)
    alive = process.is_alive()
    process.kill()
    assert not alive
    return process.exitcode


def refused_to_save(place):
    error = failure(save, place, {"w": torch.ones(3)})
    assert isinstance(error, StoreError), repr(error)
    assert "Permission denied" in str(error)
    assert str(place) in str(error)


def refused_to_load(place):
    error = failure(load, place, {"w": torch.ones(3)})
    assert isinstance(error, StoreError), repr(error)
    assert "Permission denied" in str(error)


def check_as_nobody(place):
    refused_to_save(place / "open")
    refused_to_save(place / "open" / "below")
    load(place / "open", {"w": torch.ones(3)})
    assert verify(place / "open").sound
    refused_to_load(place / "closed")
    refused_to_save(place / "closed")
    with pytest.raises(StoreError, match="Permission denied"):
        verify(place / "closed")
    with pytest.raises(StoreError, match="Permission denied"):
        prune(place / "orphans", older_than=timedelta(0))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_directories_without_permission():
    """Not below pytest's own directory, which nobody else may enter."""
    code = (
        "import sys, tempfile, pathlib; import torch; from tests.test_limits import *\n"
        "with tempfile.TemporaryDirectory() as name:\n"
        "    place = pathlib.Path(name)\n"
        "    for kind, mode in (('open', 0o555), ('closed', 0o700), ('orphans', 0o555)):\n"
        "        save(place / kind, {'w': torch.ones(3)})\n"
        "        (place / kind / '0123456789abcdef-0-0.distcp').write_bytes(b'left')\n"
        "        (place / kind).chmod(mode)\n"
        "    place.chmod(0o755)\n"
        "    sys.exit(as_nobody(check_as_nobody, place))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=90)


class Clock:
    """A wall clock that jumps by so many seconds at each look."""

    def __init__(self, step):
        self.real, self.step, self.looks = time.time, step, 0

    def __call__(self):
        self.looks += 1
        return self.real() + self.step * self.looks


@pytest.mark.parametrize("step", [-1e6, 1e6, -86_400 * 365 * 60, 86_400 * 365 * 60])
def test_a_clock_that_jumps(tmp_path, monkeypatch, step):
    monkeypatch.setattr(time, "time", Clock(step))
    for value in (1, 2):
        save(tmp_path, state_of(value, 1000))
        load(tmp_path, state_of(value, 1000))
    monkeypatch.setattr(time, "time", Clock(-step))
    save(tmp_path, state_of(3, 1000))
    prune(tmp_path)
    assert verify(tmp_path).sound
    load(tmp_path, state_of(3, 1000))
    assert len(list(tmp_path.iterdir())) == 2
