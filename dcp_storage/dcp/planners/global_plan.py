"""Merges the plans of all ranks: the contents of the checkpoint, and which rank writes which chunk."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from dcp_storage.collector import gc_paused
from dcp_storage.dcp.kinds.boxes import chunk_box
from dcp_storage.errors import CoverageError, DtypeMismatch
from dcp_storage.geometry import Box, contains, find_overlap, tiling_fault


@dataclass(slots=True)
class Offer:
    """An item that must be written once, and the ranks that could."""

    item: WriteItem
    box: Box | None = None
    owners: list[int] = field(default_factory=list)
    nbytes: int = 0  # raw size of the chunk; 0 for an entry that is not a tensor, whose size is not known yet


@gc_paused
def make_global_plan(all_plans: Sequence[SavePlan], *, is_all: bool) -> tuple[list[SavePlan], Metadata]:
    """Return what each rank writes, and the metadata of the whole checkpoint.

    Without `is_all` the plans are those of some ranks only, and gaps are allowed: they are checked when the parts are
    merged.

    Raises:
        CoverageError: The shards of a tensor leave a gap, overlap, or extend beyond it.
        DtypeMismatch: Ranks hold a tensor in different dtypes.
    """
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    offers: list[Offer] = []
    for fqn, candidates in _by_name(all_plans).items():
        if _is_tensor(fqn, candidates):
            found = _tensor_offers(fqn, candidates)
            entries[fqn] = _tensor_entry(fqn, candidates, found, is_all=is_all)
            offers.extend(found)
        else:
            entries[fqn] = BytesStorageMetadata()
            offers.append(Offer(candidates.items[0], owners=candidates.ranks))
    return _share_out(offers, all_plans), Metadata(entries, planner_data=_mappings(all_plans))


@dataclass(slots=True)
class _Candidates:
    """All items of one entry, and their ranks, ascending; in two lists, because a pair per item is costly."""

    ranks: list[int] = field(default_factory=list)
    items: list[WriteItem] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[int, WriteItem]]:
        return zip(self.ranks, self.items, strict=True)


def _by_name(plans: Iterable[SavePlan]) -> dict[str, _Candidates]:
    named: defaultdict[str, _Candidates] = defaultdict(_Candidates)
    for rank, plan in enumerate(plans):
        for item in plan.items:
            candidates = named[item.index.fqn]
            candidates.ranks.append(rank)
            candidates.items.append(item)
    return named


def _is_tensor(fqn: str, candidates: _Candidates) -> bool:
    is_tensor = candidates.items[0].type is not WriteItemType.BYTE_IO
    if any((item.type is not WriteItemType.BYTE_IO) != is_tensor for _, item in candidates):
        raise CoverageError(f"{fqn} is a tensor on some ranks and another object on others", fqn=fqn)
    return is_tensor


def _tensor_offers(fqn: str, candidates: _Candidates) -> list[Offer]:
    """Return one offer for each box, in the order of their offsets, numbered to distinguish empty chunks."""
    by_box: dict[Any, Offer] = {}
    for rank, item in candidates:
        data = _data(item)
        key = (tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        if key not in by_box:
            by_box[key] = _offer(fqn, item, data)
        owners = by_box[key].owners
        if not owners or owners[-1] != rank:
            owners.append(rank)
    # An empty box is kept only if nothing else shows that the tensor exists.
    offers = [offer for offer in by_box.values() if offer.nbytes] or list(by_box.values())[:1]
    if len(offers) > 1:
        offers.sort(key=lambda offer: offer.box or ())
        for number, offer in enumerate(offers):
            index = MetadataIndex(fqn, offer.item.index.offset, number)
            offer.item = WriteItem(index, offer.item.type, tensor_data=offer.item.tensor_data)
    return offers


def _offer(fqn: str, item: WriteItem, data: TensorWriteData) -> Offer:
    try:
        box = chunk_box(data.chunk)
    except ValueError as error:
        raise CoverageError(f"{fqn}: a shard's {error}", fqn=fqn) from error
    return Offer(item, box, nbytes=box.numel * data.properties.dtype.itemsize)


def _data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None
    return item.tensor_data


def _tensor_entry(fqn: str, candidates: _Candidates, offers: Sequence[Offer], *, is_all: bool) -> TensorStorageMetadata:
    """Return the checkpoint's metadata of a tensor, after checking that it is whole."""
    size = _size(fqn, candidates)
    _check_one_dtype(fqn, candidates)
    boxes = [offer.box for offer in offers if offer.box is not None]
    fault = tiling_fault(tuple(size), boxes) if is_all else _partial_fault(size, boxes)
    if fault:
        raise CoverageError(f"{fqn}: {fault}. The ranks' shards do not tile this tensor: nothing was written", fqn=fqn)
    data = [_data(offer.item) for offer in offers]
    return TensorStorageMetadata(data[0].properties, size, [part.chunk for part in data])


