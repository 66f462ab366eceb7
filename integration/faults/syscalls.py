"""The system calls by which Python changes files, with a hook around each that concerns one directory.

They are replaced in `os`, in `open`, and where a module under test keeps a reference of its own. `strace` is asked
elsewhere whether anything escapes this.
"""

import builtins
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import aiofiles.os

from integration.faults.faults import Op

Hook = Callable[[Op], AbstractContextManager[int]]
_KEEPERS = ("dcp_storage.store.local", "aiofiles.threadpool", "aiofiles.os")
_REAL = {name: getattr(os, name) for name in ("open", "fsync", "fdatasync", "mkdir", "unlink", "remove", "rename")}
_REAL |= {name: getattr(os, name) for name in ("replace", "scandir", "write", "writev", "pwrite", "pwritev")}
_OPEN = builtins.open


class Calls:
    """Stand-ins for the functions of `os`, and for `open`.

    Args:
        root: Only what lies in this directory is hooked.
        hook: Stands around every operation.
        sync: Whether an fsync is really made: it changes nothing but for a power cut.
    """

    def __init__(self, root: Path, hook: Hook, *, sync: bool) -> None:
        self._root = os.path.realpath(root)
        self._hook = hook
        self._sync = sync

    def _below(self, path: Any) -> str | None:
        """Return a path, or a descriptor's, relative to the root; `None` where it lies elsewhere."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        full = os.path.abspath(os.fspath(path))
        return os.path.relpath(full, self._root) if full == self._root or full.startswith(self._root + "/") else None

    def _opened(self, op: Op, do: Callable[[], Any]) -> Any:
        """Open something; close it again where the hook fails afterwards."""
        opened = None
        try:
            with self._hook(op):
                opened = do()
        except BaseException:
            if opened is not None:
                os.close(opened) if isinstance(opened, int) else opened.close()
            raise
        return opened

    def file_open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        name = None if isinstance(path, int) else self._below(path)
        if name is None:
            return _OPEN(path, mode, *args, **kwargs)
        if "r" in mode and "+" not in mode:
            return self._opened(Op("open", name), lambda: _OPEN(path, mode, *args, **kwargs))
        assert "b" in mode, "only binary files are expected here"
        raw = self._opened(Op("create", name), lambda: _HookedFile(path, mode.replace("b", ""), self._hook, name))
        if kwargs.get("buffering", args[0] if args else -1) == 0:
            return raw
        return io.BufferedWriter(raw, os.fstat(raw.fileno()).st_blksize)  # as `open` has it

    def open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        name = self._below(path)
        if name is None or flags & os.O_DIRECTORY:
            return _REAL["open"](path, flags, *args, **kwargs)
        op = Op("create" if flags & os.O_CREAT else "open", name)
        return self._opened(op, lambda: _REAL["open"](path, flags, *args, **kwargs))

    def _synced(self, real: str, descriptor: int) -> None:
        name = self._below(descriptor)
        if name is None:
            return _REAL[real](descriptor)
        with self._hook(Op("fsync", name)):
            return _REAL[real](descriptor) if self._sync else None

    def fsync(self, descriptor: Any) -> None:
        self._synced("fsync", descriptor if isinstance(descriptor, int) else descriptor.fileno())

    def fdatasync(self, descriptor: Any) -> None:
        self._synced("fdatasync", descriptor if isinstance(descriptor, int) else descriptor.fileno())

    def _renamed(self, real: str, source: Any, target: Any, **kwargs: Any) -> None:
        name, to = self._below(source), self._below(target)
        if name is None or to is None:
            return _REAL[real](source, target, **kwargs)
        with self._hook(Op("rename", name, target=to)):
            return _REAL[real](source, target, **kwargs)

    def rename(self, source: Any, target: Any, **kwargs: Any) -> None:
        self._renamed("rename", source, target, **kwargs)

    def replace(self, source: Any, target: Any, **kwargs: Any) -> None:
        self._renamed("replace", source, target, **kwargs)

    def _named(self, kind: str, real: str, path: Any, *args: Any, **kwargs: Any) -> Any:
        name = None if kwargs.get("dir_fd") is not None else self._below(path)
        if name is None:
            return _REAL[real](path, *args, **kwargs)
        return self._opened(Op(kind, name), lambda: _REAL[real](path, *args, **kwargs))

    def unlink(self, path: Any, **kwargs: Any) -> None:
        self._named("unlink", "unlink", path, **kwargs)

    remove = unlink

    def mkdir(self, path: Any, *args: Any, **kwargs: Any) -> None:
        self._named("mkdir", "mkdir", path, *args, **kwargs)

    def scandir(self, path: Any = ".") -> Any:
        return self._named("list", "scandir", path)

    def write(self, descriptor: int, data: Any) -> int:
        return self._written(descriptor, data, None)

    def writev(self, descriptor: int, buffers: Any) -> int:
        return self.write(descriptor, b"".join(buffers))

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        return self._written(descriptor, data, offset)

    def pwritev(self, descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        return self.pwrite(descriptor, b"".join(buffers), offset)

    def _written(self, descriptor: int, data: Any, offset: int | None) -> int:
        name, data = self._below(descriptor), bytes(data)

        def write(data: bytes) -> int:
            return _REAL["write"](descriptor, data) if offset is None else _REAL["pwrite"](descriptor, data, offset)

        if name is None:
            return write(data)
        at = os.lseek(descriptor, 0, os.SEEK_CUR) if offset is None else offset
        with self._hook(Op("write", name, offset=at, data=data)) as portion:
            return write(data[:portion])


class _HookedFile(io.FileIO):
    """An open file whose writes are hooked."""

    def __init__(self, path: Any, mode: str, hook: Hook, name: str) -> None:
        self._hook, self._name = hook, name
        super().__init__(path, mode)

    def write(self, data: Any) -> int:
        data = bytes(data)
        with self._hook(Op("write", self._name, offset=self.tell(), data=data)) as portion:
            return super().write(data[:portion])


@contextmanager
def watched(root: Path, hook: Hook, *, sync: bool = False) -> Iterator[None]:
    """Put `hook` around every change, and every reading, of the files below `root`, and around `root`'s own making."""
    calls = Calls(root, hook, sync=sync)
    stand_ins = {real: getattr(calls, name) for name, real in _REAL.items()}
    stand_ins[_OPEN] = calls.file_open
    with ExitStack() as patches:
        for name in _REAL:
            patches.enter_context(mock.patch.object(os, name, getattr(calls, name)))
        for module in (builtins, io):
            patches.enter_context(mock.patch.object(module, "open", calls.file_open))
        for module in filter(None, map(sys.modules.get, _KEEPERS)):
            for name, kept in list(vars(module).items()):
                if _is_key(stand_ins, kept):
                    patches.enter_context(mock.patch.object(module, name, stand_ins[kept]))
                elif _is_key(stand_ins, wrapped := getattr(kept, "__wrapped__", None)):
                    patches.enter_context(mock.patch.object(module, name, aiofiles.os.wrap(stand_ins[wrapped])))
        yield


def _is_key(stand_ins: dict[Any, Any], value: Any) -> bool:
    return callable(value) and isinstance(value, type(_OPEN)) and value in stand_ins
