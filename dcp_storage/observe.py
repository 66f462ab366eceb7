"""What a save or a load tells of itself while it runs. No user interface: `progress.py` is one observer of many."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

Operation = Literal["save", "load", "verify"]

Advance = Callable[[int, int], None]
"""Is told of blocks that are done: their size in memory, before compression, and in the store, in bytes."""

Observer = Callable[[Operation, str, int], AbstractContextManager[Advance]]
"""Is called for each transfer of a rank, with its operation, its URL and the bytes that it will move, in memory.

It returns a context manager, which is entered when the transfer begins and left when it ends, with the error that
failed it. What that yields is called in between. All of it happens on the thread that runs the transfer, and has to
return at once. Several transfers may run at the same time, each with a context manager of its own.

    @contextmanager
    def log(operation, url, raw_bytes):
        began = time.monotonic()
        yield lambda raw_bytes, stored_bytes: None
        print(f"{operation} {url}: {raw_bytes / (time.monotonic() - began):.0f} bytes/s")
"""


@contextmanager
def silent(operation: Operation, url: str, raw_bytes: int) -> Iterator[Advance]:  # noqa: ARG001 - an `Observer`
    """Tell nobody: the observer where none is given."""
    yield lambda raw_bytes, stored_bytes: None  # noqa: ARG005


@contextmanager
def observed(observer: Observer, operation: Operation, url: str, raw_bytes: int) -> Iterator[Advance]:
    """Tell an observer of a transfer. What fails the transfer is raised whatever the observer makes of it."""
    failure: BaseException | None = None
    with observer(operation, url, raw_bytes) as advance:
        try:
            yield advance
        except BaseException as error:
            failure = error
            raise
    if failure:
        raise failure
