"""The manifest of a new checkpoint, and how it is encoded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Struct

from dcp_storage.collector import gc_paused
from dcp_storage.config import KIB
from dcp_storage.format.dtypes import ITEM_BYTES
from dcp_storage.format.manifest.boxes import grid_of
from dcp_storage.format.manifest.columns import Columns, text_of
from dcp_storage.format.manifest.frames import MAX_FRAMES, Frame, Head, StoredCodec, list_frame, pack, pack_frame
from dcp_storage.format.manifest.manifest import StoredObject
from dcp_storage.format.manifest.schema import (
    DigestFrame,
    EntryFrame,
    Layout,
    ListedBoxes,
    ObjectFrame,
    PathFrame,
    TensorFrame,
)
from dcp_storage.format.manifest.tables import StatePath
from dcp_storage.geometry import Shape

_FRAME_WEIGHT = 64 * KIB
"""Minimum weight of a frame: enough to compress well, and little enough to decode for one tensor."""


class DraftTensor(NamedTuple):
    """A tensor to be written: its number of boxes, their layout, and the number of byte planes.

    The boxes are in ascending order of their offsets.
    """

    dtype: str
    size: Shape
    planes: int
    boxes: int
    layout: Layout

    @property
    def raw_bytes(self) -> int:
        """Size of all boxes, in memory."""
        numel = prod(self.size)
        if isinstance(self.layout, ListedBoxes):
            numel = sum(prod(box[len(self.size) :]) for box in self.layout.boxes)
        return numel * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A manifest to be written; `Head` describes the other fields.

    Attributes:
        tensors: By name, ascending.
        entries: The raw sizes of the entries that are not tensors, by name, ascending.
        stored: Where everything is stored: the boxes of the first tensor, of the second and so on, then the entries.
    """

    save_id: str
    created: str
    libraries: dict[str, str]
    world_size: int
    codec: StoredCodec
    objects: Sequence[StoredObject]
    tensors: Mapping[str, DraftTensor]
    entries: Mapping[str, int]
    stored: Columns
    planner_data: Mapping[str, StatePath] | None
    rank: int | None = None
    attempt: str | None = None
    digest: str | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def raw_bytes(self) -> int:
        """Size of all boxes and entries, in memory."""
        return sum(tensor.raw_bytes for tensor in self.tensors.values()) + sum(self.entries.values())


@gc_paused
def encode(draft: Draft) -> bytes:
    """Return the manifest as it is stored.

    Raises:
        ConfigError: It is larger than `decode` accepts.
    """
    frames, items = _Frames(draft.digest), _Items(draft.stored)
    names: list[str] = [stored.name for stored in draft.objects]
    frames.add("objects", "", ObjectFrame(names, [stored.size for stored in draft.objects]))
    weights = [_weight(name, tensor) for name, tensor in draft.tensors.items()]
    for group in _groups(list(draft.tensors), weights, max(_FRAME_WEIGHT, sum(weights) // (MAX_FRAMES // 4))):
        held = [draft.tensors[name] for name in group]
        stored = items.next(sum(tensor.boxes for tensor in held))
        frames.add_with_digests("tensors", group[0], _tensor_frame(group, held, stored), stored)
    entries = list(draft.entries)
    for group in _groups(entries, [1] * len(entries), max(_FRAME_WEIGHT, len(entries) // 32)):
        stored = items.next(len(group))
        frame = EntryFrame(group, [draft.entries[name] for name in group], stored.stored())
        frames.add_with_digests("entries", group[0], frame, stored)
    paths = sorted(draft.planner_data or {})
    for group in _groups(paths, [1] * len(paths), max(_FRAME_WEIGHT, len(paths) // 32)):
        assert draft.planner_data is not None
        frames.add("paths", group[0], PathFrame(group, [draft.planner_data[name] for name in group]))
    if draft.planner_data is not None and not paths:
        frames.add("paths", "", PathFrame([], []))
    head = Head(
        save_id=draft.save_id,
        created=draft.created,
        libraries=draft.libraries,
        world_size=draft.world_size,
        rank=draft.rank,
        attempt=draft.attempt,
        codec=draft.codec,
        digest=draft.digest,
        info=draft.info,
        tensors=len(draft.tensors),
        entries=len(entries),
        objects=len(names),
        raw_bytes=draft.raw_bytes,
        stored_bytes=sum(stored.size for stored in draft.objects),
        frames=tuple(frames.listed),
    )
    return pack(head, frames.stored)


class _Frames:
    def __init__(self, digest: str | None) -> None:
        self.listed: list[Frame] = []
        self.stored: list[bytes] = []
        self._digest = digest

    def add(self, kind: str, first: str, columns: Struct) -> None:
        frame = pack_frame(msgspec.json.encode(columns))
        self.stored.append(frame)
        self.listed.append(list_frame(kind, frame, first, self._digest))

    def add_with_digests(self, kind: str, first: str, columns: Struct, stored: Columns) -> None:
        self.add(kind, first, columns)
        if self._digest is not None:
            self.add(f"{kind}_digests", first, DigestFrame(text_of(stored.digests)))


class _Items:
    """Takes items from the front."""

    def __init__(self, stored: Columns) -> None:
        self._stored = stored
        self._taken = 0

    def next(self, count: int) -> Columns:
        self._taken += count
        return self._stored.take(np.arange(self._taken - count, self._taken))


def _weight(name: str, tensor: DraftTensor) -> int:
    """Return roughly how many bytes of a frame a tensor takes."""
    return 64 + len(name) + 32 * tensor.boxes


def _groups(names: Sequence[str], weights: Sequence[int], most: int) -> Iterator[list[str]]:
    group: list[str] = []
    weight = 0
    for name, each in zip(names, weights, strict=True):
        if group and weight + each > most:
            yield group
            group, weight = [], 0
        group.append(name)
        weight += each
    if group:
        yield group


def _tensor_frame(names: list[str], held: Sequence[DraftTensor], stored: Columns) -> TensorFrame:
    return TensorFrame(
        names=names,
        dtypes=[tensor.dtype for tensor in held],
        sizes=[tensor.size for tensor in held],
        planes=[tensor.planes for tensor in held],
        layouts=[tensor.layout for tensor in held],
        stored=stored.stored(),
    )


def layout_of(size: Shape, offsets: Any, sizes: Any) -> Layout:
    """Return the layout of a tensor's boxes, which are given as arrays with a row for each box, ascending."""
    if len(offsets) == 1 and tuple(sizes[0].tolist()) == size and not offsets.any():
        return None
    return grid_of(size, offsets, sizes) or ListedBoxes(np.concatenate((offsets, sizes), axis=1).tolist())
