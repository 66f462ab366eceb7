"""The manifest, `.metadata`, as it is read: frame by frame, as tensors are requested."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from msgspec import Struct

from dcp_storage.collector import gc_paused
from dcp_storage.errors import ManifestCorrupt
from dcp_storage.format.codecs.digests import DIGEST_CHARS, digest_of
from dcp_storage.format.contents import METADATA_VERSION, CheckedItem, HeldObject
from dcp_storage.format.dtypes import ITEM_BYTES
from dcp_storage.format.faults import Blamed, require
from dcp_storage.format.manifest.columns import Columns, join
from dcp_storage.format.manifest.frames import (
    Head,
    StoredCodec,
    split_frames,
    unpack_frame,
    unpack_head,
)
from dcp_storage.format.manifest.items import BytesEntry, Digests, TensorEntry, decode_entries, decode_tensors
from dcp_storage.format.manifest.schema import DigestFrame, EntryFrame, NameColumn, ObjectFrame, PathFrame, TensorFrame
from dcp_storage.format.manifest.tables import LazyPaths, StatePath, Table
from dcp_storage.format.manifest.validate import check_head, check_names, check_objects, check_paths
from dcp_storage.format.names import ObjectName, is_data_object

T = TypeVar("T")
F = TypeVar("F", bound=Struct)


class StoredObject(NamedTuple):
    """A data object: its name below the checkpoint's prefix and its size in bytes."""

    name: ObjectName
    size: int


