"""`ShardedSavePlanner`: every chunk written once, by one of its owners, and the bytes shared out evenly."""

import dataclasses
import io
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from dcp_storage.dcp.chunks import chunk_box, write_items
from dcp_storage.errors import CoverageError, DtypeMismatch
from dcp_storage.geometry import Box, tiling_fault


class ShardedSavePlanner(DefaultSavePlanner):
    """Plans a save of any sharding that PyTorch can express, `LocalShardsWrapper` included, or says why it cannot.

    Chunks that several ranks hold alike (replicas) are written by one of them, chosen so that all ranks write about as
    many bytes; entries that are no tensors by the lowest rank that has them.

    Args:
        flatten_state_dict: Flatten nested dicts and lists into names; `False` stores each top-level value as it is.
        flatten_sharded_tensors: Unwrap `ShardedTensor`s of `ShardedTensor`s, as DCP's default planner does.

    Raises (while planning, on every rank, inside of DCP's `CheckpointException`):
        CoverageError: The shards of a tensor leave a gap, overlap, or reach beyond it; names the tensor and the box.
        DtypeMismatch: Ranks hold a tensor in different dtypes.
    """

    def __init__(self, *, flatten_state_dict: bool = True, flatten_sharded_tensors: bool = True) -> None:
        super().__init__(flatten_state_dict=flatten_state_dict, flatten_sharded_tensors=flatten_sharded_tensors)

    def create_local_plan(self) -> SavePlan:
        """Return what this rank could write: all that it holds."""
        by_name = {fqn: write_items(fqn, value) for fqn, value in self.state_dict.items()}
        self._places = {
            (fqn, _box(item)): n for fqn, held in by_name.items() for n, item in enumerate(held) if _is_chunk(item)
        }
        items = [item for held in by_name.values() for item in held]
        self.plan = SavePlan(items, planner_data=self.mappings if self.flatten_state_dict else None)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return what each rank writes, and what the whole checkpoint will hold."""
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        offers: list[_Offer] = []
        for fqn, candidates in _by_name(all_plans).items():
            found = list(_tensor_offers(fqn, candidates) or _bytes_offers(candidates))
            if found[0].item.tensor_data is not None:
                entries[fqn] = _tensor_entry(fqn, candidates, found)
                found = [offer.numbered(number) for number, offer in enumerate(found)]
            else:
                entries[fqn] = BytesStorageMetadata()
            offers.extend(found)
        self.global_plan = _share_out(offers, all_plans)
        mappings = {name: path for plan in reversed(all_plans) for name, path in (plan.planner_data or {}).items()}
        self.metadata = Metadata(entries, planner_data=mappings if self.flatten_state_dict else None)
        return self.global_plan, self.metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Take the plan that the coordinator made for this rank."""
        self.plan = new_plan
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return the tensor or the bytes of an item."""
        planned = write_item.tensor_data
        if planned is None:
            data = super().resolve_data(write_item)
            _warn_if_unsafe(write_item.index.fqn, data)
            return data
        if not _box(write_item).numel:
            return torch.empty(planned.chunk.sizes, dtype=planned.properties.dtype)
        # Hooks take the hint for the shard's place on this rank, and need it where an empty shard has the same offset.
        place = self._places.get((write_item.index.fqn, _box(write_item)))
        index = dataclasses.replace(write_item.index, index=place)
        return super().resolve_data(dataclasses.replace(write_item, index=index))


class _Offer(NamedTuple):
    """An item that must be written once, and the ranks that could."""

    item: WriteItem
    owners: tuple[int, ...]

    def numbered(self, number: int) -> "_Offer":
        """Return the offer with the chunk's number as the index hint, which tells empty chunks apart."""
        index = dataclasses.replace(self.item.index, index=number)
        return self._replace(item=dataclasses.replace(self.item, index=index))

    @property
    def nbytes(self) -> int:
        """Raw bytes of the chunk itself; 0 for an entry that is no tensor, whose size nobody knows yet."""
        data = self.item.tensor_data
        return chunk_box(data.chunk).numel * data.properties.dtype.itemsize if data else 0


_Candidates = Sequence[tuple[int, WriteItem]]


