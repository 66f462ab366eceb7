"""The manifest of a new checkpoint, and its way to bytes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from dcp_storage.collector import uncollected
from dcp_storage.config import KIB
from dcp_storage.format.columns import Columns
from dcp_storage.format.dtypes import ITEM_BYTES
from dcp_storage.format.frames import MAX_FRAMES, Frame, Head, StoredCodec, list_frame, pack, pack_frame
from dcp_storage.format.manifest import Path, StoredObject
from dcp_storage.format.schema import DigestFrame, EntryFrame, Layout, ListedBoxes, ObjectFrame, PathFrame, TensorFrame
from dcp_storage.geometry import Box, Shape

_FRAME_WEIGHT = 64 * KIB
"""Segments and names of a frame, at least: enough to compress well, and few enough to decode for one tensor."""


class DraftTensor(NamedTuple):
    """A tensor that is to be written: its boxes, ascending in their offsets, their layout, and where they lie."""

    dtype: str
    size: Shape
    planes: int
    boxes: Sequence[Box]
    layout: Layout
    stored: Columns

    @property
    def numel(self) -> int:
        """Elements of all boxes."""
        listed = isinstance(self.layout, ListedBoxes)
        return sum(box.numel for box in self.boxes) if listed else prod(self.size)


class DraftEntry(NamedTuple):
    """An entry that is not a tensor, to be written: its raw size in bytes, and where it lies."""

    size: int
    stored: Columns


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A manifest that is to be written; `Head` says what its fields are."""

    save_id: str
    created: str
    libraries: dict[str, str]
    world_size: int
    codec: StoredCodec
    objects: Sequence[StoredObject]
    tensors: Mapping[str, DraftTensor]
    entries: Mapping[str, DraftEntry]
    planner_data: Mapping[str, Path] | None
    rank: int | None = None
    attempt: str | None = None
    digest: str | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def raw_bytes(self) -> int:
        """Size of all boxes and entries, in memory."""
        tensors = (tensor.numel * ITEM_BYTES[tensor.dtype] for tensor in self.tensors.values())
        return sum(tensors) + sum(entry.size for entry in self.entries.values())


@uncollected
def encode(draft: Draft) -> bytes:
    """Return the manifest as it is stored.

    Raises:
        ConfigError: It is larger than what `decode` accepts.
    """
    frames = _Frames(draft.digest)
    names = [stored.name for stored in draft.objects]
    frames.add("objects", "", ObjectFrame(names, [stored.size for stored in draft.objects]))
    tensors = sorted(draft.tensors)
    most = max(_FRAME_WEIGHT, sum(_weight(name, draft.tensors[name]) for name in tensors) // (MAX_FRAMES // 4))
    for group in _groups(tensors, [_weight(name, draft.tensors[name]) for name in tensors], most):
        frames.add_with_digests("tensors", group, *_tensor_frame(group, draft.tensors))
    entries = sorted(draft.entries)
    for group in _groups(entries, [1] * len(entries), max(_FRAME_WEIGHT, len(entries) // 32)):
        frames.add_with_digests("entries", group, *_entry_frame(group, draft.entries))
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
        tensors=len(tensors),
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

    def add_with_digests(self, kind: str, names: Sequence[str], columns: Struct, stored: Columns) -> None:
        self.add(kind, names[0], columns)
        if self._digest is not None:
            self.add(f"{kind}_digests", names[0], DigestFrame("".join(stored.digests)))


def _weight(name: str, tensor: DraftTensor) -> int:
    """Return about how many bytes of a frame a tensor takes."""
    return 64 + len(name) + 32 * len(tensor.boxes)


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


def _tensor_frame(names: list[str], tensors: Mapping[str, DraftTensor]) -> tuple[TensorFrame, Columns]:
    columns = Columns()
    held = [tensors[name] for name in names]
    for tensor in held:
        columns.extend(tensor.stored)
    frame = TensorFrame(
        names=names,
        dtypes=[tensor.dtype for tensor in held],
        sizes=[tensor.size for tensor in held],
        planes=[tensor.planes for tensor in held],
        layouts=[tensor.layout for tensor in held],
        stored=columns.stored(),
    )
    return frame, columns


def _entry_frame(names: list[str], entries: Mapping[str, DraftEntry]) -> tuple[EntryFrame, Columns]:
    columns = Columns()
    for name in names:
        columns.extend(entries[name].stored)
    frame = EntryFrame(names=names, sizes=[entries[name].size for name in names], stored=columns.stored())
    return frame, columns
