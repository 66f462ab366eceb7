"""The contents of a checkpoint as DCP's planners see them, created on demand."""

from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from itertools import chain
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from dcp_storage.dcp.dtypes import dtype_from_name
from dcp_storage.dcp.kinds.boxes import chunk_box
from dcp_storage.format.contents import Contents
from dcp_storage.format.manifest.boxes import Boxes, Listed


class StoredTensorMetadata(TensorStorageMetadata):
    """DCP's metadata of a stored tensor, whose chunks are created on demand."""

    def __init__(self, properties: TensorProperties, boxes: Boxes) -> None:
        self.properties = properties
        self.size = torch.Size(boxes.size)
        self.boxes = boxes

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorStorageMetadata):
            return NotImplemented
        return (self.properties, self.size, self.chunks) == (other.properties, other.size, other.chunks)

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def chunks(self) -> list[ChunkStorageMetadata]:  # type: ignore[override]
        """The boxes."""
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in self.boxes]


def boxes_of(entry: TensorStorageMetadata) -> Boxes:
    """Return the boxes of a stored tensor."""
    if isinstance(entry, StoredTensorMetadata):
        return entry.boxes
    return Listed(tuple(entry.size), [chunk_box(chunk) for chunk in entry.chunks])


class StoredEntries(Mapping[str, STORAGE_TYPES]):
    """`Metadata.state_dict_metadata` of a checkpoint: its names, and the metadata of each on demand.

    Raises (on access to an entry):
        ManifestCorrupt: The manifest's data on it, or on the others in its frame, is invalid.
        UnsupportedFormat: This torch lacks its dtype.
    """

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self.others = dict.fromkeys(contents.bytes)
        self._tensors = contents.tensors
        self._made: dict[str, STORAGE_TYPES] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._contents,)

    def __getitem__(self, name: str) -> STORAGE_TYPES:
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = self._make(name)
        return made

    def _make(self, name: str) -> STORAGE_TYPES:
        if name in self.others:
            return BytesStorageMetadata()
        tensor = self._tensors[name]
        return StoredTensorMetadata(_properties(tensor.dtype), tensor.boxes)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or name in self.others

    def __iter__(self) -> Iterator[str]:
        return chain(self.others, self._tensors)

    def __len__(self) -> int:
        return len(self.others) + len(self._tensors)


@cache
def _properties(dtype: str) -> TensorProperties:
    return TensorProperties(dtype=dtype_from_name(dtype))


def entry_names(metadata: Metadata) -> list[str]:
    """Return the names of the stored entries that are not tensors."""
    entries = metadata.state_dict_metadata
    if isinstance(entries, StoredEntries):
        return list(entries.others)
    return [fqn for fqn, entry in entries.items() if isinstance(entry, BytesStorageMetadata)]