def _by_name(plans: Iterable[SavePlan]) -> dict[str, list[tuple[int, WriteItem]]]:
    named: defaultdict[str, list[tuple[int, WriteItem]]] = defaultdict(list)
    for rank, plan in enumerate(plans):
        for item in plan.items:
            named[item.index.fqn].append((rank, item))
    return named


def _bytes_offers(candidates: _Candidates) -> Iterator[_Offer]:
    rank, item = min(candidates, key=lambda candidate: candidate[0])
    yield _Offer(item, (rank,))


def _tensor_offers(fqn: str, candidates: _Candidates) -> list[_Offer]:
    """Return one offer for each box, in the order of their offsets; none if the entry is no tensor."""
    kinds = {_is_chunk(item) for _, item in candidates}
    if len(kinds) > 1:
        raise CoverageError(f"{fqn} is a tensor on some ranks and another object on others", fqn=fqn)
    if kinds == {False}:
        return []
    owners: defaultdict[Box, list[tuple[int, WriteItem]]] = defaultdict(list)
    for rank, item in candidates:
        owners[_box(item)].append((rank, item))
    # An empty box is kept only where there is nothing else to say that the tensor exists.
    boxes = [box for box in owners if box.numel] or list(owners)[:1]
    return [_Offer(owners[box][0][1], tuple(sorted({rank for rank, _ in owners[box]}))) for box in sorted(boxes)]


def _is_chunk(item: WriteItem) -> bool:
    return item.type != WriteItemType.BYTE_IO


def _box(item: WriteItem) -> Box:
    assert item.tensor_data is not None
    return chunk_box(item.tensor_data.chunk)


def _tensor_entry(fqn: str, candidates: _Candidates, offers: Sequence[_Offer]) -> TensorStorageMetadata:
    data = [(rank, item.tensor_data) for rank, item in candidates if item.tensor_data]
    filled = [part for _, part in data if chunk_box(part.chunk).numel] or [data[0][1]]
    _check_one_dtype(fqn, [(rank, part.properties.dtype) for rank, part in data if chunk_box(part.chunk).numel])
    if len({len(part.size) for part in filled}) > 1:
        raise CoverageError(f"{fqn} has {sorted({len(part.size) for part in filled})} dimensions, by rank", fqn=fqn)
    size = torch.Size(map(max, zip(*(part.size for part in filled), strict=True)))
    fault = tiling_fault(tuple(size), [_box(offer.item) for offer in offers])
    if fault:
        raise CoverageError(
            f"{fqn}: {fault}. The ranks' shards do not make up this tensor: nothing was written", fqn=fqn
        )
    chunks = [offer.item.tensor_data.chunk for offer in offers if offer.item.tensor_data]
    return TensorStorageMetadata(filled[0].properties, size, chunks)


def _check_one_dtype(fqn: str, dtypes: Sequence[tuple[int, torch.dtype]]) -> None:
    by_dtype = {dtype: rank for rank, dtype in reversed(dtypes)}
    if len(by_dtype) > 1:
        held = ", ".join(f"{dtype} on rank {rank}" for dtype, rank in by_dtype.items())
        raise DtypeMismatch(f"{fqn} is of {held}: a tensor is stored in one dtype", fqn=fqn)


def _share_out(offers: Iterable[_Offer], all_plans: Sequence[SavePlan]) -> list[SavePlan]:
    """Give each item to one owner: the largest first, to whoever has least to write so far."""
    shares: list[list[WriteItem]] = [[] for _ in all_plans]
    loads = [0] * len(all_plans)
    # Those that only one rank can write come first: they leave no choice.
    for offer in sorted(offers, key=lambda offer: (len(offer.owners) > 1, -offer.nbytes)):
        rank = min(offer.owners, key=lambda owner: loads[owner])
        shares[rank].append(offer.item)
        loads[rank] += offer.nbytes
    return [dataclasses.replace(plan, items=share) for plan, share in zip(all_plans, shares, strict=True)]


def _warn_if_unsafe(fqn: str, data: io.BytesIO) -> None:
    data.seek(0)
    types = torch.serialization.get_unsafe_globals_in_checkpoint(data)
    if types:
        warnings.warn(
            f"{fqn} holds {', '.join(types)}: to load it, list these types in ShardedLoadPlanner(allowed_types=...)",
            stacklevel=2,
        )
