"""The threads that encode and decode, and the tasks that keep them busy."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Generic, Self, TypeVar

from dcp_storage.config import KIB, MIB, Transfer

T = TypeVar("T")
C = TypeVar("C")
R = TypeVar("R")


UNIT_BYTES = 8 * MIB
"""Bytes that a thread encodes or decodes before it returns to the event loop."""

_SMALL_BYTES = 32 * KIB
"""Items smaller than this cost more time in Python than in encoding."""


def useful_threads(transfer: Transfer, items: int, nbytes: int) -> int:
    """Return the useful number of threads for this many items and bytes.

    If items are small on average, several threads would only pass the GIL back and forth.
    """
    return 1 if nbytes < items * _SMALL_BYTES else transfer.resolve_threads()


class CodecThreads(Generic[C]):
    """A pool of threads that each open their own coder: zstd contexts crash if they are shared.

    The end of its `with` block ends the threads and closes their coders.
    """

    def __init__(self, threads: int, open_coder: Callable[[], AbstractContextManager[C]]) -> None:
        self._local = threading.local()
        self._open_coder = open_coder
        self._opened: list[ExitStack] = []
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dcp_storage")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        with ExitStack() as closing:
            for coder in self._opened:
                closing.push(coder)

    async def run(self, work: Callable[[C], R]) -> R:
        """Run `work` on a thread, with that thread's coder, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._call, work)

    def _call(self, work: Callable[[C], R]) -> R:
        coder: C | None = getattr(self._local, "coder", None)
        if coder is None:
            stack = ExitStack()
            coder = self._local.coder = stack.enter_context(self._open_coder())
            self._opened.append(stack)
        return work(coder)


async def for_each(concurrency: int, jobs: Iterable[T], do: Callable[[T], Awaitable[None]]) -> None:
    """Do every job, in order, at most `concurrency` at once. The first error cancels the rest and is raised.

    Of several errors, the first to happen is raised: later ones are usually its consequences.
    """
    queue = iter(jobs)

    async def work() -> None:
        for job in queue:
            await do(job)

    error: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        error = errors.exceptions[0]
    try:
        if error is not None:
            raise error  # outside of `except`: the group must not become its context, nor hide its cause
    finally:
        del error  # else a reference cycle with its traceback keeps this frame and its callers' state


def run_async(coroutine: Coroutine[Any, Any, R]) -> R:
    """Run a coroutine in a new event loop, even if this thread is already running one (Jupyter)."""
    if not _runs_a_loop():
        return _run(coroutine)
    with ThreadPoolExecutor(1, thread_name_prefix="dcp_storage_loop") as thread:
        return thread.submit(_run, coroutine).result()


def _runs_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _run(coroutine: Coroutine[Any, Any, R]) -> R:
    with (
        ThreadPoolExecutor(thread_name_prefix="dcp_storage_io") as threads,
        asyncio.Runner(loop_factory=_Loop) as runner,
    ):
        runner.get_loop().set_default_executor(threads)
        return runner.run(coroutine)


class _Loop(asyncio.SelectorEventLoop):
    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 (asyncio's)
        """Leave it to `_run`: asyncio would start a thread that waits for the others."""
