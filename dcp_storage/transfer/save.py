"""The save pipeline: objects are encoded in threads and put, `concurrency` at once, in bounded memory."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from itertools import chain
from typing import Any, Protocol

import numpy as np

from dcp_storage.collector import gc_paused
from dcp_storage.config import Codec
from dcp_storage.format.codecs.blocks import CODECS, Encoded
from dcp_storage.format.codecs.digests import DIGEST_CHARS
from dcp_storage.format.manifest.columns import NOTHING, Columns, numbers, texts
from dcp_storage.format.names import ObjectName
from dcp_storage.observe import Advance
from dcp_storage.raw import Raw
from dcp_storage.store.base import PAGE_BYTES, Batch
from dcp_storage.transfer.buffers import Buffers
from dcp_storage.transfer.context import Context
from dcp_storage.transfer.encoders import (
    PROCESS_UNIT_BYTES,
    Encoder,
    encoder_in_process,
    encoder_in_thread,
    is_worth_a_process,
)
from dcp_storage.transfer.layout import Piece, lay_out, split_units, target_bytes
from dcp_storage.transfer.workers import UNIT_BYTES, CodecThreads, for_each, useful_threads


class Source(Protocol):
    """An item to save, whose raw bytes are read in slices."""

    @property
    def nbytes(self) -> int:
        """Raw size in bytes."""

    @property
    def planes(self) -> int:
        """Number of byte planes of its blocks; 1 means none."""

    def read(self, start: int, stop: int) -> Raw:
        """Return bytes `start` to `stop` in host memory. Called on codec threads, for several slices at once."""


async def save_items(
    context: Context,
    sources: Sequence[Source],
    name: Callable[[int], ObjectName],
    codec: Codec,
    *,
    groups: Sequence[str] = (),
    in_processes: bool = False,
) -> Columns:
    """Encode and put all items; return where they are stored, the segments of each in the order of their blocks.

    Threads encode, or with `in_processes` separate processes, if there are enough bytes.
    Large items of different `groups` (a name for each item, if given) share no object.
    Objects are named `name(0)`, `name(1)`, ... If one put fails, the others are cancelled and the error is raised;
    objects that were put by then remain, but no manifest names them.
    """
    store, transfer = context.store, context.transfer
    sizes = [source.nbytes for source in sources]
    target = target_bytes(sum(sizes), min(transfer.object_bytes, store.put_bytes), transfer.concurrency)
    objects = list(enumerate(lay_out(sizes, codec.block_bytes, target, groups)))
    stored = _Stored(codec)
    buffers = Buffers()
    in_processes = in_processes and is_worth_a_process(sum(sizes))
    encoder, unit_bytes = (encoder_in_process, PROCESS_UNIT_BYTES) if in_processes else (encoder_in_thread, UNIT_BYTES)
    count = useful_threads(transfer, len(sizes), sum(sizes))
    with context.observed("save", sum(sizes)) as advance, CodecThreads(count, partial(encoder, codec)) as threads:

        async def put(numbered: tuple[int, list[Piece]]) -> None:
            number, pieces = numbered
            writer = _ObjectWriter(sources, codec, threads=threads, buffers=buffers, advance=advance)
            units = split_units(pieces, codec.block_bytes, unit_bytes)
            async with aclosing(writer.batches(units)) as batches:
                await store.put(name(number), batches)
            stored.add(number, writer.pieces, writer.encoded)

        await for_each(transfer.concurrency, objects, put)
    return stored.by_item(len(sources))


class _Stored:
    """Collects the results, object by object."""

    def __init__(self, codec: Codec) -> None:
        self._chars = CODECS[codec.compression].check_chars
        self._digest_chars = DIGEST_CHARS[codec.digest] if codec.digest else 0
        self._pieces: list[Piece] = []
        self._encoded: list[Encoded] = []
        self._objects: list[Any] = []
        self._offsets: list[Any] = []

    def add(self, number: int, pieces: Sequence[Piece], encoded: Sequence[Encoded]) -> None:
        """Record an object, which is its pieces, back to back."""
        sizes = numbers(sum(blocks.lengths) for blocks in encoded)
        self._pieces += pieces
        self._encoded += encoded
        self._objects.append(np.full(len(sizes), number))
        self._offsets.append(np.cumsum(sizes) - sizes)

    @gc_paused
    def by_item(self, items: int) -> Columns:
        """Return where each of this many items is stored, in the order of their bytes."""
        if not self._pieces:
            return NOTHING._replace(segments=np.zeros(items, np.int64))
        segments = Columns(
            segments=np.ones(len(self._pieces), np.int64),
            blocks=numbers(len(blocks.lengths) for blocks in self._encoded),
            objects=np.concatenate(self._objects),
            offsets=np.concatenate(self._offsets),
            lengths=numbers(chain.from_iterable(blocks.lengths for blocks in self._encoded)),
            checks=texts([blocks.checks for blocks in self._encoded], self._chars),
            digests=texts([blocks.digest for blocks in self._encoded], self._digest_chars),
        )
        item, start = (numbers(each) for each in zip(*((p.item, p.start) for p in self._pieces), strict=True))
        return segments.take(np.lexsort((start, item)))._replace(segments=np.bincount(item, minlength=items))


class _ObjectWriter:
    """Encodes the pieces of one object, in order, and keeps the results."""

    def __init__(
        self,
        sources: Sequence[Source],
        codec: Codec,
        *,
        threads: CodecThreads[Encoder],
        buffers: Buffers,
        advance: Advance,
    ) -> None:
        self.pieces: list[Piece] = []
        self.encoded: list[Encoded] = []
        self._sources = sources
        self._block_bytes = codec.block_bytes
        self._limit = CODECS[codec.compression].limit
        self._threads = threads
        self._buffers = buffers
        self._advance = advance

    async def batches(self, units: Sequence[Sequence[Piece]]) -> AsyncGenerator[Batch, None]:
        """Yield the object's bytes in whole pages, and the remainder at the end."""
        with self._buffers.hold(PAGE_BYTES + max(map(self._room, units))) as memory:
            kept = 0
            for unit in units:
                encoded = await self._threads.run(partial(self._encode, unit, memory[kept:]))
                filled = kept + sum(sum(piece.lengths) for piece in encoded)
                kept = filled % PAGE_BYTES
                if filled > kept:
                    yield memory[: filled - kept]
                self._note(unit, encoded)
                memory[:kept] = memory[filled - kept : filled]
            if kept:
                yield memory[:kept]

    def _room(self, unit: Sequence[Piece]) -> int:
        """Return the maximum encoded size of a unit."""
        sizes = [piece.stop - piece.start for piece in unit]
        blocks = sum(-(-size // self._block_bytes) for size in sizes)
        return self._limit(sum(sizes), blocks)

    def _encode(self, unit: Sequence[Piece], out: memoryview, encoder: Encoder) -> list[Encoded]:
        items = []
        for piece in unit:
            source = self._sources[piece.item]
            items.append((source.read(piece.start, piece.stop), source.planes))
        return encoder.encode_items(items, out)

    def _note(self, unit: Sequence[Piece], encoded: Sequence[Encoded]) -> None:
        self.pieces += unit
        self.encoded += encoded
        stored_bytes = sum(sum(blocks.lengths) for blocks in encoded)
        self._advance(sum(piece.stop - piece.start for piece in unit), stored_bytes)
