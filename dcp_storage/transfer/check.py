"""The check pipeline: blocks are fetched, `concurrency` reads at once, and decoded in threads to check them alone."""

from collections.abc import Iterable, Sequence
from functools import partial

from dcp_storage.config import Transfer
from dcp_storage.errors import BlockCorrupt, ObjectNotFound
from dcp_storage.format.blocks import BlockDecoder
from dcp_storage.format.manifest import StoredCodec
from dcp_storage.observe import Advance
from dcp_storage.store.base import Room, Store, room_bytes
from dcp_storage.transfer.memory import Memories
from dcp_storage.transfer.ranges import Block, Fetch, coalesce
from dcp_storage.transfer.workers import CodecThreads, for_each


async def check_blocks(
    store: Store,
    blocks: Iterable[Block],
    object_names: Sequence[str],
    codec: StoredCodec,
    *,
    transfer: Transfer,
    advance: Advance,
) -> list[Block]:
    """Read and decode all blocks, and return those that failed their check in two readings.

    Raises:
        StoreError: A range could not be read, for any reason but that its object is gone: its blocks are returned.
    """
    fetches = coalesce(blocks, 0, min(transfer.object_bytes, store.read_bytes))
    make = partial(_BlockChecker, codec.compression, codec.block_bytes)
    with CodecThreads(transfer.resolve_threads(), make) as threads:
        checker = _Checker(store, object_names, threads, advance)
        await for_each(transfer.concurrency, fetches, checker.check)
    return checker.damaged


class _BlockChecker:
    """Checks blocks for one thread, in memory that it uses again; a check needs no byte planes undone."""

    def __init__(self, compression: str, block_bytes: int) -> None:
        self._decoder = BlockDecoder(compression, block_bytes)
        self._raw = memoryview(bytearray(block_bytes))

    def is_sound(self, block: Block, stored: memoryview) -> bool:
        try:
            self._decoder.decode_into(stored, block.check, 1, self._raw[: block.stop - block.start])
        except BlockCorrupt:
            return False
        return True


class _Checker:
    def __init__(
        self, store: Store, object_names: Sequence[str], threads: CodecThreads[_BlockChecker], advance: Advance
    ) -> None:
        self.damaged: list[Block] = []
        self._store = store
        self._names = object_names
        self._threads = threads
        self._advance = advance
        self._memories = Memories()

    async def check(self, fetch: Fetch) -> None:
        for block in await self._find_damaged(fetch):
            alone = Fetch(block.object, block.offset, block.offset + block.length, [block])
            self.damaged += await self._find_damaged(alone)
        self._advance(sum(b.stop - b.start for b in fetch.blocks), sum(b.length for b in fetch.blocks))

    async def _find_damaged(self, fetch: Fetch) -> list[Block]:
        try:
            with self._memories.hold(room_bytes(fetch.stop - fetch.start)) as pages:
                room = Room(pages)
                data = memoryview(await self._store.get_range(self._names[fetch.object], fetch.start, fetch.stop, room))
                return await self._threads.run(partial(_find_damaged, fetch, data))
        except ObjectNotFound:
            return fetch.blocks


def _find_damaged(fetch: Fetch, data: memoryview, checker: _BlockChecker) -> list[Block]:
    pieces = ((block, block.offset - fetch.start) for block in fetch.blocks)
    return [block for block, at in pieces if not checker.is_sound(block, data[at : at + block.length])]
