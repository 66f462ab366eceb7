"""Reads of local files: the same bytes from the page cache and past it, wherever they begin, on every file system."""

import errno
import fcntl
import mmap
import os
import random
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, Codec, ShardedLoadPlanner
from dcp_storage.store import reads
from dcp_storage.store.base import PAGE_BYTES, Room, room_bytes
from dcp_storage.store.residency import cached_bytes
from dcp_storage.verify import verify

SIZE = 10 * PAGE_BYTES + 1234
DATA = random.Random(0).randbytes(SIZE)
needs_nowait = pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system does not tell what is cached")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("reads") / "file"
    path.write_bytes(DATA)
    return path


def drop(path: Path, start: int = 0, length: int = 0) -> None:
    """Have the page cache forget a part of a file, or all of it."""
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def is_cached(path: Path, start: int = 0) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(1)], start, os.RWF_NOWAIT) == 1
    except OSError:
        return False
    finally:
        os.close(descriptor)


def read(path: Path, start: int, stop: int, *, final: bool = False) -> bytes:
    pages = mmap.mmap(-1, room_bytes(stop - start))
    destination = memoryview(bytearray(stop - start)) if final else None
    found = reads.read_range(path, start, stop, Room(memoryview(pages), destination))
    assert isinstance(found, memoryview)
    assert destination is None or found.obj is destination.obj
    return bytes(found)


ranges = st.tuples(st.integers(0, SIZE + 100), st.integers(1, SIZE)).map(lambda pair: (pair[0], sum(pair)))
edges = st.sampled_from(
    [
        (page * PAGE_BYTES + shift, page * PAGE_BYTES + shift + size)
        for page in (0, 3, 10)
        for shift in (0, 1, 511, 512, 4095)
        for size in (1, 512, 4096, 8193)
    ]
)