def _size(fqn: str, candidates: _Candidates) -> torch.Size:
    """Return the largest size that any rank knows: a bare wrapper only knows the extent of its own shards."""
    first = _data(candidates.items[0]).size
    if all(_data(item).size == first for _, item in candidates):
        return torch.Size(first)
    sizes = {tuple(_data(item).size) for _, item in candidates}
    # Empty shards of wrappers may not even know the tensor's dimensions.
    filled = {tuple(data.size) for _, item in candidates if 0 not in (data := _data(item)).chunk.sizes} or sizes
    if len({len(size) for size in filled}) > 1:
        raise CoverageError(f"{fqn} has {sorted({len(size) for size in filled})} dimensions, by rank", fqn=fqn)
    return torch.Size(map(max, zip(*filled, strict=True)))


def _partial_fault(size: Sequence[int], boxes: Sequence[Box]) -> str | None:
    for box in boxes:
        if not contains(tuple(size), box):
            return f"part {box} is outside the tensor, whose shape is {list(size)}"
    overlap = find_overlap(boxes)
    return f"parts {overlap[0]} and {overlap[1]} overlap" if overlap else None


def _check_one_dtype(fqn: str, candidates: _Candidates) -> None:
    first = _data(candidates.items[0]).properties.dtype
    if all(_data(item).properties.dtype is first for _, item in candidates):
        return
    filled = [(rank, data) for rank, item in candidates if 0 not in (data := _data(item)).chunk.sizes]
    by_dtype: dict[torch.dtype, int] = {}
    for rank, data in filled:
        by_dtype.setdefault(data.properties.dtype, rank)
    if len(by_dtype) > 1:
        held = ", ".join(f"{dtype} on rank {rank}" for dtype, rank in by_dtype.items())
        raise DtypeMismatch(f"{fqn} is {held}: a tensor must have one dtype", fqn=fqn)


def _share_out(offers: Iterable[Offer], all_plans: Sequence[SavePlan]) -> list[SavePlan]:
    """Assign each item to one owner: the largest first, to the rank with the least to write so far.

    The planner data of a share is a byte for each of its items: 1 if other ranks hold it too.
    """
    shares: list[list[WriteItem]] = [[] for _ in all_plans]
    shared: list[list[bool]] = [[] for _ in all_plans]
    loads = [0] * len(all_plans)
    # Items that only one rank can write come first: they leave no choice.
    for offer in sorted(offers, key=lambda offer: (len(offer.owners) > 1, -offer.nbytes)):
        # Entries that are not tensors are written by the lowest rank.
        is_free = len(offer.owners) > 1 and offer.box is not None
        rank = min(offer.owners, key=loads.__getitem__) if is_free else offer.owners[0]
        shares[rank].append(offer.item)
        shared[rank].append(len(offer.owners) > 1)
        loads[rank] += offer.nbytes
    return [
        dataclasses.replace(plan, items=share, planner_data=bytes(flags))
        for plan, share, flags in zip(all_plans, shares, shared, strict=True)
    ]


def _mappings(all_plans: Sequence[SavePlan]) -> dict[str, Any] | None:
    known = [plan.planner_data for plan in reversed(all_plans) if plan.planner_data is not None]
    merged: dict[str, Any] = {}
    for mappings in known:
        merged |= mappings
    return merged if known else None
