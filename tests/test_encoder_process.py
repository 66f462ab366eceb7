"""Encoding apart from the process that saves: the same bytes, no matter what becomes of the process."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_storage.config import Codec
from dcp_storage.format.codecs.blocks import CODECS as BLOCK_CODECS
from dcp_storage.format.codecs.blocks import ItemEncoder
from dcp_storage.transfer import encoder_process, encoders
from dcp_storage.transfer.encoder_process import EncoderProcess
from dcp_storage.transfer.encoders import encoder_in_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is shared by Linux's memfd")

BLOCK = 4096
CODECS = [Codec(block_bytes=BLOCK), Codec("none", block_bytes=BLOCK)]
LIMIT_S = 30


@pytest.fixture(autouse=True)
def nothing_was_warned_of():
    encoders._warn.cache_clear()


def slices(seed, shapes):
    """Make random slices of items out of pairs of elements and planes."""
    random = np.random.default_rng(seed)
    return [(random.bytes(elements * planes), planes) for elements, planes in shapes]


def encoded(encoder, items):
    raw_bytes = sum(len(raw) for raw, _ in items)
    blocks = sum(-(-len(raw) // BLOCK) for raw, _ in items)
    out = memoryview(bytearray(BLOCK_CODECS["zstd"].limit(raw_bytes, blocks)))
    pieces = encoder.encode_items(items, out)
    return pieces, bytes(out[: sum(sum(piece.lengths) for piece in pieces)])


@pytest.fixture(scope="module", params=CODECS, ids=lambda codec: codec.compression)
def both(request):
    with closing(EncoderProcess(request.param)) as process:
        yield process, ItemEncoder(request.param)


@given(seed=st.integers(0, 2**32), shapes=st.lists(st.tuples(st.integers(1, 3000), st.sampled_from([1, 2, 4, 8]))))
def test_a_process_encodes_to_the_same_bytes(both, seed, shapes):
    process, here = both
    items = slices(seed, shapes)
    assert encoded(process, items) == encoded(here, items)


ITEMS = slices(1, [(1000, 4), (3, 1), (20_000, 2)])


@pytest.mark.parametrize("at", ["start", "later"])
def test_a_process_that_dies_costs_a_warning_and_no_byte(caplog, at):
    expected = encoded(ItemEncoder(CODECS[0]), ITEMS)
    with encoder_in_process(CODECS[0]) as encoder:
        process = encoder._encoder._process
        if at == "later":
            assert encoded(encoder, ITEMS) == expected
        process.kill()
        assert encoded(encoder, ITEMS) == expected
        assert encoded(encoder, ITEMS) == expected
    [record] = caplog.records
    assert "cannot encode in a separate process" in record.message
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("sabotage", "says"),
    [
        (lambda patch: patch.setattr(sys, "executable", "/nowhere/python"), "/nowhere/python"),
        (lambda patch: patch.setattr(sys, "executable", None), "no Python interpreter"),
        (lambda patch: patch.setattr(sys, "executable", ""), "no Python interpreter"),
        (lambda patch: patch.setattr(sys, "frozen", True, raising=False), "no Python interpreter"),
        (lambda patch: patch.delattr(os, "memfd_create"), "built without os.memfd_create"),
        (lambda patch: patch.setattr(encoder_process, "Pipe", refuse), "too many open files"),
        (lambda patch: patch.setattr(encoder_process, "mmap", refuse), "too many open files"),
    ],
    ids=["not there", "none", "empty", "frozen", "no memfd", "no pipe", "no memory"],
)
def test_where_no_process_can_be_had_the_thread_encodes(monkeypatch, caplog, sabotage, says):
    before = os.listdir("/proc/self/fd")
    sabotage(monkeypatch)
    for _ in range(3):
        with encoder_in_process(CODECS[0]) as encoder:
            assert encoded(encoder, ITEMS) == encoded(ItemEncoder(CODECS[0]), ITEMS)
    [record] = caplog.records
    assert says in record.message
    assert os.listdir("/proc/self/fd") == before


def refuse(*args):
    raise OSError("too many open files")


def test_what_is_no_text_in_sys_path_does_no_harm(monkeypatch, caplog):
    monkeypatch.setattr(sys, "path", [Path("/somewhere"), *sys.path, None, 5])
    with closing(EncoderProcess(CODECS[0])) as process:
        assert encoded(process, ITEMS) == encoded(ItemEncoder(CODECS[0]), ITEMS)


def test_a_process_that_stops_without_dying_is_given_up(monkeypatch, caplog):
    monkeypatch.setattr(encoder_process, "_PATIENCE_S", 0.5)
    with encoder_in_process(CODECS[0]) as encoder:
        process = encoder._encoder._process
        process.send_signal(signal.SIGSTOP)
        assert encoded(encoder, ITEMS) == encoded(ItemEncoder(CODECS[0]), ITEMS)
    [record] = caplog.records
    assert "it did not respond for" in record.message
    assert process.returncode == -signal.SIGKILL


def test_a_process_gives_way_and_ends_with_its_block():
    before = os.listdir("/proc/self/fd")
    with closing(EncoderProcess(CODECS[0])) as process:
        encoded(process, ITEMS)
        pid = process._process.pid
        assert os.getpriority(os.PRIO_PROCESS, pid) == max(10, os.getpriority(os.PRIO_PROCESS, 0))
    assert not exists(pid)
    assert os.listdir("/proc/self/fd") == before


def test_ctrl_c_is_left_to_the_process_that_saves():
    with closing(EncoderProcess(CODECS[0])) as process:
        first = encoded(process, ITEMS)
        process._process.send_signal(signal.SIGINT)
        assert encoded(process, ITEMS) == first


STARTER = """
import sys
from dcp_storage.config import Codec
from dcp_storage.transfer.encoder_process import EncoderProcess
process = EncoderProcess(Codec())
print(process._process.pid, flush=True)
sys.stdin.read()
"""


def test_a_process_does_not_outlive_the_one_that_started_it():
    with subprocess.Popen(
        [sys.executable, "-c", STARTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as starter:
        pid = int(starter.stdout.readline())
        assert exists(pid)
        starter.kill()
        deadline = time.monotonic() + LIMIT_S
        while exists(pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_process_imports_no_torch():
    script = f"import sys, {encoder_process.__name__}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": os.pathsep.join(sys.path)}, check=True)


def exists(pid):
    """Tell whether a process runs: one that nobody waited for (an orphan's new parent may not) has ended, too."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
