"""Local paths on file systems as people have them: stale ones, shared directories, mounts, what is not a file."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_storage import AsyncStorageReader, AsyncStorageWriter
from dcp_storage.errors import AccessDenied, CheckpointNotFound, ObjectNotFound, StoreError
from dcp_storage.store import files, reads
from dcp_storage.store.base import Store
from dcp_storage.testing.place import NAME, Place, put, run

READS: dict[str, Callable[[Store], Any]] = {
    "get": lambda store: store.get(NAME),
    "get_range": lambda store: store.get_range(NAME, 0, 4),
    "size": lambda store: store.size(NAME),
    "list": lambda store: store.list(),
    "directories": lambda store: store.directories(),
    "probe": lambda store: store.probe(NAME),
}
every_read = pytest.mark.parametrize("read", READS.values(), ids=READS.keys())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "runs" / "step-1"))


def save(path: Path, value: int = 1) -> None:
    dcp.save({"w": torch.full((9,), float(value))}, storage_writer=AsyncStorageWriter(path), no_dist=True)


def load(path: Path) -> float:
    state = {"w": torch.zeros(9)}
    dcp.load(state, storage_reader=AsyncStorageReader(path), no_dist=True)
    return state["w"][0].item()


class TestDirectories:
    def test_one_that_a_stale_stat_calls_none(self, place: Place, monkeypatch):
        """BeeGFS, Lustre and virtiofs say for a while that what another machine made is not a directory."""
        Path(place.url).mkdir(parents=True)
        monkeypatch.setattr(Path, "is_dir", lambda path: False)
        monkeypatch.setattr(Path, "exists", lambda path, **_: False)
        run(place, lambda store: put(store, NAME, b"data"))
        run(place, lambda store: store.commit(".metadata", b"{}"))
        assert run(place, lambda store: store.get(NAME)) == b"data"

    def test_one_is_made_once_a_save(self, place: Place, monkeypatch):
        made = []
        real = files.make_directory
        monkeypatch.setattr(files, "make_directory", lambda directory: (made.append(directory), real(directory)))

        async def use(store: Store):
            for number in range(20):
                await put(store, f"aa-0-{number}.distcp", b"x")

        run(place, use)
        assert made == [Path(place.url), Path(place.url).parent], "the second by the first"

    def test_one_that_others_make_at_the_same_time(self, place: Place, monkeypatch):
        real = os.mkdir

        def first(path, *args, **kwargs):
            real(path, *args, **kwargs)
            real(path, *args, **kwargs)  # FileExistsError

        monkeypatch.setattr(os, "mkdir", first)
        run(place, lambda store: put(store, NAME, b"data"))

    def test_what_is_a_file_is_refused(self, tmp_path: Path):
        (tmp_path / "file").write_text("mine")
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(StoreError, match="Not a directory"):
                run(Place(str(path)), lambda store: put(store, NAME, b"data"))
            with pytest.raises(StoreError, match="this is a file: pass a directory"):
                run(Place(str(path)), lambda store: store.probe(NAME))
        assert (tmp_path / "file").read_text() == "mine"


class TestStaleHandles:
    @pytest.fixture
    def stale(self, monkeypatch) -> list[int]:
        """How many of the next looks at a file are stale; each takes one."""
        left = [0]

        def look(real):
            def looked(path, *args, **kwargs):
                if left[0] and "step-1" in str(path):
                    left[0] -= 1
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
                return real(path, *args, **kwargs)

            return looked

        monkeypatch.setattr(reads, "_PAUSE_SECONDS", 0.001)
        for module, name in ((os, "stat"), (os, "open"), (os, "scandir")):
            monkeypatch.setattr(module, name, look(getattr(module, name)))
        monkeypatch.setattr(Path, "stat", look(Path.stat))
        return left

    @every_read
    def test_a_read_looks_again(self, place: Place, stale: list[int], read):
        run(place, lambda store: put(store, NAME, b"data"))
        expected = run(place, read)
        stale[0] = 2
        assert run(place, read) == expected
        assert stale[0] == 0

    @pytest.mark.parametrize(
        "read", [READS["get"], READS["get_range"], READS["size"]], ids=["get", "get_range", "size"]
    )
    def test_one_that_stays_stale_is_of_an_object_that_is_gone(self, place: Place, stale: list[int], read):
        run(place, lambda store: put(store, NAME, b"data"))
        stale[0] = 10**6
        with pytest.raises(ObjectNotFound, match="stale"):
            run(place, read)

    def test_a_handle_that_goes_stale_in_mid_read(self, place: Place, monkeypatch):
        """Another machine replaced the file: what is read is the old one or the new one, whole."""
        path = Path(place.url) / ".metadata"
        run(place, lambda store: store.commit(".metadata", b"old" * 1000))
        real, left = os.pread, [1]

        def pread(descriptor, count, offset):
            if left and left.pop():
                path.write_bytes(b"new" * 1000)
                raise OSError(errno.ESTALE, "stale")
            return real(descriptor, count, offset)

        monkeypatch.setattr(os, "pread", pread)
        assert run(place, lambda store: store.get_range(".metadata", 0, 3000)) == b"new" * 1000

    def test_a_load_by_real_system_calls(self, tmp_path: Path):
        if not _has_strace():
            pytest.skip("no strace")
        path = tmp_path / "step-1"
        save(path, 3)
        code = f"from tests.test_local_systems import load; assert load({str(path)!r}) == 3; print('loaded')"
        done = subprocess.run(
            [
                *("strace", "-f", "-qq", "-o", "/dev/null", "-P", str(path / ".metadata")),
                *(
                    option
                    for call in ("openat", "pread64", "read")
                    for option in ("-e", f"inject={call}:error=ESTALE:when=1")
                ),
                *(sys.executable, "-c", code),
            ],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert "loaded" in done.stdout, done.stderr[-2000:]


def _has_strace() -> bool:
    try:
        return subprocess.run(["strace", "-qq", "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


class TestWhatIsNoFile:
    @pytest.mark.parametrize("kind", ["pipe", "directory", "device", "socket"])
    @pytest.mark.parametrize("name", [".metadata", NAME])
    def test_it_is_refused_and_not_waited_for(self, place: Place, kind: str, name: str):
        path = Path(place.url) / name
        path.parent.mkdir(parents=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            import socket

            with socket.socket(socket.AF_UNIX) as bound:
                os.chdir(path.parent)
                bound.bind(name)
        for read in (lambda store: store.get(name), lambda store: store.get_range(name, 0, 10)):
            with pytest.raises(StoreError, match="not a regular file"):
                run(place, read)

    def test_a_load_of_a_pipe_ends(self, tmp_path: Path):
        os.mkfifo(tmp_path / ".metadata")
        with pytest.raises(dcp.CheckpointException, match="not a regular file"):
            load(tmp_path)


def test_a_rename_that_is_refused_is_what_the_error_shows(place: Place, monkeypatch):
    def refuse(path, target):
        raise PermissionError(errno.EPERM, "the rename is refused", str(path))

    def unlink(path, missing_ok=False):
        raise OSError(errno.EIO, "the unlink fails")

    run(place, lambda store: store.commit(".metadata", b"old"))
    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(AccessDenied, match="the rename is refused"):
        run(place, lambda store: store.commit(".metadata", b"new"))
    assert run(place, lambda store: store.get(".metadata")) == b"old"


AS_NOBODY = """
import os, sys, tempfile
sys.path.insert(0, {root!r})
from tests.test_local_systems import load, save
from pathlib import Path
from torch.distributed.checkpoint import CheckpointException
path = Path({path!r})
with tempfile.TemporaryDirectory() as warm:  # imports what nobody may not read
    save(Path(warm)), save(Path(warm)), load(Path(warm))
