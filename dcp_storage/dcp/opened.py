"""A checkpoint without a template: its contents, slices of its tensors, and states, without a process group."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from dcp_storage.checkpoint.place import Location
from dcp_storage.config import Transfer
from dcp_storage.dcp.indexing import box_of
from dcp_storage.dcp.loads.entries import Trusted, TrustPolicy, load_entry
from dcp_storage.dcp.planners.coverage import StoredTensor, part_note
from dcp_storage.dcp.planners.missing import some
from dcp_storage.dcp.reader import AsyncStorageReader
from dcp_storage.errors import ConfigError, MissingKeys
from dcp_storage.geometry import Box, Shape, whole
from dcp_storage.observe import Observer
from dcp_storage.store.urls import Address
from dcp_storage.words import counted


def open_checkpoint(
    path: Address | Location,
    *,
    storage_options: Mapping[str, Any] | None = None,
    transfer: Transfer = Transfer(),
    allowed_types: Sequence[Callable[..., Any] | tuple[Callable[..., Any], str]] = (),
    trust: TrustPolicy = "listed",
    observer: Observer | None = None,
) -> "Checkpoint":
    """Open a checkpoint, native or stock, for inspection and reading: it needs no model and no process group.

    ```python
    with open_checkpoint("s3://bucket/run/step-100") as checkpoint:
        rows = checkpoint["model.embed.weight"][1000:1064]  # reads only the blocks of these rows
        state = checkpoint.load(keys=["model.*"], rename={"model.": ""})
    ```

    Args:
        path: A directory or a URL, as a string or a path object.
        storage_options: Passed to the fsspec file system unchanged.
        transfer: How bytes move.
        allowed_types: Types that are allowed in non-tensor entries; see `ShardedLoadPlanner`.
        trust: `"all"` loads entries of any type, which may run arbitrary code.
        observer: Called for every transfer.

    Raises:
        CheckpointNotFound: There is no checkpoint at this path.
        ManifestCorrupt: The manifest is damaged.
        UnsupportedFormat: The manifest has a newer format, or is a pickle that names globals no stock checkpoint uses.
        StoreError: It could not be read.
        ConfigError: The path or the options are invalid.
    """
    trusted = Trusted.of(allowed_types, trust)
    reader = AsyncStorageReader(path, storage_options=storage_options, transfer=transfer, observer=observer)
    return Checkpoint(reader, trusted)


@dataclass(frozen=True, eq=False)
class StoredTensorView:
    """A tensor in a checkpoint: nothing is read until it is indexed.

    It supports a tensor's basic indexing: integers, slices with positive steps, and `...`. `view[...]` reads all of it.
    Iterating over it reads one row at a time.
    """

    checkpoint: "Checkpoint"
    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        return prod(self.shape) * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"<{self.name}: {self.dtype} of shape {list(self.shape)}>"

    def __len__(self) -> int:
        """Return the number of rows.

        Raises:
            TypeError: It has no dimensions.
        """
        if not self.shape:
            raise TypeError(f"{self.name} has no dimensions, and so no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        rows = range(len(self))
        return (self[row] for row in rows)

    def __getitem__(self, index: Any) -> Tensor:
        """Read a part; see `Checkpoint.load` for other errors.

        Raises:
            IndexError: An integer is out of range, there are too many indices, or one has an unsupported type.
        """
        box, rest = box_of(self.shape, index if isinstance(index, tuple) else (index,))
        part: Tensor = self.checkpoint.read({self.name: box})[self.name]
        return part[rest]


class Checkpoint:
    """The checkpoint at a path, as it was when opened. It keeps no file, connection or thread between calls.

    Attributes:
        url: Its URL, without credentials.
        info: The `info` given when it was saved (`AsyncStorageWriter(info=...)`).
    """

    def __init__(self, reader: AsyncStorageReader, trusted: Trusted) -> None:
        self._reader = reader
        self._metadata: Metadata = reader.read_metadata()
        reader.set_up_storage_reader(self._metadata, False)
        self._trusted = trusted
        self.url = str(reader.checkpoint_id)
        self.info: dict[str, Any] = dict(self._metadata.storage_data.info)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Do nothing: there is nothing to release."""

    def __repr__(self) -> str:
        return f"<checkpoint at {self.url}: {len(self)} entries>"

    def keys(self) -> list[str]:
        """Return the names of all entries, tensors or not, in ascending order."""
        return sorted(self._metadata.state_dict_metadata)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._metadata.state_dict_metadata)

    def __contains__(self, name: object) -> bool:
        return name in self._metadata.state_dict_metadata

    def __getitem__(self, name: str) -> Any:
        """Return a view of a tensor, which reads when indexed, or read and return the value of another entry.

        Raises:
            MissingKeys: There is no entry of this name; the message suggests similar ones.
            ManifestCorrupt: The manifest's data on it is invalid.
            UnsupportedEntry: The entry contains a type that is not allowed.
        """
        entry = self._metadata.state_dict_metadata.get(name)
        if entry is None:
            raise self._missing([name])
        if isinstance(entry, TensorStorageMetadata):
            return StoredTensorView(self, name, tuple(entry.size), entry.properties.dtype)
        return self.load([name])[name]

    def load(self, keys: Sequence[str] | None = None, rename: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return whole tensors, in host memory, and values of other entries.

        Args:
            keys: Names or patterns (`fnmatch`); `None` loads everything.
            rename: Maps name prefixes to new ones; the longest matching prefix wins.

        Raises:
            MissingKeys: A name or pattern matches nothing.
            ManifestCorrupt: The manifest's data on an entry is invalid.
            ConfigError: Two names would become the same.
            BlockCorrupt: A block failed its check twice.
            CoverageError: The checkpoint is one rank's part, and does not contain all of a tensor.
            UnsupportedEntry: An entry contains a type that is not allowed.
            CheckpointReplaced: Another save replaced the checkpoint with one that has a different layout.
            StoreError: It could not be read.
        """
        names = self._match(keys)
        renamed = {name: _rename(name, rename or {}) for name in names}
        if len(set(renamed.values())) < len(renamed):
            twice = next(new for new in renamed.values() if list(renamed.values()).count(new) > 1)
            raise ConfigError(f"{self.url}: rename turns several names into {twice}")
        entries = self._metadata.state_dict_metadata
        wanted = {
            name: whole(tuple(entry.size)) if isinstance(entry := entries[name], TensorStorageMetadata) else None
            for name in names
        }
        return {renamed[name]: value for name, value in self.read(wanted).items()}

    def read(self, boxes: Mapping[str, Box | None]) -> dict[str, Any]:
        """Return a box of each tensor, and the value of each other entry (`None`), all read at once."""
        planner = _Planner(self._metadata, boxes, self._trusted)
        plan = self._reader.prepare_global_plan([self._reader.prepare_local_plan(planner.plan())])[0]
        self._reader.read_data(plan, planner).wait()
        return planner.values

    def _match(self, keys: Sequence[str] | None) -> list[str]:
        names = self.keys()
        if keys is None:
            return names
        if isinstance(keys, str):
            raise ConfigError(f"keys is {keys!r}; pass a list of names or patterns")
        stored = self._metadata.state_dict_metadata
        fits = {key: [key] if key in stored else [name for name in names if fnmatchcase(name, key)] for key in keys}
        if missing := [key for key, found in fits.items() if not found]:
            raise self._missing(missing)
        return list(dict.fromkeys(name for found in fits.values() for name in found))

    def _missing(self, names: Sequence[str]) -> MissingKeys:
        near = {name: get_close_matches(name, self.keys(), 3) for name in names}
        asked = [f"{name} (did you mean {' or '.join(near[name])}?)" if near[name] else name for name in names]
        held = "" if all(near.values()) else f"; it has {counted(len(self), 'entry', 'entries')}: {some(self.keys())}"
        return MissingKeys(f"{self.url} has no {', '.join(asked)}{held}", url=self.url, fqns=tuple(names))


class _Planner(LoadPlanner):
    """Allocates memory for reads, and keeps the values."""

    def __init__(self, metadata: Metadata, boxes: Mapping[str, Box | None], trusted: Trusted) -> None:
        self.values: dict[str, Any] = dict.fromkeys(boxes)
        self._metadata = metadata
        self._boxes = boxes
        self._trusted = trusted

    def plan(self) -> LoadPlan:
        reads: list[ReadItem] = []
        for name, box in self._boxes.items():
            entry = self._metadata.state_dict_metadata[name]
            if isinstance(entry, BytesStorageMetadata) or box is None:
                index, nothing = MetadataIndex(name), torch.Size((0,))
                reads.append(ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing))
            else:
                self.values[name] = torch.empty(box.sizes, dtype=entry.properties.dtype)
                reads += StoredTensor(name, entry, part_note(self._metadata)).reads(box, 0)
        return LoadPlan(reads)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = Box(tuple(read_item.dest_offsets), tuple(read_item.lengths))
        found: Tensor = self.values[read_item.dest_index.fqn][part.slices]
        return found

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: it was filled in place."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        self.values[name] = load_entry(name, value, self._trusted)

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Not called: there is no state dict."""

    def create_local_plan(self) -> LoadPlan:
        return self.plan()

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan


def _rename(name: str, rename: Mapping[str, str]) -> str:
    longest = max((prefix for prefix in rename if name.startswith(prefix)), key=len, default=None)
    return name if longest is None else rename[longest] + name.removeprefix(longest)
