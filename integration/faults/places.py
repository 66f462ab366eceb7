"""Where the saves of `points` go: a directory, or an object store in memory that speaks fsspec's asynchronous API."""

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem

from integration.faults.faults import LOCAL_KINDS, OBJECT_KINDS, Injector, Kind, Op
from integration.faults.syscalls import watched


class Directory:
    """A directory, `run/step-1` of a scratch directory; its content is put back from a copy."""

    name = "local disk"
    kinds: tuple[Kind, ...] = LOCAL_KINDS
    commits = frozenset({"rename"})

    def __init__(self, scratch: Path) -> None:
        self._root = scratch / "root"
        self._copies = scratch / "copies"
        self.url = str(self._root / "run" / "step-1")

    def broken(self, injector: Injector) -> AbstractContextManager[None]:
        return watched(self._root, injector)

    def keep(self, name: str) -> None:
        shutil.copytree(self._root, self._copies / name)

    def restore(self, name: str | None) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        if name is None:
            self._root.mkdir(parents=True)
        else:
            shutil.copytree(self._copies / name, self._root)


class Bucket:
    """Objects in memory; one at a time, for the whole process."""

    name = "object store"
    kinds: tuple[Kind, ...] = OBJECT_KINDS
    commits = frozenset({"put"})
    url = "faults://bucket/run/step-1"

    def __init__(self, scratch: Path) -> None:
        self._copies: dict[str, dict[str, bytes]] = {}
        fsspec.register_implementation("faults", _Objects, clobber=True)

    @contextmanager
    def broken(self, injector: Injector) -> Iterator[None]:
        _Objects.hook = injector
        yield
        _Objects.hook = Injector()

    def keep(self, name: str) -> None:
        self._copies[name] = dict(_Objects.data)

    def restore(self, name: str | None) -> None:
        _Objects.data = {} if name is None else dict(self._copies[name])


class _Objects(AsyncFileSystem):
    """Whole-object puts, as on S3; each method that the store calls is one request."""

    protocol = "faults"
    data: dict[str, bytes] = {}  # noqa: RUF012 - shared by intent: each save opens a file system of its own
    hook: Injector = Injector()

    async def _request(self, kind: str, path: str, do: Any) -> Any:
        await asyncio.sleep(0)
        with type(self).hook(Op(kind, path.rpartition("/")[2])):
            return do()

    async def _pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        await self._request("put", path, lambda: self.data.__setitem__(path, bytes(value)))

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        body: bytes = await self._request("get", path, lambda: self._stored(path))
        return body[start:end]

    async def _info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        body = await self._request("size", path, lambda: self._stored(path))
        return {"name": path, "size": len(body), "type": "file"}

    async def _rm_file(self, path: str, **kwargs: Any) -> None:
        await self._request("delete", path, lambda: self.data.pop(path, None))

    async def _ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[dict[str, Any]]:
        return await self._request("list", path, lambda: self._entries(path))

    def _entries(self, path: str) -> list[dict[str, Any]]:
        objects = [(name, body) for name, body in self.data.items() if name.rpartition("/")[0] == path]
        if not objects:
            raise FileNotFoundError(path)
        return [{"name": name, "size": len(body), "type": "file"} for name, body in objects]

    def _stored(self, path: str) -> bytes:
        if path not in self.data:
            raise FileNotFoundError(path)
        return self.data[path]
