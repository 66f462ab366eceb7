"""Stores on local directories."""

import asyncio
import errno
import fcntl
import os
import stat
from collections.abc import AsyncIterator
from mmap import mmap
from pathlib import Path

import pytest

from dcp_storage.errors import StoreError
from dcp_storage.store import files
from dcp_storage.store.base import Batch, Store
from dcp_storage.store.local import LocalStore
from dcp_storage.testing.place import NAME, Place, batches_of, put, run, sizes
from dcp_storage.testing.suite import StoreSuite


class TestLocalStore(StoreSuite):
    creates_at_once = True

    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return Place(str(tmp_path / "runs" / "step-1"))


class TestFileUrl(StoreSuite):
    creates_at_once = True

    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return Place(f"file://{tmp_path}/runs/step-1")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "step-1"))


def files_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_only_regular_files_are_listed(tmp_path: Path):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / NAME).write_bytes(b"1234")
    (tmp_path / "link").symlink_to(tmp_path / NAME)
    assert run(Place(str(tmp_path)), sizes) == {NAME: 4, "link": 4}


def test_existing_object_is_not_touched(tmp_path: Path):
    (tmp_path / NAME).write_bytes(b"old")
    with pytest.raises(StoreError, match=NAME):
        run(Place(str(tmp_path)), lambda store: put(store, NAME, b"new"))
    assert (tmp_path / NAME).read_bytes() == b"old"


def test_path_below_a_file(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    below = Place(str(tmp_path / "file" / "step-1"))
    calls = (
        lambda store: put(store, NAME, b"x"),
        lambda store: store.commit(NAME, b"x"),
        lambda store: store.get(NAME),
        lambda store: store.get_range(NAME, 0, 1),
        lambda store: store.size(NAME),
        lambda store: store.list(),
        lambda store: store.delete([NAME]),
    )
    for call in calls:
        with pytest.raises(StoreError, match=r"file/step-1") as caught:
            run(below, call)
        assert type(caught.value) is StoreError


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_permission_denied(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        run(Place(str(tmp_path / "step-1")), lambda store: put(store, NAME, b"x"))
    tmp_path.chmod(0o700)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_disk_full_while_writing(tmp_path: Path, monkeypatch):
    """A file that takes no byte: the error comes from the kernel, in the midst of the blocks and at the end."""
    real_open = os.open

    def open_full(path, flags: int, *args, **kwargs):
        if flags & os.O_CREAT:
            os.close(real_open(path, flags, *args, **kwargs))
            return real_open("/dev/full", os.O_WRONLY)
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_full)
    for size in (100, 1_000_000, 3_000_000):
        with pytest.raises(StoreError, match=rf"cannot write {tmp_path}/{NAME}.*No space left on device"):
            run(Place(str(tmp_path)), lambda store, size=size: put(store, NAME, b"x" * size))
        assert files_in(tmp_path) == []


def test_put_that_cannot_sync(place: Place, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match="No space left on device"):
        run(place, lambda store: put(store, NAME, b"data"))
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_commit_that_fails_keeps_the_old_object(place: Place, tmp_path: Path, monkeypatch, step: str):
    run(place, lambda store: store.commit(".metadata", b"old"))
    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync", fail) if step == "fsync" else (Path, "replace", fail)))
        with pytest.raises(StoreError, match=r"cannot commit .*/\.metadata.*No space left"):
            run(place, lambda store: store.commit(".metadata", b"new"))
    assert [path.name for path in files_in(tmp_path)] == [".metadata"]
    assert run(place, lambda store: store.get(".metadata")) == b"old"


def of_directories(monkeypatch, number: int) -> None:
    """Let only `fsync` of a directory fail."""
    real = os.fsync

    def fsync(descriptor: int):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP])
def test_file_systems_that_do_not_sync_directories_are_told_of_once(place: Place, monkeypatch, caplog, number: int):
    files._told_of.clear()
    of_directories(monkeypatch, number)
    for data in (b"old", b"new"):
        run(place, lambda store, data=data: store.commit(".metadata", data))
        run(place, lambda store: put(store, NAME, b"data"))
        run(place, lambda store: store.delete([NAME]))
    assert run(place, lambda store: store.get(".metadata")) == b"new"
    [record] = caplog.records
    assert "does not sync directories" in record.message


def test_a_directory_that_fails_to_sync_fails_the_commit(place: Place, monkeypatch):
    of_directories(monkeypatch, errno.EIO)
    with pytest.raises(StoreError, match="Input/output error"):
        run(place, lambda store: store.commit(".metadata", b"new"))