os.setgid(65534), os.setuid(65534)
try:
    {code}
    print("done")
except CheckpointException as error:
    (cause, _), *_ = error.failures.values()
    print(type(cause).__name__, cause)
"""


def as_nobody(path: Path, code: str) -> str:
    """Run code that may do what others may, and return what it says."""
    for outer in path.parents:
        if outer != Path("/") and outer.stat().st_uid == os.geteuid() and not outer.stat().st_mode & 0o001:
            outer.chmod(outer.stat().st_mode | 0o011)
    script = AS_NOBODY.format(root=str(Path(__file__).parents[1]), path=str(path), code=code)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=100, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
class TestRights:
    def test_a_directory_that_may_be_written_but_not_listed(self, tmp_path: Path):
        path = tmp_path / "step-1"
        path.mkdir()
        path.chmod(0o1733)
        assert as_nobody(path, "save(path); save(path, 2); assert load(path) == 2") == "done"
        assert len(list(path.iterdir())) == 2, "the objects of the first save are deleted"

    def test_a_directory_that_may_not_be_written(self, tmp_path: Path):
        path = tmp_path / "step-1"
        path.mkdir()
        path.chmod(0o755)
        assert as_nobody(path, "save(path)").startswith("AccessDenied cannot commit")
        assert as_nobody(path / "below", "save(path)").startswith("AccessDenied cannot commit")

    def test_a_manifest_that_may_not_be_read_is_not_replaced(self, tmp_path: Path):
        path = tmp_path / "step-1"
        save(path)
        path.chmod(0o777)
        (path / ".metadata").chmod(0o600)
        before = sorted(path.iterdir())
        assert as_nobody(path, "save(path, 2)").startswith("AccessDenied")
        assert sorted(path.iterdir()) == before, "told before the data moved"
        assert load(path) == 1

    def test_a_manifest_of_another_owner_in_a_sticky_directory(self, tmp_path: Path):
        path = tmp_path / "step-1"
        save(path)
        path.chmod(0o1777)
        for file in path.iterdir():
            file.chmod(0o666)
        before = sorted(path.iterdir())
        assert "only its owner may replace it" in as_nobody(path, "save(path, 2)")
        assert sorted(path.iterdir()) == before


def test_nothing_there_is_still_nothing_there(tmp_path: Path):
    with pytest.raises(dcp.CheckpointException) as caught:
        load(tmp_path / "nothing")
    (cause, _), *_ = caught.value.failures.values()
    assert isinstance(cause, CheckpointNotFound)
