"""One manifest out of those that the ranks of a save without collectives each committed by themselves."""

from collections.abc import Collection, Mapping, Sequence
from itertools import islice

from msgspec.structs import replace

from dcp_storage.errors import ManifestCorrupt
from dcp_storage.format.legacy import StockItem, StockManifest, StockTensor, StorageKey
from dcp_storage.format.manifest import BytesEntry, Chunk, Manifest, Segment, StoredObject, TensorEntry

_MOST_MISSING = 1000
"""Ranks that an error names: a manifest may claim any number of them."""


def is_complete(part: Manifest, ranks: Collection[int]) -> bool:
    """Return whether these are all the ranks of the save that a part is of."""
    return len(ranks) == part.world_size and max(ranks) == part.world_size - 1


def merge(parts: Sequence[Manifest], where: str) -> Manifest:
    """Return the whole checkpoint of which each part is one rank's; `validate` must follow.

    What several ranks stored alike (a replicated chunk, an entry that is no tensor) is read from the lowest of them.

    Raises:
        ManifestCorrupt: A rank's part is missing, or two disagree on a tensor or on the codec.
    """
    parts = sorted(parts, key=lambda part: part.rank or 0)
    first = parts[0]
    _check_complete(parts, where)
    objects: list[StoredObject] = []
    chunks: dict[str, list[Chunk]] = {}
    heads: dict[str, TensorEntry] = {}
    entries: dict[str, BytesEntry] = {}
    planner_data: dict[str, tuple[str | int, ...]] = {}
    for part in parts:
        _check_agrees(first.codec == part.codec, "the codec", part, where)
        for fqn, tensor in part.tensors.items():
            head = heads.setdefault(fqn, tensor)
            same = (head.dtype, len(head.size), head.planes) == (tensor.dtype, len(tensor.size), tensor.planes)
            _check_agrees(same, f"dtype or dimensions of {fqn}", part, where)
            # A bare LocalShardsWrapper knows no further than its own shards; `validate` proves the largest size full.
            heads[fqn] = replace(head, size=tuple(map(max, head.size, tensor.size)))
            known = chunks.setdefault(fqn, [])
            boxes = {chunk.box for chunk in known}
            known.extend(_shift(chunk, len(objects)) for chunk in tensor.chunks if chunk.box not in boxes)
        for fqn, entry in part.bytes.items():
            entries.setdefault(fqn, replace(entry, segments=_shift_segments(entry.segments, len(objects))))
        planner_data = (part.planner_data or {}) | planner_data
        objects.extend(part.objects)
    tensors = {fqn: replace(head, chunks=tuple(chunks[fqn])) for fqn, head in heads.items()}
    return replace(
        first,
        rank=None,
        objects=tuple(objects),
        tensors=tensors,
        bytes=entries,
        planner_data=None if first.planner_data is None else planner_data,
    )


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


def _shift(chunk: Chunk, objects: int) -> Chunk:
    return replace(chunk, segments=_shift_segments(chunk.segments, objects))


def _shift_segments(segments: Sequence[Segment], objects: int) -> tuple[Segment, ...]:
    return tuple(replace(segment, object=segment.object + objects) for segment in segments)
