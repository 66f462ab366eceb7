"""Request bodies, gathered in memory that is reused: new memory costs page faults."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO

from numpy import copyto, frombuffer, uint8

from dcp_storage.store.base import Batch


class Bodies:
    """The bodies that one open store has in flight."""

    def __init__(self) -> None:
        self._free: list[BytesIO] = []

    @asynccontextmanager
    async def gather(self, batches: AsyncIterable[Batch]) -> AsyncIterator[BytesIO]:
        """Gather the batches, as they arrive, in one body, and yield it.

        After an error the body is not reused: a request may still be sending it.
        """
        body = self._free.pop() if self._free else BytesIO()
        size = 0
        async for batch in batches:
            size = await asyncio.to_thread(_append, body, size, batch)
        body.truncate(size)
        body.seek(0)
        yield body
        self._free.append(body)


def _append(body: BytesIO, size: int, batch: Batch) -> int:
    """Write a batch after the first `size` bytes, without the GIL, and return the new size."""
    stop = size + len(batch)
    if stop > body.seek(0, 2):
        body.seek(stop - 1)
        body.write(b"\0")
    with body.getbuffer() as memory:
        copyto(frombuffer(memory[size:stop], uint8), frombuffer(batch, uint8))
    return stop
