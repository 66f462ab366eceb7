"""A bound on the bytes in flight."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Budget:
    """Limits the bytes in flight in one event loop; a piece larger than the limit goes alone."""

    def __init__(self, limit: int) -> None:
        self._limit = self._free = limit
        self._freed = asyncio.Condition()

    @asynccontextmanager
    async def hold(self, size: int) -> AsyncIterator[None]:
        """Wait until `size` bytes are free, and hold them until the `with` block ends."""
        size = min(size, self._limit)
        async with self._freed:
            await self._freed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            self._free += size
            async with self._freed:
                self._freed.notify_all()