def test_order_of_syncs(tmp_path: Path, monkeypatch):
    """Data, then its directory, then the new manifest, then the rename, then the directory again."""
    steps = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int):
        steps.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name.partition(".tmp-")[0]))
        real_fsync(descriptor)

    def replace(self, target):
        steps.append(("rename", target.name))
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)

    async def use(store: Store):
        await put(store, NAME, b"data")
        await store.commit(".metadata", b"{}")

    run(Place(str(tmp_path / "runs" / "step-1")), use)
    outwards = [
        ("sync", "step-1"),
        ("sync", "runs"),
        *(("sync", outer.name) for outer in (tmp_path, *tmp_path.parents)),
    ]
    before, after = steps[1:-3], steps[-3:]
    assert steps[0] == ("sync", NAME)
    assert before == outwards[: len(before)]
    assert before[:3] == outwards[:3], "who made these directories, and whether they were synced, is not known"
    assert after == [("sync", ".metadata"), ("rename", ".metadata"), ("sync", "step-1")]


def test_sync_stops_at_what_this_user_cannot_have_made(tmp_path: Path, monkeypatch):
    synced: list[str] = []
    monkeypatch.setattr(files, "sync_directory", lambda directory: synced.append(directory.name))
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    files.sync_path(tmp_path / "runs" / "step-1")
    files.sync_path(tmp_path / "disk" / "step-1")
    assert synced == ["step-1", "runs", "step-1", "disk"]


def test_a_rename_lasts_before_what_it_replaced_is_deleted(tmp_path: Path, monkeypatch):
    """Another save may have died between its rename and its sync of the directory."""
    steps = []
    (tmp_path / NAME).write_bytes(b"old")
    monkeypatch.setattr(files, "sync_directory", lambda directory: steps.append(directory.name))
    monkeypatch.setattr(Path, "unlink", lambda path, **_: steps.append(path.name))
    run(Place(str(tmp_path)), lambda store: store.delete([NAME]))
    assert steps == [tmp_path.name, NAME]


def test_without_sync(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail)

    async def main():
        async with LocalStore(tmp_path / "a" / "b", sync_files=False) as store:
            await put(store, NAME, b"data")
            await store.commit(".metadata", b"{}")
            assert await sizes(store) == {NAME: 4, ".metadata": 2}

    asyncio.run(main())


@pytest.mark.parametrize("delay", [0, 0.0002, 0.001, 0.003])
def test_cancelled_at_any_time(tmp_path: Path, delay: float):
    """No thread goes on to create, write or keep open a file once the put has ended."""

    async def chunks() -> AsyncIterator[Batch]:
        while True:
            yield b"x" * 200_000

    async def use(store: Store):
        for n in range(10):
            task = asyncio.create_task(store.put(f"{n}.zst", chunks()))
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await sizes(store) == {}

    run(Place(str(tmp_path)), use)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("direct", ["taken", "refused at once", "refused later"])
@pytest.mark.parametrize("size", [0, 1, 4096, (1 << 20) - 1, 1 << 20, (3 << 20) + 5])
@pytest.mark.parametrize("batch", [70_001, 1 << 19])
def test_bytes_past_the_page_cache(place: Place, monkeypatch, direct: str, size: int, batch: int):
    """The file is the same whether a file system takes O_DIRECT, refuses it, or takes it and no write of our pages."""
    real_write, real_fcntl = os.write, fcntl.fcntl
    data = bytes(range(251)) * (size // 251 + 1)
    pages = memoryview(mmap(-1, len(data)))
    pages[:] = data
    batches = [pages[start : min(start + batch, size)] for start in range(0, size, batch)]

    def is_direct(descriptor: int) -> bool:
        return bool(real_fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)

    def write(descriptor: int, view: memoryview) -> int:
        if direct == "refused later" and is_direct(descriptor):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, view[: max(1, len(view) // 2)] if is_direct(descriptor) else view)

    def control(descriptor: int, command: int, flags: int = 0) -> int:
        if direct == "refused at once" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_fcntl(descriptor, command, flags)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(fcntl, "fcntl", control)
    assert run(place, lambda store: store.put(NAME, batches_of(*batches))) == size
    assert run(place, lambda store: store.get(NAME)) == data[:size]


def test_short_reads_are_continued(tmp_path: Path, monkeypatch):
    real_pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, count, at: real_pread(descriptor, min(count, 3), at))
    (tmp_path / NAME).write_bytes(b"0123456789")
    assert run(Place(str(tmp_path)), lambda store: store.get_range(NAME, 1, 9)) == b"12345678"


def test_relative_path(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(Place("here"), lambda store: store.put(NAME, batches_of(b"x")))
    assert (tmp_path / "here" / NAME).read_bytes() == b"x"
    assert LocalStore("here").url == str(tmp_path / "here")
