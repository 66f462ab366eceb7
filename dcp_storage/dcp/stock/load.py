"""Loads stock DCP checkpoints into a plan: each stored item is fetched and decoded once per rank."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import zstandard
from torch import Tensor
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from dcp_storage.config import KIB, MIB, Transfer
from dcp_storage.dcp.dtypes import dtype_from_name
from dcp_storage.dcp.kinds.boxes import read_box
from dcp_storage.dcp.loads.destination import Destination, Destinations
from dcp_storage.dcp.loads.hand_over import hand_over
from dcp_storage.dcp.stock.items import (
    Item,
    StoredKind,
    check_item,
    load_tensor,
    make_decompressor,
    undo_transforms,
)
from dcp_storage.errors import CoverageError
from dcp_storage.format.names import ObjectName
from dcp_storage.format.stock.manifest import StockItem, StockManifest, StorageKey
from dcp_storage.geometry import contains
from dcp_storage.observe import Advance
from dcp_storage.store.base import Store
from dcp_storage.transfer.budget import Budget
from dcp_storage.transfer.context import Context
from dcp_storage.transfer.workers import CodecThreads, for_each

_Job = tuple[Item, list[ReadItem]]

_RUN_BYTES = MIB
_GAP_BYTES = 16 * KIB


async def load_stock(context: Context, manifest: StockManifest, plan: LoadPlan, planner: LoadPlanner) -> None:
    """Read every item of a plan. Planner hooks are called on this thread only.

    Bytes in flight are bounded by about `2 * concurrency * object_bytes`, or by twice one item that is larger.

    Raises:
        BlockCorrupt: An item is damaged, or its object is too short.
        CoverageError: The plan reads something that is not in the checkpoint, or into a tensor of another shape.
        UnsupportedFormat: An item was written through an unsupported extension.
        ObjectNotFound: An object is missing.
    """
    store, transfer = context.store, context.transfer
    jobs = _jobs(store.url, manifest, plan.items)
    for item, _ in jobs:
        check_item(item)
    raw_bytes = sum(item.raw_bytes for item, _ in jobs)
    with (
        context.observed("load", raw_bytes) as advance,
        CodecThreads(transfer.resolve_threads(), lambda: nullcontext(make_decompressor())) as threads,
    ):
        loader = _StockLoader(store, planner, transfer, threads, advance)
        await for_each(transfer.concurrency, {item.stored.object_name for item, _ in jobs}, loader.measure)
        await for_each(transfer.concurrency, _runs(jobs), loader.load)


def _jobs(url: str, manifest: StockManifest, reads: Sequence[ReadItem]) -> list[_Job]:
    """Group the reads by stored item, in the order of the items in the objects."""
    by_item: dict[StorageKey, list[ReadItem]] = {}
    for read in reads:
        offset = None if read.type == LoadItemType.BYTE_IO else tuple(read.storage_index.offset or ())
        by_item.setdefault((read.storage_index.fqn, offset), []).append(read)
    kinds = _kinds(manifest, {fqn for fqn, offset in by_item if offset is not None})
    jobs = [(_find(url, manifest, key, kinds), reads_of_item) for key, reads_of_item in by_item.items()]
    return sorted(jobs, key=lambda job: (job[0].stored.object_name, job[0].stored.offset))


def _runs(jobs: Sequence[_Job]) -> list[list[_Job]]:
    """Group jobs whose small items are adjacent in an object, so that one request reads them all."""
    runs: list[list[_Job]] = []
    start = stop = 0
    for job in jobs:
        stored = job[0].stored
        is_next = runs and stored.object_name == runs[-1][-1][0].stored.object_name and stored.offset >= stop
        if is_next and stored.offset - stop <= _GAP_BYTES and stored.offset + stored.length - start <= _RUN_BYTES:
            runs[-1].append(job)
        else:
            runs.append([job])
            start = stored.offset
        stop = stored.offset + stored.length
    return runs


def _kinds(manifest: StockManifest, fqns: set[str]) -> dict[StorageKey, StoredKind]:
    kinds: dict[StorageKey, StoredKind] = {}
    for fqn in fqns & manifest.tensors.keys():
        tensor = manifest.tensors[fqn]
        dtype = dtype_from_name(tensor.dtype)
        for offset, sizes in tensor.chunks:
            earlier = kinds.get((fqn, offset), StoredKind(dtype, ())).shapes
            kinds[fqn, offset] = StoredKind(dtype, (*earlier, sizes) if sizes not in earlier else earlier)
    return kinds


def _find(url: str, manifest: StockManifest, key: StorageKey, kinds: dict[StorageKey, StoredKind]) -> Item:
    fqn, offset = key
    if key not in manifest.storage or (offset is not None and key not in kinds):
        what = "object" if offset is None else f"part of a tensor that begins at {list(offset)},"
        raise CoverageError(f"the checkpoint has no {what} named {fqn}", fqn=fqn)
    return Item(fqn, url, manifest.storage[key], kinds.get(key))


class _StockLoader:
    """Fetches runs of items, several of them at a time."""

    def __init__(
        self,
        store: Store,
        planner: LoadPlanner,
        transfer: Transfer,
        threads: CodecThreads[zstandard.ZstdDecompressor],
        advance: Advance,
    ) -> None:
        self._store = store
        self._planner = planner
        self._destinations = Destinations(planner)
        self._transfer = transfer
        self._threads = threads
        self._advance = advance
        self._sizes: dict[ObjectName, int] = {}
        self._budget = Budget(transfer.concurrency * transfer.object_bytes)

    async def measure(self, name: ObjectName) -> None:
        self._sizes[name] = await self._store.size(name)

    async def load(self, run: Sequence[_Job]) -> None:
        async with self._budget.hold(sum(item.stored.length for item, _ in run)):
            held = _cut(await self._fetch([item for item, _ in run]), [item.stored for item, _ in run])
            targets = [
                [self._resolve(item, item.kind, read) for read in reads] if item.kind else [] for item, reads in run
            ]
            raws = await self._threads.run(partial(_decode, run, held, targets))
            for (item, reads), raw, filled in zip(run, raws, targets, strict=True):
                if raw is None:
                    for destination in filled:
                        destination.commit()
                else:
                    for read in reads:
                        hand_over(self._planner, read, raw)
                self._advance(item.raw_bytes, item.stored.length)

    async def _fetch(self, items: Sequence[Item]) -> bytes | memoryview:
        """Read from the first item to the last, in several requests if large; never beyond the end of the object."""
        for item in items:
            missing = item.stored.offset + item.stored.length - self._sizes[item.stored.object_name]
            if missing > 0:
                raise item.damaged(f"the object ends {missing} bytes too early")
        name, begin, most = items[0].stored.object_name, items[0].stored.offset, self._transfer.object_bytes
        end = items[-1].stored.offset + items[-1].stored.length
        pieces: dict[int, bytes | memoryview] = {}

        async def fetch(start: int) -> None:
            pieces[start] = await self._store.get_range(name, start, min(start + most, end))

        starts = range(begin, end, most)
        await for_each(min(len(starts), self._transfer.concurrency), starts, fetch)
        data = pieces[begin] if len(pieces) == 1 else b"".join(pieces[start] for start in starts)
        if len(data) != end - begin:
            raise items[0].damaged(f"only {len(data)} of {end - begin} bytes could be read")
        return data

    def _resolve(self, item: Item, kind: StoredKind, read: ReadItem) -> Destination:
        box = read_box(read)
        if not any(contains(shape, box) for shape in kind.shapes):
            raise CoverageError(f"{item.fqn}: the plan reads {box}, which is outside the stored part", fqn=item.fqn)
        return self._destinations.open(read, kind.dtype)


def _cut(data: bytes | memoryview, items: Sequence[StockItem]) -> list[bytes]:
    """Return the bytes of each item; a single one is not copied."""
    if len(items) == 1:
        return [bytes(data)]
    start, whole = items[0].offset, memoryview(data)
    return [bytes(whole[item.offset - start : item.offset - start + item.length]) for item in items]


def _decode(
    run: Sequence[_Job],
    held: Sequence[bytes],
    targets: Sequence[Sequence[Destination]],
    decompressor: zstandard.ZstdDecompressor,
) -> list[bytes | None]:
    """Decode tensors into place, and return the bytes of non-tensor objects."""
    raws: list[bytes | None] = []
    for (item, _), data, filled in zip(run, held, targets, strict=True):
        raw = undo_transforms(item, data, decompressor)
        if item.kind is not None:
            _fill(item, load_tensor(item, item.kind, raw), filled)
        raws.append(raw if item.kind is None else None)
    return raws


@torch.inference_mode()  # tensors created in inference mode can only be written in it
def _fill(item: Item, tensor: Tensor, destinations: Iterable[Destination]) -> None:
    for destination in destinations:
        box = read_box(destination.read)
        if not contains(tuple(tensor.shape), box):
            raise CoverageError(f"{item.fqn}: {box} was not stored, only {list(tensor.shape)}", fqn=item.fqn)
        destination.memory.copy_(tensor[box.slices])
