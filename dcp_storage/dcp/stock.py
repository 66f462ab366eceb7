"""Stock DCP checkpoints, loaded into a plan: each stored item is fetched and decoded once on a rank."""

from collections.abc import Sequence
from functools import partial

import torch
import zstandard
from torch import Tensor
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from dcp_storage.config import Transfer
from dcp_storage.dcp.hand_over import hand_over
from dcp_storage.dcp.stock_items import (
    Item,
    Kind,
    check_item,
    load_tensor,
    make_decompressor,
    undo_transforms,
)
from dcp_storage.dcp.tensors import dtype_from_name, read_box
from dcp_storage.errors import CoverageError
from dcp_storage.format.legacy import StockManifest, StorageKey
from dcp_storage.geometry import contains
from dcp_storage.observe import Advance, Observer, observed
from dcp_storage.store.base import Store
from dcp_storage.transfer.budget import Budget
from dcp_storage.transfer.workers import CodecThreads, for_each

_Job = tuple[Item, list[ReadItem]]


async def load_stock(
    store: Store,
    manifest: StockManifest,
    plan: LoadPlan,
    planner: LoadPlanner,
    *,
    transfer: Transfer,
    observer: Observer,
) -> None:
    """Read every item of a plan. Planner hooks are called on this thread only.

    Bytes in flight are bounded by about `2 * concurrency * object_bytes`, or by twice one item that is larger.

    Raises:
        BlockCorrupt: An item is damaged, or its object is too short.
        CoverageError: The plan reads what is not in the checkpoint, or into a tensor of another shape.
        UnsupportedFormat: An item was written through an extension that is unknown here.
        ObjectNotFound: An object is not there.
    """
    jobs = _jobs(store.url, manifest, plan.items)
    for item, _ in jobs:
        check_item(item)
    raw_bytes = sum(item.raw_bytes for item, _ in jobs)
    with (
        observed(observer, "load", store.url, raw_bytes) as advance,
        CodecThreads(transfer.resolve_threads(), make_decompressor) as threads,
    ):
        loader = _Loader(store, planner, transfer, threads, advance)
        await for_each(transfer.concurrency, {item.stored.object_name for item, _ in jobs}, loader.measure)
        await for_each(transfer.concurrency, jobs, loader.load)


def _jobs(url: str, manifest: StockManifest, reads: Sequence[ReadItem]) -> list[_Job]:
    """Group the reads by stored item, in the order in which these lie in the objects."""
    by_item: dict[StorageKey, list[ReadItem]] = {}
    for read in reads:
        offset = None if read.type == LoadItemType.BYTE_IO else tuple(read.storage_index.offset or ())
        by_item.setdefault((read.storage_index.fqn, offset), []).append(read)
    kinds = _kinds(manifest, {fqn for fqn, offset in by_item if offset is not None})
    jobs = [(_find(url, manifest, key, kinds), reads_of_item) for key, reads_of_item in by_item.items()]
    return sorted(jobs, key=lambda job: (job[0].stored.object_name, job[0].stored.offset))


def _kinds(manifest: StockManifest, fqns: set[str]) -> dict[StorageKey, Kind]:
    kinds: dict[StorageKey, Kind] = {}
    for fqn in fqns & manifest.tensors.keys():
        tensor = manifest.tensors[fqn]
        dtype = dtype_from_name(tensor.dtype)
        for offset, sizes in tensor.chunks:
            earlier = kinds.get((fqn, offset), Kind(dtype, ())).shapes
            kinds[fqn, offset] = Kind(dtype, (*earlier, sizes) if sizes not in earlier else earlier)
    return kinds


def _find(url: str, manifest: StockManifest, key: StorageKey, kinds: dict[StorageKey, Kind]) -> Item:
    fqn, offset = key
    if key not in manifest.storage or (offset is not None and key not in kinds):
        what = "object" if offset is None else f"part of a tensor that begins at {list(offset)},"
        raise CoverageError(f"the checkpoint holds no {what} named {fqn}", fqn=fqn)
    return Item(fqn, url, manifest.storage[key], kinds.get(key))


class _Loader:
    """Fetches one item at a time, of which several are in flight."""

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
        self._transfer = transfer
        self._threads = threads
        self._advance = advance
        self._sizes: dict[str, int] = {}
        self._budget = Budget(transfer.concurrency * transfer.object_bytes)

    async def measure(self, name: str) -> None:
        self._sizes[name] = await self._store.size(name)

    async def load(self, job: _Job) -> None:
        item, reads = job
        async with self._budget.hold(item.stored.length):
            data = await self._fetch(item)
            if item.kind is None:
                raw = await self._threads.run(partial(undo_transforms, item, data))
                for read in reads:
                    hand_over(self._planner, read, raw)
            else:
                await self._fill(item, item.kind, reads, data)
            self._advance(item.raw_bytes, item.stored.length)

    async def _fetch(self, item: Item) -> bytes:
        """Read an item, a large one in several requests; never more than its object holds."""
        stored, most = item.stored, self._transfer.object_bytes
        missing = stored.offset + stored.length - self._sizes[stored.object_name]
        if missing > 0:
            raise item.damaged(f"the object ends {missing} bytes too early")
        pieces: dict[int, bytes | memoryview] = {}

        async def fetch(start: int) -> None:
            stop = min(start + most, stored.offset + stored.length)
            pieces[start] = await self._store.get_range(stored.object_name, start, stop)

        starts = range(stored.offset, stored.offset + stored.length, most)
        await for_each(min(len(starts), self._transfer.concurrency), starts, fetch)
        data = b"".join(pieces[start] for start in starts)  # a single one is not copied
        if len(data) != stored.length:
            raise item.damaged(f"only {len(data)} of its {stored.length} bytes could be read")
        return data

    async def _fill(self, item: Item, kind: Kind, reads: Sequence[ReadItem], data: bytes) -> None:
        targets = [self._resolve(item, kind, read) for read in reads]
        await self._threads.run(partial(_decode_into, item, kind, data, list(zip(reads, targets, strict=True))))
        for read, target in zip(reads, targets, strict=True):
            self._planner.commit_tensor(read, target)

    def _resolve(self, item: Item, kind: Kind, read: ReadItem) -> Tensor:
        box = read_box(read)
        if not any(contains(shape, box) for shape in kind.shapes):
            raise CoverageError(f"{item.fqn}: the plan reads {box} of a part without these elements", fqn=item.fqn)
        target = self._planner.resolve_tensor(read).detach()
        if tuple(target.shape) != box.sizes:
            fqn = read.dest_index.fqn
            raise CoverageError(f"{fqn}: {box} cannot be read into a tensor of shape {list(target.shape)}", fqn=fqn)
        return target


@torch.inference_mode()  # destinations that were made in it take writes in it only
def _decode_into(
    item: Item,
    kind: Kind,
    data: bytes,
    parts: Sequence[tuple[ReadItem, Tensor]],
    decompressor: zstandard.ZstdDecompressor,
) -> None:
    tensor = load_tensor(item, kind, undo_transforms(item, data, decompressor))
    for read, target in parts:
        box = read_box(read)
        if not contains(tuple(tensor.shape), box):
            raise CoverageError(f"{item.fqn}: {box} was not stored, only {list(tensor.shape)}", fqn=item.fqn)
        target.copy_(tensor[box.slices])