class Manifest:
    """The contents of a checkpoint.

    Args:
        head: Its head.
        stored_head: The head as it is stored.
        frames: The frames that the head lists.
        where: Where it was read from, for error messages.

    Attributes:
        tensors: Tensors by fully qualified name.
        bytes: Entries that are not tensors, by fully qualified name.

    Raises (on any access):
        ManifestCorrupt: The frame that is read is damaged, or its contents are invalid.
    """

    stock = False

    def __init__(self, head: Head, stored_head: bytes, frames: Sequence[bytes], where: str) -> None:
        self.head = head
        self._stored_head = stored_head
        self._frames = frames
        self._where = where
        self._numbers: dict[str, list[int]] = {}
        for number, frame in enumerate(head.frames):
            self._numbers.setdefault(frame.kind, []).append(number)
        self.tensors: Mapping[str, TensorEntry] = self._table("tensors", self._tensors)
        self.bytes: Mapping[str, BytesEntry] = self._table("entries", self._entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.head == other.head

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.head, self._stored_head, self._frames, self._where)

    def __repr__(self) -> str:
        return f"Manifest({self._where!r}, save_id={self.head.save_id!r})"

    @property
    def save_id(self) -> str:
        """Unique to this save."""
        return self.head.save_id

    @property
    def sha256(self) -> str:
        """The SHA-256 of the head as it is stored; it covers the whole checkpoint if its digests are SHA-256."""
        return digest_of(self._stored_head, "sha256")

    @property
    def identity(self) -> str:
        """Unique to this manifest."""
        return self.head.save_id

    @property
    def created(self) -> str:
        """UTC time of the commit, ISO 8601."""
        return self.head.created

    @property
    def world_size(self) -> int:
        """Number of ranks that took part in the save."""
        return self.head.world_size

    @property
    def version(self) -> str:
        """The version of DCP's naming conventions."""
        return METADATA_VERSION

    @property
    def info(self) -> Mapping[str, Any]:
        """The `info` that the caller of the save gave."""
        return self.head.info

    @property
    def rank(self) -> int | None:
        """The rank whose part this is, or `None`."""
        return self.head.rank

    @property
    def part(self) -> tuple[int, int] | None:
        """The rank whose part this is and the world size, or `None`."""
        return None if self.head.rank is None else (self.head.rank, self.head.world_size)

    @property
    def attempt(self) -> str | None:
        """The id that the parts of one save without collectives share."""
        return self.head.attempt

    @property
    def codec(self) -> StoredCodec:
        """How blocks are encoded."""
        return self.head.codec

    @property
    def digest(self) -> str | None:
        """The algorithm of its digests, if it has any."""
        return self.head.digest

    @property
    def proof(self) -> str | None:
        """`sha256`, if it covers the whole checkpoint."""
        return self.sha256 if self.head.digest == "sha256" else None

    @property
    def object_names(self) -> Sequence[ObjectName]:
        """The names of the data objects, by number."""
        return [stored.name for stored in self.objects]

    @cached_property
    def objects(self) -> tuple[StoredObject, ...]:
        """The data objects, by number."""
        names: list[str] = []
        sizes: list[int] = []
        for number in self._numbers.get("objects", ()):
            frame = self._frame(number, ObjectFrame)
            names += frame.names
            sizes += frame.sizes
        with self._checked():
            checked = check_objects(names, sizes)
            require(len(names) == self.head.objects, f"{len(names)} objects instead of {self.head.objects}")
        return tuple(map(StoredObject, checked, sizes))

    @property
    def planner_data(self) -> Mapping[str, StatePath] | None:
        """The path of each name in the nested state dict, or `None` if the planner did not flatten."""
        return LazyPaths(partial(getattr, self, "paths")) if "paths" in self._numbers else None

    @cached_property
    def paths(self) -> dict[str, StatePath]:
        """The path of each name, if the planner flattened."""
        paths: dict[str, StatePath] = {}
        with self._checked():
            for number in self._numbers.get("paths", ()):
                frame = self._frame(number, PathFrame)
                require(len(frame.names) == len(frame.paths), "its columns of paths have different lengths")
                if frame.names or self.head.frames[number].first:
                    self._check_names(number, frame.names)
                paths.update(zip(frame.names, frame.paths, strict=True))
            check_paths(paths)
        return paths

    def objects_held(self) -> list[HeldObject]:
        """Return the data objects and the entries stored in each."""
        fqns: list[dict[str, None]] = [{} for _ in self.objects]
        for item in self.checked_items():
            for segment in item.segments:
                fqns[segment.object][item.fqn] = None
        return [HeldObject(*stored, True, tuple(names)) for stored, names in zip(self.objects, fqns, strict=True)]

    def checked_items(self) -> Iterator[CheckedItem]:
        """Yield all items: the boxes of tensors, and the other entries."""
        for fqn, tensor in self.tensors.items():
            item_bytes = ITEM_BYTES[tensor.dtype]
            for number, box in enumerate(tensor.boxes):
                segments, digests = tensor.segments(number), tensor.digests(number)
                yield CheckedItem(fqn, box.numel * item_bytes, tensor.planes, segments, digests)
        for fqn, entry in self.bytes.items():
            yield CheckedItem(fqn, entry.size, 1, entry.segments, entry.digests)

    def deletable(self) -> list[ObjectName]:
        """Return the objects whose names have this package's form."""
        return list(filter(is_data_object, self.object_names))

    def stored(self) -> Columns:
        """Return where everything is stored: the boxes of the first tensor, and so on, and then the entries."""
        tensors = (tensor.frame for tensor in self.tensors.values())
        frames = dict.fromkeys(chain(tensors, (entry.frame for entry in self.bytes.values())))
        return join([frame.columns() for frame in frames], [0] * len(frames))

    @cached_property
    def _object_sizes(self) -> Any:
        return np.array([stored.size for stored in self.objects], np.int64)

    def _table(self, kind: str, decode: Callable[[int], dict[str, T]]) -> Table[T]:
        numbers = self._numbers.get(kind, [])
        firsts = [self.head.frames[number].first for number in numbers]
        return Table(firsts, lambda at: decode(numbers[at]), lambda at: self._names(numbers[at]))

    def _names(self, number: int) -> list[str]:
        names = self._frame(number, NameColumn).names
        with self._checked():
            self._check_names(number, names)
        return names

    @gc_paused
    def _tensors(self, number: int) -> dict[str, TensorEntry]:
        frame = self._frame(number, TensorFrame)
        with self._checked():
            self._check_names(number, frame.names)
            digests = self._digests(number)
            return decode_tensors(frame, self.codec, self._object_sizes, digests, partial=self.rank is not None)

    @gc_paused
    def _entries(self, number: int) -> dict[str, BytesEntry]:
        frame = self._frame(number, EntryFrame)
        with self._checked():
            self._check_names(number, frame.names)
            return decode_entries(frame, self.codec, self._object_sizes, self._digests(number))

    def _digests(self, number: int) -> Digests:
        """Return a reader of the digests of a frame's segments, which are in a separate, rarely needed frame."""
        listed = self.head.frames[number]
        digest = self.head.digest
        wanted = (f"{listed.kind}_digests", listed.first)
        found = [other for other, frame in enumerate(self.head.frames) if (frame.kind, frame.first) == wanted]
        decoded: list[str] = []

        def digests(count: int) -> list[str]:
            if digest is not None and not decoded:
                with self._checked():
                    require(bool(found), f"the digests of the frame that begins with {listed.first!r} are missing")
                text, chars = self._frame(found[0], DigestFrame).digests, DIGEST_CHARS[digest]
                with self._checked():
                    right = len(text) == chars * count and not text.strip("0123456789abcdef")
                    require(right, f"wrong number of digests, or they are not hexadecimal, after {listed.first!r}")
                decoded.extend(text[at : at + chars] for at in range(0, len(text), chars))
            return decoded

        return digests

    def _check_names(self, number: int, names: Sequence[str]) -> None:
        listed = self.head.frames
        numbers = self._numbers[listed[number].kind]
        later = [other for other in numbers if other > number]
        check_names(names, listed[number].first, listed[later[0]].first if later else None)

    def _frame(self, number: int, kind: type[F]) -> F:
        text = unpack_frame(self._frames[number], self._where)
        try:
            return msgspec.json.decode(text, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ManifestCorrupt(f"{self._where} does not follow the schema: {error}", url=self._where) from error

    def _checked(self) -> Blamed:
        return Blamed(self._where)

    def check_whole(self) -> None:
        """Decode and check everything.

        Raises:
            ManifestCorrupt: Something in it is invalid.
        """
        self.check_names()
        for table in (self.tensors, self.bytes):
            for name in table:
                table[name]
        self.paths  # noqa: B018 - checks them

    def check_names(self) -> None:
        """Decode and check the names of all tensors and entries.

        Raises:
            ManifestCorrupt: They are invalid.
        """
        tensors, others = len(self.tensors), len(self.bytes)
        with self._checked():
            both = self.bytes.keys() & self.tensors.keys()
            require(not both, f"{next(iter(both), '')} is both a tensor and another entry")
            right = (tensors, others) == (self.head.tensors, self.head.entries)
            require(right, f"it has {tensors} tensors and {others} entries, which does not match its head")


def decode(data: bytes, where: str) -> Manifest:
    """Decode a manifest that was read from `where`; its contents are decoded and checked on demand.

    Raises:
        ManifestCorrupt: It is damaged, or its head is invalid.
        UnsupportedFormat: It has another format version, or requires a feature that this version lacks.
    """
    head, start = unpack_head(data, where)
    with Blamed(where):
        check_head(head)
    return Manifest(head, data[:start], split_frames(head, data, start, where), where)