def cached_pages(path: Path) -> list[int]:
    with path.open("rb") as file:
        pages = range(-(-path.stat().st_size // PAGE_BYTES))
        return [page for page in pages if cached_bytes(file.fileno(), page * PAGE_BYTES, 1)]


@needs_nowait
@pytest.mark.parametrize("kept", [[], [0], [0, 1, 2], [0, 1, 4], [3], [10]])
def test_reads_leave_the_page_cache_as_it_was(tmp_path, kept):
    """What a load leaves behind would be taken by the next one for the start of more."""
    path = tmp_path / "file"
    path.write_bytes(DATA)
    drop(path)
    if cached_pages(path):
        pytest.skip("this file system is the page cache")
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for page in kept:
            os.pread(file.fileno(), 1, page * PAGE_BYTES)
    assert cached_pages(path) == kept
    for start, stop in ((0, SIZE), (PAGE_BYTES, SIZE - 5), (4097, 9000), (3, 4)):
        assert read(path, start, stop) == DATA[start:stop]
        assert set(cached_pages(path)) <= set(kept)


@given(st.sets(st.integers(0, 10)), st.integers(0, SIZE - 1), st.integers(1, SIZE))
def test_what_is_cached_is_told_to_the_byte(file, kept, start, nbytes):
    drop(file)
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for page in kept:
            os.pread(opened.fileno(), 1, page * PAGE_BYTES)
    cached = cached_pages(file)
    assert kept <= set(cached), "the system may have read more"
    stop = min(start + nbytes, SIZE)
    pages = range(start // PAGE_BYTES, -(-stop // PAGE_BYTES))
    missing = next((page for page in pages if page not in cached), None)
    expected = nbytes if missing is None else max(0, missing * PAGE_BYTES - start)
    with file.open("rb") as opened:
        assert cached_bytes(opened.fileno(), start, nbytes) == expected


def test_where_nothing_tells_all_counts_as_cached(tmp_path):
    reading, writing = os.pipe()
    assert cached_bytes(reading, 0, 5000) == 5000
    os.close(reading)
    os.close(writing)


@given(st.one_of(ranges, edges), st.booleans(), st.one_of(st.none(), st.tuples(st.integers(0, 10), st.integers(1, 11))))
def test_any_range_is_read_whatever_is_cached(file, wanted, final, dropped):
    start, stop = wanted
    file.read_bytes()
    if dropped:
        drop(file, dropped[0] * PAGE_BYTES, dropped[1] * PAGE_BYTES)
    assert read(file, start, stop, final=final) == DATA[start:stop]


@needs_nowait
def test_what_is_not_cached_is_read_past_the_cache_and_what_is_cached_from_it(file, monkeypatch):
    direct, real = [], reads._read_direct
    monkeypatch.setattr(reads, "_read_direct", lambda *args: direct.append(args[1]) or real(*args))
    file.read_bytes()
    if not is_cached(file):
        pytest.skip("this file system does not tell")
    assert read(file, 5000, 30_000) == DATA[5000:30_000]
    assert direct == []
    for _ in range(50):  # Linux drops what no processor is about to look at
        drop(file)
        assert read(file, 5000, 30_000) == DATA[5000:30_000]
        if direct:
            break
    else:
        pytest.skip("this file system keeps everything")
    assert direct[0] % PAGE_BYTES == 0


def refuse_nowait(monkeypatch):
    real = os.preadv

    def preadv(descriptor, buffers, offset, flags=0):
        if flags:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)


def refuse_direct(monkeypatch):
    real = fcntl.fcntl

    def refuse(descriptor, command, flags=0):
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real(descriptor, command, flags)

    monkeypatch.setattr(fcntl, "fcntl", refuse)


def refuse_pages(monkeypatch, after=0):
    """As a disk of larger pages does."""
    real, calls = os.preadv, []

    def preadv(descriptor, buffers, offset, flags=0):
        direct = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
        calls.append(direct)
        if direct and len(list(filter(None, calls))) > after:
            raise OSError(errno.EINVAL, "not aligned")
        return real(descriptor, [buffers[0][: 2 * PAGE_BYTES]] if direct else buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)


def short_reads(monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset, flags=0: real(fd, [buffers[0][:8192]], offset, flags))


@needs_nowait
@pytest.mark.parametrize(
    "break_it",
    [refuse_nowait, refuse_direct, refuse_pages, lambda patch: refuse_pages(patch, after=1), short_reads],
    ids=["no-nowait", "no-direct", "larger-pages", "larger-pages-later", "short-reads"],
)
@pytest.mark.parametrize("final", [True, False])
def test_file_systems_that_lack_something_are_read_all_the_same(file, monkeypatch, break_it, final):
    drop(file)
    break_it(monkeypatch)
    for start, stop in ((0, SIZE), (1, 40_000), (5000, 5001), (SIZE - 1, SIZE + 9), (SIZE + 5, SIZE + 6)):
        assert read(file, start, stop, final=final) == DATA[start:stop]


def test_an_error_of_the_disk_is_raised(file, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read(file, 0, 100)


@pytest.mark.parametrize("directory", ["/dev/shm", None], ids=["tmpfs", "disk"])
@pytest.mark.parametrize("codec", [Codec(block_bytes=16_384), Codec("none", block_bytes=16_384)], ids=["zstd", "none"])
def test_checkpoints_load_whole_and_in_part_from_a_cold_disk(tmp_path_factory, directory, codec):
    path = tmp_path_factory.mktemp("cold")
    if directory and not os.access(directory, os.W_OK):
        pytest.skip(f"no {directory}")
    if directory:
        path = Path(directory) / f"dcp_storage-{os.getpid()}"
    try:
        state = {
            "large": torch.randn(700, 333),
            "half": torch.randn(5000).half(),
            "odd": torch.arange(77, dtype=torch.uint8),
        }
        dcp.save(state, storage_writer=AsyncStorageWriter(path, codec=codec), no_dist=True)
        for some in (list(state), ["odd"], ["half"]):
            for file in path.iterdir():
                drop(file)
            found = {name: torch.zeros_like(state[name]) for name in some}
            dcp.load(found, storage_reader=AsyncStorageReader(path), planner=ShardedLoadPlanner(), no_dist=True)
            assert all(torch.equal(found[name], state[name]) for name in some)
        for file in path.iterdir():
            drop(file)
        assert verify(path).sound
    finally:
        for file in path.iterdir():
            with suppress(OSError):
                file.unlink()
        path.rmdir()
