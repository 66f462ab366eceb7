"""Merges the manifests that the ranks of a save without collectives each committed."""

from collections.abc import Collection, Sequence
from itertools import accumulate, islice
from typing import TYPE_CHECKING

import numpy as np

from dcp_storage.errors import ManifestCorrupt
from dcp_storage.format.manifest.columns import join, numbers
from dcp_storage.format.manifest.draft import Draft, DraftTensor, encode, layout_of
from dcp_storage.format.manifest.items import TensorEntry
from dcp_storage.format.manifest.manifest import Manifest, decode

if TYPE_CHECKING:
    from dcp_storage.format.manifest.tables import StatePath
    from dcp_storage.geometry import Box

_MOST_MISSING = 1000
"""The most ranks that an error lists: a manifest may claim any number of them."""


def is_complete(part: Manifest, ranks: Collection[int]) -> bool:
    """Return whether these are all the ranks of the save that a part belongs to."""
    return len(ranks) == part.world_size and max(ranks) == part.world_size - 1


def merge(parts: Sequence[Manifest], where: str) -> Manifest:
    """Merge the ranks' parts into the whole checkpoint.

    An item that several ranks stored (a replicated chunk, an entry that is not a tensor) is read from the lowest one.

    Raises:
        ManifestCorrupt: A rank's part is missing, or two parts disagree on a tensor or on the codec.
    """
    parts = sorted(parts, key=lambda part: part.rank or 0)
    _check_complete(parts, where)
    first = parts[0]
    tensors: dict[str, _Joined] = {}
    entries: dict[str, tuple[int, int]] = {}  # raw size, and item number
    planner_data: dict[str, StatePath] = {}
    item = 0
    for part in parts:
        _check_agrees((first.codec, first.head.digest) == (part.codec, part.head.digest), "the codec", part, where)
        for fqn, tensor in part.tensors.items():
            joined = tensors.setdefault(fqn, _Joined(tensor))
            same = (joined.dtype, len(joined.size), joined.planes) == (tensor.dtype, len(tensor.size), tensor.planes)
            _check_agrees(same, f"dtype or dimensions of {fqn}", part, where)
            item = joined.add(tensor, item)
        for number, (fqn, entry) in enumerate(part.bytes.items(), item):
            entries.setdefault(fqn, (entry.size, number))
        item += len(part.bytes)
        planner_data = part.paths | planner_data
    drafts = {fqn: tensors[fqn].draft() for fqn in sorted(tensors)}
    order = [number for _, items in drafts.values() for number in items]
    objects = [stored for part in parts for stored in part.objects]
    firsts = accumulate((len(part.objects) for part in parts[:-1]), initial=0)
    draft = Draft(
        save_id=first.save_id,
        created=first.created,
        libraries=first.head.libraries,
        world_size=first.world_size,
        attempt=first.attempt,
        codec=first.codec,
        digest=first.head.digest,
        info=first.head.info,
        objects=objects,
        tensors={fqn: tensor for fqn, (tensor, _) in drafts.items()},
        entries={fqn: entries[fqn][0] for fqn in sorted(entries)},
        stored=join([part.stored() for part in parts], firsts).take(
            numbers([*order, *(entries[fqn][1] for fqn in sorted(entries))])
        ),
        planner_data=None if first.planner_data is None else planner_data,
    )
    return decode(encode(draft), where)


class _Joined:
    """A tensor merged from several parts."""

    def __init__(self, tensor: TensorEntry) -> None:
        self.dtype = tensor.dtype
        self.planes = tensor.planes
        self.size = tensor.size
        self._items: dict[Box, int] = {}

    def add(self, tensor: TensorEntry, first: int) -> int:
        """Add a part's boxes, whose items are numbered from `first`, and return the number after the last."""
        # A bare LocalShardsWrapper knows only its own shards; the tiling check proves that the largest size is full.
        self.size = tuple(map(max, self.size, tensor.size))
        for number, box in enumerate(tensor.boxes, first):
            self._items.setdefault(box, number)
        return first + len(tensor.boxes)

    def draft(self) -> tuple[DraftTensor, list[int]]:
        """Return the whole tensor, and the numbers of its items."""
        boxes, dims = sorted(self._items), len(self.size)
        offsets, sizes = (np.array(rows, np.int64).reshape(len(boxes), dims) for rows in zip(*boxes, strict=True))
        layout = layout_of(self.size, offsets, sizes)
        return DraftTensor(self.dtype, self.size, self.planes, len(boxes), layout), [self._items[box] for box in boxes]


def _check_complete(parts: Sequence[Manifest], where: str) -> None:
    sizes = {part.world_size for part in parts}
    committed = {part.rank for part in parts}
    missing = list(islice((rank for rank in range(max(sizes)) if rank not in committed), _MOST_MISSING))
    if len(sizes) > 1:
        raise ManifestCorrupt(
            f"{where} mixes the parts of saves by {sorted(sizes)} ranks: load another checkpoint", url=where
        )
    if missing:
        raise ManifestCorrupt(
            f"{where} was saved without collectives by {max(sizes)} ranks, of which these did not commit: {missing}. "
            "Load another checkpoint, or copy their manifests (__<rank>-<attempt>.metadata) and objects here",
            url=where,
            ranks=missing,
        )


def _check_agrees(agrees: bool, what: str, part: Manifest, where: str) -> None:
    if not agrees:
        raise ManifestCorrupt(f"{where}: the ranks' manifests disagree on {what} (rank {part.rank})", url=where)
