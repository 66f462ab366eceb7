"""The manifest of a save: the planner's plan, joined with what the ranks wrote."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import accumulate, chain
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dcp_storage.collector import gc_paused
from dcp_storage.config import Codec
from dcp_storage.dcp.dtypes import dtype_name, planes_of
from dcp_storage.dcp.saves.results import Items, Results
from dcp_storage.errors import ConfigError, CoverageError, UnsupportedTensor
from dcp_storage.format.manifest.columns import Columns, join, numbers
from dcp_storage.format.manifest.draft import Draft, DraftTensor, layout_of
from dcp_storage.format.manifest.frames import StoredCodec
from dcp_storage.format.manifest.manifest import StoredObject
from dcp_storage.format.manifest.schema import ListedBoxes
from dcp_storage.geometry import Box, tiling_fault
from dcp_storage.version import __version__


@gc_paused
def build_draft(
    metadata: Metadata,
    results: Sequence[Results],
    codec: Codec,
    *,
    save_id: str,
    world_size: int,
    rank: int | None,
    attempt: str | None,
    info: Mapping[str, Any],
) -> Draft:
    """Join the planner's plan with what the ranks wrote.

    Raises:
        CoverageError: The two do not match item by item, or a tensor's chunks do not tile it.
        UnsupportedTensor: The planner data is not a flatten mapping.
        ConfigError: Ranks saved with different codecs.
    """
    _check_codecs(results, codec)
    planned = _Planned(metadata)
    table, stored = _join_objects(results)
    order = planned.match(_Written(results, planned.numbers))
    stored = stored.take(order.written)
    sizes = np.concatenate([told.items.nbytes for told in results])[order.written]
    tensors = planned.tensors(order.planned, codec, tiled=rank is None)
    return Draft(
        save_id=save_id,
        created=datetime.now(UTC).isoformat(timespec="microseconds"),
        libraries={"dcp_storage": __version__, "torch": str(torch.__version__)},
        world_size=world_size,
        rank=rank,
        attempt=attempt,
        codec=StoredCodec(codec.compression, codec.block_bytes, codec.level),
        digest=codec.digest,
        info=dict(info),
        objects=table,
        tensors=tensors,
        entries=dict(zip(planned.entry_names, sizes[len(sizes) - len(planned.entry_names) :].tolist(), strict=True)),
        stored=stored,
        planner_data=_planner_data(metadata.planner_data),
    )


def _check_codecs(results: Sequence[Results], codec: Codec) -> None:
    for rank, told in enumerate(results):
        if told.codec != codec:
            raise ConfigError(
                f"rank {rank} saved with {told.codec} and the coordinator with {codec}: use the same codec on all ranks"
            )


def _join_objects(results: Sequence[Results]) -> tuple[list[StoredObject], Columns]:
    """Return all objects and items, in rank order. An object consists of its segments only."""
    names = list(chain.from_iterable(told.objects for told in results))
    firsts = accumulate((len(told.objects) for told in results[:-1]), initial=0)
    stored = join([told.stored for told in results], firsts)
    sizes = np.zeros(len(names), np.int64)
    np.maximum.at(sizes, stored.objects, stored.stops)
    return list(map(StoredObject, names, sizes.tolist())), stored


class _Order(NamedTuple):
    """The order that sorts two lists of items alike, by name, offsets and size."""

    planned: Any
    written: Any


class _Written:
    """The items of all ranks, in rank order."""

    def __init__(self, results: Sequence[Results], numbers_of: Mapping[str, int]) -> None:
        self.names = list(chain.from_iterable(told.names for told in results))
        self.numbers = numbers(numbers_of.get(name, -1) for name in self.names)
        self.items = Items(*map(np.concatenate, zip(*(told.items for told in results), strict=True)))


class _Planned:
    """The items of a plan: the chunks of the tensors, by name, and then the other entries.

    Attributes:
        entry_names: The names of the entries that are not tensors, ascending.
        numbers: The number of each name, tensors first.
    """

    def __init__(self, metadata: Metadata) -> None:
        named = sorted(metadata.state_dict_metadata.items())
        self._tensors = {fqn: entry for fqn, entry in named if isinstance(entry, TensorStorageMetadata)}
        self.entry_names = [fqn for fqn, entry in named if not isinstance(entry, TensorStorageMetadata)]
        self._names = [*self._tensors, *self.entry_names]
        self.numbers = {fqn: number for number, fqn in enumerate(self._names)}
        self._counts = [*(len(entry.chunks) for entry in self._tensors.values()), *[1] * len(self.entry_names)]
        dims = [*(len(entry.size) for entry in self._tensors.values()), *[0] * len(self.entry_names)]
        chunks = [chunk for entry in self._tensors.values() for chunk in entry.chunks]
        offsets = numbers(chain.from_iterable(chunk.offsets for chunk in chunks))
        self._sizes = numbers(chain.from_iterable(chunk.sizes for chunk in chunks))
        self._of_name = np.repeat(np.arange(len(self._names)), self._counts)
        self._items = Items(np.repeat(numbers(dims), self._counts), offsets, self._nbytes(chunks))

    def _nbytes(self, chunks: Sequence[Any]) -> Any:
        itemsizes = (entry.properties.dtype.itemsize for entry in self._tensors.values())
        each = np.repeat(numbers(itemsizes), self._counts[: len(self._tensors)])
        known = each * numbers(prod(chunk.sizes) for chunk in chunks)
        return np.concatenate((known, np.zeros(len(self.entry_names), np.int64)))

    def match(self, written: _Written) -> _Order:
        """Find each item in what was written.

        Raises:
            CoverageError: An item is missing, or was not planned.
        """
        dims = max(self._items.dims.max(initial=0), written.items.dims.max(initial=0))
        # The sizes of entries are only known from what was written.
        told = np.where(written.numbers < len(self._tensors), written.items.nbytes, 0)
        ours = np.column_stack((self._of_name, self._items.table(dims), self._items.nbytes))
        theirs = np.column_stack((written.numbers, written.items.table(dims), told))
        order = _Order(np.lexsort(ours.T[::-1]), np.lexsort(theirs.T[::-1]))
        self._require_equal(ours[order.planned], theirs[order.written], [written.names[n] for n in order.written])
        return order

    def _require_equal(self, ours: Any, theirs: Any, written: Sequence[str]) -> None:
        both = min(len(ours), len(theirs))
        differ = np.flatnonzero((ours[:both] != theirs[:both]).any(axis=1))
        if not len(differ) and len(ours) == len(theirs):
            return
        at = int(differ[0]) if len(differ) else both
        missing, unplanned = (tuple(rows[at].tolist()) if at < len(rows) else None for rows in (ours, theirs))
        if unplanned is not None and (missing is None or unplanned < missing):
            raise CoverageError(f"{written[at]} was written but is not in the plan", fqn=written[at])
        assert missing is not None, "the lists differ there"
        name, *offsets, _ = missing
        fqn, at_offsets = self._names[name], [offset for offset in offsets if offset >= 0]
        part = f" at {at_offsets}" if at_offsets else ""
        raise CoverageError(f"{fqn}{part} is in the plan but no rank wrote it", fqn=fqn)

    def tensors(self, order: Any, codec: Codec, *, tiled: bool) -> dict[str, DraftTensor]:
        """Return the tensors, whose items are in this order.

        Raises:
            CoverageError: Tensors must be `tiled`, and the chunks of one do not tile it.
        """
        tensors, item, start = {}, 0, 0
        for fqn, entry in self._tensors.items():
            size, count = tuple(entry.size), len(entry.chunks)
            stop = start + count * len(size)
            layout = None
            if count > 1 or not _is_all(entry.chunks, size):
                rows = order[item : item + count] - item
                offsets, sizes = (
                    column[start:stop].reshape(count, len(size))[rows] for column in (self._items.offsets, self._sizes)
                )
                layout = layout_of(size, offsets, sizes)
                if tiled and isinstance(layout, ListedBoxes):
                    _check_tiling(fqn, size, offsets, sizes)
            item, start = item + count, stop
            dtype = dtype_name(entry.properties.dtype, fqn)
            tensors[fqn] = DraftTensor(dtype, size, planes_of(dtype, codec), count, layout)
        return tensors


def _is_all(chunks: Sequence[Any], size: tuple[int, ...]) -> bool:
    """Return whether a tensor has a single chunk, which covers it."""
    return len(chunks) == 1 and tuple(chunks[0].sizes) == size and not any(chunks[0].offsets)


def _check_tiling(fqn: str, size: tuple[int, ...], offsets: Any, sizes: Any) -> None:
    boxes = [Box(tuple(a), tuple(b)) for a, b in zip(offsets.tolist(), sizes.tolist(), strict=True)]
    if fault := tiling_fault(size, boxes):
        raise CoverageError(
            f"{fqn}: {fault}. The state dict's sharding does not describe this tensor: nothing was committed", fqn=fqn
        )


def _planner_data(data: Any) -> dict[str, tuple[str | int, ...]] | None:
    if data is None:
        return None
    if isinstance(data, Mapping) and all(isinstance(key, str) and _is_path(path) for key, path in data.items()):
        return {key: tuple(path) for key, path in data.items()}
    raise UnsupportedTensor(
        f"the planner's planner_data is a {type(data).__name__}, not a flatten mapping (name -> path of str and "
        "int); nothing else can be stored without pickle"
    )


def _is_path(path: object) -> bool:
    return isinstance(path, tuple | list) and all(isinstance(step, str | int) for step in path)
