"""The load pipeline: byte ranges are fetched, `concurrency` at once, and decoded in threads into their targets."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from dcp_storage.collector import gc_paused
from dcp_storage.config import MIB
from dcp_storage.errors import BlockCorrupt
from dcp_storage.format.codecs.base import BlockDecoder
from dcp_storage.format.codecs.blocks import CODECS
from dcp_storage.format.manifest.frames import StoredCodec
from dcp_storage.format.manifest.schema import Segment
from dcp_storage.format.names import ObjectName
from dcp_storage.observe import Advance
from dcp_storage.store.base import Room, Store, room_bytes
from dcp_storage.transfer.buffers import Buffers
from dcp_storage.transfer.context import Context
from dcp_storage.transfer.layout import target_bytes
from dcp_storage.transfer.ranges import Block, Fetch, coalesce, locate
from dcp_storage.transfer.twice import read_twice
from dcp_storage.transfer.workers import UNIT_BYTES, CodecThreads, for_each, useful_threads

_LEAST_LOCAL_BYTES = MIB
"""Reads from a disk may be smaller than from a network: more reads at once are decoded in more threads."""


_MANY = 200
"""Targets that the garbage collector is paused for: each makes some objects."""


class Target(Protocol):
    """The destination of an item. `open` and `close` are called on the event loop's thread, the others on any."""

    def open(self) -> None:
        """Prepare the memory; called once, before the first byte."""

    def direct(self, start: int, stop: int) -> memoryview | None:
        """Return the final memory of raw bytes `start` to `stop` if it holds them as they are stored, else `None`."""

    def fill(self, start: int, stop: int, decode: Callable[[memoryview], None]) -> None:
        """Let `decode` write raw bytes `start` to `stop`, to their destination or to memory that is copied there."""

    def close(self) -> None:
        """Hand the memory over; called once, after the last byte."""


@dataclass(frozen=True)
class LoadItem:
    """A stored item of which some blocks are read.

    Attributes:
        fqn: The item's name in errors.
        nbytes: Raw size of the whole item in bytes.
        planes: Number of byte planes of its blocks; 1 means none.
        segments: Where it is stored.
        wanted: The numbers of the blocks to read, ascending.
        target: Where they go.
        shared: Whether other processes on this machine read it at about the same time.
    """

    fqn: str
    nbytes: int
    planes: int
    segments: Sequence[Segment]
    wanted: Sequence[int]
    target: Target
    shared: bool = False


async def load_items(
    context: Context, items: Sequence[LoadItem], object_names: Sequence[ObjectName], codec: StoredCodec
) -> None:
    """Fetch, check and decode the wanted blocks of all items, each once.

    Raises:
        BlockCorrupt: A block failed its check, and again when read a second time.
        StoreError: A range could not be read.
    """
    store, transfer = context.store, context.transfer
    blocks = [
        block
        for number, item in enumerate(items)
        for block in locate(number, item.wanted, item.segments, item.nbytes, codec)
    ]
    total = sum(block.length for block in blocks)
    least = None if store.remote else _LEAST_LOCAL_BYTES
    most = target_bytes(total, min(transfer.object_bytes, store.read_bytes), transfer.concurrency, least)
    fetches = coalesce(blocks, transfer.max_gap_bytes, most)
    raw_bytes = sum(block.stop - block.start for block in blocks)
    blocks_codec = CODECS[codec.compression]
    count = useful_threads(transfer, len(items), raw_bytes)
    with (
        context.observed("load", raw_bytes) as advance,
        CodecThreads(count, lambda: nullcontext(blocks_codec.make_decoder(codec.block_bytes))) as threads,
    ):
        loader = _Loader(store, items, object_names, threads, advance, buffers=Buffers(), raw=blocks_codec.verbatim)
        loader.finish_empty()
        await for_each(transfer.concurrency, fetches, loader.load)


class _Failure(NamedTuple):
    """Why a block failed its check, and how many of its bytes were read."""

    block: Block
    read_bytes: int
    error: BlockCorrupt


