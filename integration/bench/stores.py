"""Where checkpoints go: a directory, an S3 server on the loopback, and the same server far away."""

import contextlib
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path

from s3fs import S3FileSystem

from dcp_storage.config import MIB
from dcp_storage.transfer.buffers import Buffers
from integration.bench.contestants import Place
from integration.bench.proxy import far_proxy
from integration.servers import S3Server, seaweedfs

_READ_BYTES, _READS = 8 * MIB, 6

STORES = ("local", "s3", "far")


class Shelf(ABC):
    """A store that gives out fresh places."""

    name: str

    @abstractmethod
    def new_place(self) -> Place:
        """Return a place where nothing was ever saved."""

    @abstractmethod
    def stored_bytes(self, place: Place) -> int:
        """Return the size of a checkpoint as it is stored."""

    @abstractmethod
    def delete(self, place: Place) -> None:
        """Remove a checkpoint."""


class LocalShelf(Shelf):
    """Directories of one directory."""

    name = "local"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = count()

    def new_place(self) -> Place:
        return Place(str(self._directory / f"checkpoint-{next(self._numbers)}"))

    def stored_bytes(self, place: Place) -> int:
        return sum(path.stat().st_size for path in _files(place))

    def delete(self, place: Place) -> None:
        shutil.rmtree(place.url)

    def warm(self, place: Place) -> None:
        """Have the page cache hold the checkpoint, however it was written."""
        for path in _files(place):
            with path.open("rb", buffering=0) as file:
                while file.read(4 * MIB):
                    pass

    def chill(self, place: Place) -> None:
        """Have the page cache forget the checkpoint; its pages must be on the disk already, or they would stay."""
        for path in _files(place):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read_past_cache(self, place: Place) -> float:
        """Return the seconds that plain reads of all of it take, as many and as large as those of a load."""
        jobs = [(path, start) for path in _files(place) for start in range(0, path.stat().st_size, _READ_BYTES)]
        buffers = Buffers()
        began = time.perf_counter()
        with ThreadPoolExecutor(_READS) as threads:
            list(threads.map(lambda job: _read_past_cache(*job, buffers), jobs))
        return time.perf_counter() - began


def _read_past_cache(path: Path, start: int, buffers: Buffers) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    with buffers.hold(_READ_BYTES) as memory:
        os.preadv(descriptor, [memory], start)
    os.close(descriptor)


class S3Shelf(Shelf):
    """Prefixes of a bucket, reached at `server`, and by what is not measured directly at `near`."""

    def __init__(self, name: str, server: S3Server, near: S3Server) -> None:
        self.name = name
        self._near = near
        self._server = server
        self._fs = S3FileSystem(**near.storage_options, skip_instance_cache=True, use_listings_cache=False)
        # s3torchconnector takes credentials from nowhere else.
        os.environ["AWS_ACCESS_KEY_ID"] = near.storage_options["key"]
        os.environ["AWS_SECRET_ACCESS_KEY"] = near.storage_options["secret"]

    def new_place(self) -> Place:
        return Place(self._near.new_prefix(), self._server.storage_options)

    def stored_bytes(self, place: Place) -> int:
        return int(self._fs.du(place.url))

    def delete(self, place: Place) -> None:
        self._fs.rm(place.url, recursive=True)


@contextlib.contextmanager
def open_shelf(name: str, directory: Path) -> Iterator[Shelf]:
    """Open a store; an S3 server starts empty and is gone with all that it holds when the block ends."""
    with contextlib.ExitStack() as stack:
        if name == "local":
            yield LocalShelf(directory)
            return
        near = stack.enter_context(seaweedfs())
        far = name == "far"
        url = stack.enter_context(far_proxy(near.endpoint_url)) if far else near.endpoint_url
        yield S3Shelf(name, replace(near, endpoint_url=url), near)


def _files(place: Place) -> Iterator[Path]:
    return (path for path in Path(place.url).rglob("*") if path.is_file())
