"""One manifest out of those that the ranks of a save without collectives each committed by themselves."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from msgspec.structs import replace
from xxhash import xxh3_128_hexdigest

from dcp_storage.errors import ManifestCorrupt
from dcp_storage.format.columns import TensorEntry, columns_of, layout_of
from dcp_storage.format.draft import Draft, DraftEntry, DraftTensor, encode
from dcp_storage.format.legacy import StockItem, StockManifest, StockTensor, StorageKey
from dcp_storage.format.manifest import Manifest, Path, StoredObject, decode
from dcp_storage.format.schema import Segment

if TYPE_CHECKING:
    from dcp_storage.geometry import Box

_MOST_MISSING = 1000
"""Ranks that an error names: a manifest may claim any number of them."""


def is_complete(part: Manifest, ranks: Collection[int]) -> bool:
    """Return whether these are all the ranks of the save that a part is of."""
    return len(ranks) == part.world_size and max(ranks) == part.world_size - 1


def merge(parts: Sequence[Manifest], where: str) -> Manifest:
    """Return the whole checkpoint of which each part is one rank's.

    What several ranks stored alike (a replicated chunk, an entry that is no tensor) is read from the lowest of them.

    Raises:
        ManifestCorrupt: A rank's part is missing, or two disagree on a tensor or on the codec.
    """
    parts = sorted(parts, key=lambda part: part.rank or 0)
    _check_complete(parts, where)
    first = parts[0]
    objects: list[StoredObject] = []
    tensors: dict[str, _Joined] = {}
    entries: dict[str, DraftEntry] = {}
    planner_data: dict[str, Path] = {}
    for part in parts:
        _check_agrees(first.codec == part.codec, "the codec", part, where)
        for fqn, tensor in part.tensors.items():
            joined = tensors.setdefault(fqn, _Joined(tensor))
            same = (joined.dtype, len(joined.size), joined.planes) == (tensor.dtype, len(tensor.size), tensor.planes)
            _check_agrees(same, f"dtype or dimensions of {fqn}", part, where)
            joined.add(tensor, len(objects))
        for fqn, entry in part.bytes.items():
            if fqn not in entries:
                entries[fqn] = DraftEntry(entry.size, columns_of([_shift(entry.segments, len(objects))]))
        planner_data = (part.planner_data or {}) | planner_data
        objects += part.objects
    draft = Draft(
        save_id=first.save_id,
        created=first.created,
        libraries=first.head.libraries,
        world_size=first.world_size,
        attempt=first.attempt,
        codec=first.codec,
        info=first.head.info,
        objects=objects,
        tensors={fqn: joined.draft() for fqn, joined in tensors.items()},
        entries=entries,
        planner_data=None if first.planner_data is None else planner_data,
    )
    return decode(encode(draft), where)


class _Joined:
    """A tensor of several parts."""

    def __init__(self, tensor: TensorEntry) -> None:
        self.dtype = tensor.dtype
        self.planes = tensor.planes
        self.size = tensor.size
        self._stored: dict[Box, tuple[Segment, ...]] = {}

    def add(self, tensor: TensorEntry, objects: int) -> None:
        # A bare LocalShardsWrapper knows no further than its own shards; the tiling proves the largest size full.
        self.size = tuple(map(max, self.size, tensor.size))
        for number, box in enumerate(tensor.boxes):
            if box not in self._stored:
                self._stored[box] = _shift(tensor.segments(number), objects)

    def draft(self) -> DraftTensor:
        boxes = sorted(self._stored)
        stored = columns_of(self._stored[box] for box in boxes)
        return DraftTensor(self.dtype, self.size, self.planes, boxes, layout_of(self.size, boxes), stored)


def merge_stock(parts: Mapping[int, StockManifest], where: str) -> StockManifest:
    """Return the whole checkpoint of which each part is one rank's, as DCP's own writers store it without collectives.

    They do not say how many ranks there were, so one that is missing after the last is only found by what a load needs.

    Raises:
        ManifestCorrupt: A rank's part is missing before another's, or two disagree on a tensor.
    """
    missing = sorted(set(range(max(parts))) - parts.keys())
    if missing:
        raise ManifestCorrupt(f"{where} is a save without collectives of which these ranks lack: {missing}", url=where)
    tensors: dict[str, StockTensor] = {}
    storage: dict[StorageKey, StockItem] = {}
    planner_data: dict[str, tuple[str | int, ...]] = {}
    for rank, part in sorted(parts.items()):
        for fqn, tensor in part.tensors.items():
            known = tensors.setdefault(fqn, tensor)
            if (known.dtype, known.size) != (tensor.dtype, tensor.size):
                raise ManifestCorrupt(f"{where}: the ranks' manifests disagree on {fqn} (rank {rank})", url=where)
            tensors[fqn] = replace(known, chunks=tuple(dict.fromkeys((*known.chunks, *tensor.chunks))))
        storage = part.storage | storage
        planner_data = (part.planner_data or {}) | planner_data
    return replace(
        parts[0],
        tensors=tensors,
        bytes=tuple(dict.fromkeys(fqn for _, part in sorted(parts.items()) for fqn in part.bytes)),
        storage=storage,
        planner_data=None if parts[0].planner_data is None else planner_data,
        save_id=None,  # each rank has one of its own
        identity=xxh3_128_hexdigest("".join(part.identity for _, part in sorted(parts.items())).encode()),
    )


def _check_complete(parts: Sequence[Manifest], where: str) -> None:
    sizes = {part.world_size for part in parts}
    committed = {part.rank for part in parts}
    missing = list(islice((rank for rank in range(max(sizes)) if rank not in committed), _MOST_MISSING))
    if len(sizes) > 1:
        raise ManifestCorrupt(
            f"{where} holds the parts of saves by {sorted(sizes)} ranks, mixed: load another checkpoint", url=where
        )
    if missing:
        raise ManifestCorrupt(
            f"{where} is a save without collectives by {max(sizes)} ranks, of which these did not commit: {missing}. "
            "Load another checkpoint, or bring their manifests (__<rank>-<attempt>.metadata) and objects here",
            url=where,
            ranks=missing,
        )


def _check_agrees(agrees: bool, what: str, part: Manifest, where: str) -> None:
    if not agrees:
        raise ManifestCorrupt(f"{where}: the ranks' manifests disagree on {what} (rank {part.rank})", url=where)


def _shift(segments: Iterable[Segment], objects: int) -> tuple[Segment, ...]:
    return tuple(segment._replace(object=segment.object + objects) for segment in segments)
