"""Stores on fsspec file systems that only have blocking calls."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from dcp_storage.errors import StoreError
from dcp_storage.testing.place import NAME, Place, put, run
from dcp_storage.testing.suite import StoreSuite


class TestMemoryStore(StoreSuite):
    @pytest.fixture
    def place(self) -> Place:
        return Place(f"memory://{uuid.uuid4().hex}/runs/step-1")


class BlockingFileSystem(LocalFileSystem):
    """Stands for SFTP and its like: directories, renames and no coroutines."""

    protocol = "blocking"
    auto_mkdir = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("blocking://"))


class TestBlockingStore(StoreSuite):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Iterator[Place]:
        fsspec.register_implementation("blocking", BlockingFileSystem, clobber=True)
        return Place(f"blocking://{tmp_path}/runs/step-1")

    def test_failed_write_leaves_no_temporary_file(self, place: Place, tmp_path: Path, monkeypatch):
        def fail(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(BlockingFileSystem, "mv", fail)
        with pytest.raises(OSError, match=rf"cannot write .*/{NAME}.*No space left"):
            run(place, lambda store: put(store, NAME, b"data"))
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    def test_a_rename_that_is_refused_silently_fails_the_commit(self, place: Place, monkeypatch):
        """As SMB and FTP servers do whose rename does not replace."""
        run(place, lambda store: store.commit(".metadata", b"old"))
        monkeypatch.setattr(BlockingFileSystem, "mv", lambda *args, **kwargs: False)
        with pytest.raises(
            StoreError, match=r"cannot commit .*/\.metadata: a rename that reported no error changed nothing"
        ):
            run(place, lambda store: store.commit(".metadata", b"new"))
        assert run(place, lambda store: store.get(".metadata")) == b"old"
