"""The check pipeline: segments are fetched, `concurrency` at once, and decoded in threads only to check them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import NamedTuple

from dcp_storage.errors import BlockCorrupt, ManifestCorrupt, ObjectNotFound
from dcp_storage.format.codecs.blocks import CODECS
from dcp_storage.format.codecs.digests import MAX_DIGESTED_BYTES, make_digest
from dcp_storage.format.contents import CheckedItem
from dcp_storage.format.manifest.frames import StoredCodec
from dcp_storage.format.names import ObjectName
from dcp_storage.observe import Advance
from dcp_storage.store.base import Room, Store, room_bytes
from dcp_storage.transfer.buffers import Buffers
from dcp_storage.transfer.context import Context
from dcp_storage.transfer.ranges import Block, locate
from dcp_storage.transfer.twice import read_twice
from dcp_storage.transfer.workers import CodecThreads, for_each


class Run(NamedTuple):
    """Blocks that are read together: those of a segment, or of a part of one.

    `digest` is the digest of their raw bytes, or empty; `planes` is the number of their byte planes.
    """

    blocks: Sequence[Block]
    planes: int
    digest: str

    @property
    def object(self) -> int:
        """The number of the object that contains them."""
        return self.blocks[0].object

    @property
    def start(self) -> int:
        """The offset at which the first begins."""
        return self.blocks[0].offset

    @property
    def stop(self) -> int:
        """The offset at which the last ends."""
        return self.blocks[-1].offset + self.blocks[-1].length


class BlockFault(NamedTuple):
    """A damaged block, or a run whose blocks are sound but whose digest differs."""

    run: Run
    block: Block | None


def runs_of(items: Sequence[CheckedItem], codec: StoredCodec, there: Sequence[int]) -> Iterator[Run]:
    """Yield the blocks of items, segment by segment, that are within their objects; `there` has the objects' sizes.

    Raises:
        ManifestCorrupt: A digest covers more than may be held in memory at once.
    """
    for number, item in enumerate(items):
        count = -(-item.raw_bytes // codec.block_bytes)
        blocks = locate(number, range(count), item.segments, item.raw_bytes, codec)
        digests = item.digests or [""] * len(item.segments)
        for segment, digest in zip(item.segments, digests, strict=True):
            whole = list(islice(blocks, len(segment.lengths)))
            held = [block for block in whole if block.offset + block.length <= there[block.object]]
            if digest and held == whole:
                yield Run(_checked_size(item, whole), item.planes, digest)
            else:
                yield from (Run([block], item.planes, "") for block in held)


def _checked_size(item: CheckedItem, blocks: Sequence[Block]) -> Sequence[Block]:
    """Return the blocks of a digest, which are hashed, and held in memory, together."""
    if blocks[-1].stop - blocks[0].start > MAX_DIGESTED_BYTES:
        raise ManifestCorrupt(f"{item.fqn} has a digest of more than {MAX_DIGESTED_BYTES} bytes", fqn=item.fqn)
    return blocks


async def check_runs(
    context: Context, runs: Sequence[Run], object_names: Sequence[ObjectName], codec: StoredCodec, algorithm: str | None
) -> list[BlockFault]:
    """Read and decode all runs, and return what failed its check in two reads.

    Raises:
        StoreError: A range could not be read. If its object does not exist, its blocks are returned instead.
    """
    store, transfer = context.store, context.transfer
    groups = _group(runs, min(transfer.object_bytes, store.read_bytes))
    with (
        context.observed("verify", sum(block.stop - block.start for run in runs for block in run.blocks)) as advance,
        CodecThreads(transfer.resolve_threads(), lambda: nullcontext(_Checks(codec, algorithm))) as threads,
    ):
        checker = _Checker(store, object_names, threads, advance)
        await for_each(transfer.concurrency, groups, checker.check)
    return checker.faults


def _group(runs: Iterable[Run], most: int) -> list[list[Run]]:
    """Join adjacent runs into requests of at most `most` bytes, unless one run is larger."""
    groups: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: (run.object, run.start)):
        last = groups[-1] if groups else None
        beside = last is not None and (last[-1].object, last[-1].stop) == (run.object, run.start)
        if last is not None and beside and run.stop - last[0].start <= most:
            last.append(run)
        else:
            groups.append([run])
    return groups


class _Checks:
    """Checks runs for one thread, in memory that it reuses; byte planes are only undone for digests."""

    def __init__(self, codec: StoredCodec, algorithm: str | None) -> None:
        self._decoder = CODECS[codec.compression].make_decoder(codec.block_bytes)
        self._raw = memoryview(bytearray(codec.block_bytes))
        self._algorithm = algorithm

    def faults(self, run: Run, stored: memoryview) -> list[BlockFault]:
        digest = make_digest(self._algorithm) if self._algorithm and run.digest else None
        faults = []
        for block in run.blocks:
            at, raw = block.offset - run.start, self._raw[: block.stop - block.start]
            try:
                planes = run.planes if digest else 1
                self._decoder.decode(stored[at : at + block.length], block.check, planes, raw)
            except BlockCorrupt:
                faults.append(BlockFault(run, block))
                continue
            if digest:
                digest.update(raw)
        if digest and not faults and digest.hexdigest() != run.digest:
            faults.append(BlockFault(run, None))
        return faults


class _Checker:
    def __init__(
        self, store: Store, object_names: Sequence[ObjectName], threads: CodecThreads[_Checks], advance: Advance
    ) -> None:
        self.faults: list[BlockFault] = []
        self._store = store
        self._names = object_names
        self._threads = threads
        self._advance = advance
        self._buffers = Buffers()

    async def check(self, runs: Sequence[Run]) -> None:
        for faults in await read_twice(runs, self._find):
            self.faults += faults
        blocks = [block for run in runs for block in run.blocks]
        self._advance(sum(b.stop - b.start for b in blocks), sum(b.length for b in blocks))

    async def _find(self, runs: Sequence[Run]) -> list[tuple[Run, list[BlockFault]]]:
        """Read runs with one request, and return those that failed their check."""
        start, stop = runs[0].start, runs[-1].stop
        try:
            with self._buffers.hold(room_bytes(stop - start)) as pages:
                name = self._names[runs[0].object]
                data = memoryview(await self._store.get_range(name, start, stop, Room(pages)))
                return await self._threads.run(partial(_check, runs, data))
        except ObjectNotFound:
            return [(run, [BlockFault(run, block) for block in run.blocks]) for run in runs]


def _check(runs: Sequence[Run], data: memoryview, checks: _Checks) -> list[tuple[Run, list[BlockFault]]]:
    start = runs[0].start
    checked = [(run, checks.faults(run, data[run.start - start : run.stop - start])) for run in runs]
    return [(run, faults) for run, faults in checked if faults]