class _Loader:
    def __init__(
        self,
        store: Store,
        items: Sequence[LoadItem],
        object_names: Sequence[ObjectName],
        threads: CodecThreads[BlockDecoder],
        advance: Advance,
        *,
        buffers: Buffers,
        raw: bool,
    ) -> None:
        self._store = store
        self._items = items
        self._names = object_names
        self._raw = raw
        self._threads = threads
        self._buffers = buffers
        self._advance = advance
        self._waiting = [len(item.wanted) for item in items]  # blocks still to come
        self._opened: set[int] = set()

    def finish_empty(self) -> None:
        """Finish the items of which no bytes are wanted."""
        for item in self._items:
            if not item.wanted:
                item.target.open()
                item.target.close()

    async def load(self, fetch: Fetch) -> None:
        self._open(fetch.blocks)
        for failure in await read_twice(fetch.blocks, self._load):
            raise self._corrupt(failure) from failure.error

    async def _load(self, blocks: Sequence[Block]) -> list[tuple[Block, _Failure]]:
        """Read blocks with one request, deliver those that are sound, and return the others."""
        failed: dict[Block, _Failure] = {}
        start, stop = blocks[0].offset, max(block.offset + block.length for block in blocks)
        with self._buffers.hold(room_bytes(stop - start)) as pages:
            data = await self._fetch(blocks, start, stop, pages)
            for unit in _units(blocks):
                failed |= await self._threads.run(partial(self._decode, unit, data, start))
                self._deliver([block for block in unit if block not in failed] if failed else unit)
        return list(failed.items())

    def _open(self, blocks: Sequence[Block]) -> None:
        numbers = {block.item for block in blocks} - self._opened
        self._opened |= numbers
        open_all = gc_paused(self._open_all) if len(numbers) > _MANY else self._open_all
        open_all(numbers)

    def _open_all(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._items[number].target.open()

    async def _fetch(self, blocks: Sequence[Block], start: int, stop: int, pages: memoryview) -> memoryview:
        room = Room(pages, self._destination(blocks), shared=2 * self._shared_bytes(blocks) > stop - start)
        return memoryview(await self._store.get_range(self._names[blocks[0].object], start, stop, room))

    def _shared_bytes(self, blocks: Sequence[Block]) -> int:
        """Return how much of these blocks other processes read, too."""
        return sum(block.length for block in blocks if self._items[block.item].shared)

    def _destination(self, blocks: Sequence[Block]) -> memoryview | None:
        """Return the final memory of all blocks if it holds their bytes as they are stored, else `None`."""
        first, last = blocks[0], blocks[-1]
        shift = first.offset - first.start
        if not self._raw or any(
            (b.item, b.offset, b.offset + b.length) != (first.item, b.start + shift, b.stop + shift) for b in blocks
        ):
            return None
        return self._items[first.item].target.direct(first.start, last.stop)

    def _decode(
        self, blocks: Sequence[Block], data: memoryview, start: int, decoder: BlockDecoder
    ) -> dict[Block, _Failure]:
        """Decode blocks from a range that begins at `start`, and return those that failed their check."""
        failed = {}
        for block in blocks:
            item, stored = self._items[block.item], data[block.offset - start :][: block.length]
            decode = partial(decoder.decode, stored, block.check, item.planes)
            try:
                item.target.fill(block.start, block.stop, decode)
            except BlockCorrupt as error:
                failed[block] = _Failure(block, len(stored), error)
        return failed

    def _corrupt(self, failure: _Failure) -> BlockCorrupt:
        block, url, name = failure.block, self._store.url, self._names[failure.block.object]
        fqn, missing = self._items[block.item].fqn, block.length - failure.read_bytes
        what = f"the object ends {missing} bytes too early" if missing else str(failure.error)
        return BlockCorrupt(
            f"{url}/{name}: the block of {fqn} at {block.offset} ({block.length} bytes) is damaged, "
            f"in two reads: {what}. Restore this object from a copy, or load another checkpoint",
            url=url,
            object_name=name,
            offset=block.offset,
            fqn=fqn,
        )

    def _deliver(self, unit: Sequence[Block]) -> None:
        """Hand over the items that are now complete."""
        self._advance(sum(b.stop - b.start for b in unit), sum(b.length for b in unit))
        for block in unit:
            self._waiting[block.item] -= 1
            if not self._waiting[block.item]:
                self._items[block.item].target.close()


def _units(blocks: Sequence[Block]) -> list[list[Block]]:
    units: list[list[Block]] = [[]]
    size = 0
    for block in blocks:
        if units[-1] and size + block.length > UNIT_BYTES:
            units.append([])
            size = 0
        units[-1].append(block)
        size += block.length
    return units
