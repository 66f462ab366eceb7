"""`ShardedLoadPlanner`: every destination is covered by stored chunks, or an error names the box that is not."""

import io
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from dcp_storage.collector import gc_paused
from dcp_storage.dcp.hooks import hook
from dcp_storage.dcp.kinds.hooked import Wrapper
from dcp_storage.dcp.kinds.of import kind_of
from dcp_storage.dcp.kinds.plain import Plain
from dcp_storage.dcp.loads.entries import Trusted, TrustPolicy, load_entry
from dcp_storage.dcp.planners.coverage import StoredTensor, part_note
from dcp_storage.dcp.planners.faults import naming_checkpoint, raise_all
from dcp_storage.dcp.planners.flatten import put
from dcp_storage.dcp.planners.missing import check_patterns, skip, some, tell_skipped
from dcp_storage.dcp.planners.names import names_of, stored_below_empty_dicts
from dcp_storage.dcp.planners.numbers import DtypePolicy, check_takes_number, fill, memory_for_number, number_like
from dcp_storage.errors import ConfigError, CoverageError, DtypeMismatch
from dcp_storage.geometry import Box

if TYPE_CHECKING:
    from dcp_storage.dcp.kinds.base import Kind


class ShardedLoadPlanner(DefaultLoadPlanner):
    """Plans a load into any sharding, including `LocalShardsWrapper`, and proves it complete before data is read.

    ```python
    planner = ShardedLoadPlanner(allow_missing=("optim.*",))
    dcp.load(state, storage_reader=AsyncStorageReader("s3://bucket/run/step-100"), planner=planner)
    print("not in the checkpoint:", planner.skipped)
    ```

    Args:
        allow_missing: Patterns (`fnmatch`) of names that may be missing from the checkpoint, such as `("optim.*",)`:
            missing entries keep their values, a warning lists them, and so does `skipped_by` afterwards.
        allow_partial_load: The same for every name.
        dtype_policy: What to do if a destination's dtype is not the stored one, or a number has become a one-element
            tensor or such a tensor a number: `"cast"` converts, `"warn"` converts values that only change by rounding,
            and warns once per load, `"error"` raises.
        allowed_types: Types and functions that non-tensor entries may use, in addition to tensors and the types of
            Python's standard library and NumPy that run no code of their own. `(Config, "old.module.Config")` is a
            type that was stored under another name. List only what you trust: its own code runs.
        trust: `"all"` loads entries of any type, which may run arbitrary code: use it only for your own checkpoints.
        flatten_state_dict: Must be as in the save.

    Attributes:
        skipped: Names that the last load skipped because they are not in the checkpoint.
        skipped_by: The same by the pattern that allows it; `"*"` is `allow_partial_load`.
        unexpected: Names in the checkpoint that the last load did not ask for.

    Raises (inside DCP's `CheckpointException`):
        MissingKeys: Entries are not in the checkpoint, and no pattern allows it.
        CoverageError: Shapes differ, or a box of a destination is not stored; names the tensor and the box.
        DtypeMismatch: See `dtype_policy`.
        UnsupportedTensor: A destination's own hooks failed, or its memory on the meta device cannot be allocated.
        UnsupportedEntry: A non-tensor entry contains a type that is not allowed, or cannot be rebuilt.
    """

    def __init__(
        self,
        *,
        allow_partial_load: bool = False,
        allow_missing: Sequence[str] = (),
        dtype_policy: DtypePolicy = "warn",
        allowed_types: Sequence[Callable[..., Any] | tuple[Callable[..., Any], str]] = (),
        trust: TrustPolicy = "listed",
        flatten_state_dict: bool = True,
    ) -> None:
        super().__init__(
            flatten_state_dict=flatten_state_dict,
            flatten_sharded_tensors=False,
            allow_partial_load=allow_partial_load,
        )
        if dtype_policy not in {"cast", "warn", "error"}:
            raise ConfigError(f'dtype_policy is {dtype_policy!r}; choose "cast", "warn" or "error"')
        self._may_miss = check_patterns(allow_missing) + (("*",) if allow_partial_load else ())
        self.skipped: list[str] = []
        self.skipped_by: dict[str, list[str]] = {}
        self.unexpected: list[str] = []
        self._dtype_policy = dtype_policy
        self._trusted = Trusted.of(allowed_types, trust)
        self._shards: dict[tuple[str, int | None], Tensor] = {}
        self._kinds: dict[str, Kind] = {}

    @hook
    @gc_paused
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the state dict to fill; allocate memory for stored tensors that are on the meta device.

        Raises:
            ConfigError: Two paths of the state dict have the same name.
            UnsupportedTensor: Only the code of its type can allocate memory for a tensor on the meta device.
        """
        assert metadata is not None
        self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator
        self._shards.clear()
        self.state_dict, self.mappings = names_of(state_dict, metadata, nested=self.flatten_state_dict)
        stored = metadata.state_dict_metadata
        self.unexpected = [fqn for fqn in stored if fqn not in self.state_dict]
        self.skipped = [fqn for fqn, held in self.state_dict.items() if fqn not in stored and not _is_empty(held)]
        self._kinds = {}
        for fqn, value in self.state_dict.items():
            if isinstance(value, Tensor) and fqn in metadata.state_dict_metadata:
                self._kinds[fqn] = kind_of(fqn, value)
                filled = self._kinds[fqn].materialized()
                if filled is not self._kinds[fqn].value:
                    self._kinds[fqn] = kind_of(fqn, filled)
                    self._put(fqn, filled)

    @hook
    @gc_paused
    def create_local_plan(self) -> LoadPlan:
        """Return the reads that fill this rank's destinations, and prove that they do."""
        assert self.metadata is not None
        with naming_checkpoint(self.metadata):
            self._check_missing()
            reads: list[ReadItem] = []
            casts: list[str] = []
            faults: list[CoverageError] = []
            for fqn, value in self.state_dict.items():
                try:
                    reads.extend(self._reads(fqn, value, casts))
                except CoverageError as fault:
                    faults.append(fault)
            raise_all(faults)
            self._check_casts(casts)
        return LoadPlan(reads)

    def _reads(self, fqn: str, value: object, casts: list[str]) -> list[ReadItem]:
        assert self.metadata is not None
        entry = self.metadata.state_dict_metadata.get(fqn)
        if isinstance(entry, TensorStorageMetadata):
            return self._tensor_reads(fqn, value, entry, casts)
        if not isinstance(entry, BytesStorageMetadata):
            return []
        if isinstance(value, Tensor):
            check_takes_number(self._kinds[fqn])
            casts.append(f"{fqn} (a number -> {value.dtype})")
        return [_bytes_read(fqn)]

    def _check_missing(self) -> None:
        self.skipped_by = skip(self.skipped, self.unexpected, self._may_miss)
        empty = stored_below_empty_dicts(self.original_state_dict, self.unexpected) if self.flatten_state_dict else {}
        told = tell_skipped(self.skipped_by, list(self.state_dict), self.unexpected, empty)
        if told:
            warnings.warn(told, stacklevel=2)

    def _tensor_reads(self, fqn: str, value: object, entry: TensorStorageMetadata, casts: list[str]) -> list[ReadItem]:
        if fqn not in self._kinds:
            self._kinds[fqn] = Plain(fqn, memory_for_number(fqn, value, entry))
            casts.append(f"{fqn} ({entry.properties.dtype} -> {type(value).__name__})")
        assert self.metadata is not None
        kind, stored = self._kinds[fqn], StoredTensor(fqn, entry, part_note(self.metadata))
        here = kind.shape
        if here not in {None, stored.shape}:
            says = f"Size mismatch between saved {list(stored.shape)} and current {list(here or ())}"
            raise CoverageError(f"{says} for {fqn}", fqn=fqn)
        reads: list[ReadItem] = []
        for place, wanted in enumerate(kind.boxes()):
            if not wanted.numel:
                continue
            reads.extend(stored.reads(wanted, place))
            shard = self._shard(fqn, wanted, place)
            if tuple(shard.shape) != wanted.sizes:
                raise CoverageError(f"{fqn}: its shard {wanted} has shape {list(shard.shape)}", fqn=fqn)
            if shard.device.type == "meta":  # a hook that still returns the tensor without memory
                raise kind.no_memory()
            if shard.dtype != entry.properties.dtype:
                casts.append(f"{fqn} ({entry.properties.dtype} -> {shard.dtype})")
        return reads

    def _shard(self, fqn: str, box: Box, place: int) -> Tensor:
        kind = self._kinds[fqn]
        return kind.value if kind.is_whole else self.lookup_tensor(MetadataIndex(fqn, box.offsets, place))

    def _check_casts(self, casts: list[str]) -> None:
        if not casts or self._dtype_policy == "cast":
            return
        names = list(dict.fromkeys(casts))
        message = f"{len(names)} tensors have another dtype here than in the checkpoint: {some(names)}"
        if self._dtype_policy == "error":
            raise DtypeMismatch(f'{message}. Load into the stored dtypes, or convert with dtype_policy="cast"')
        if not self.is_coordinator:  # other ranks would warn of the same
            return
        warnings.warn(f'{message}. They are converted; dtype_policy="cast" does so silently', stacklevel=2)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the memory of one of this rank's shards: the one whose box was proved to be stored.

        Raises:
            CoverageError: The value's own hook did not return a tensor.
            UnsupportedTensor: The hook raised.
        """
        kind, place = self._kinds[index.fqn], (index.fqn, index.index)
        if kind.is_whole:
            whole: Tensor = kind.value
            return whole
        if place not in self._shards:
            self._shards[place] = kind.shard(index)
        return self._shards[place]

    def transform_tensor(self, read_item: ReadItem, tensor: Tensor) -> Tensor:
        """Return the part of a shard's memory that a read fills, which is usually all of it."""
        if tuple(read_item.lengths) == tuple(tensor.shape):
            return tensor
        part: Tensor = super().transform_tensor(read_item, tensor)
        return part

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a non-tensor object in its place, without running code that the checkpoint names.

        Raises:
            UnsupportedEntry: It contains a type that is not in `allowed_types` and may run code, or cannot be rebuilt.
            BlockCorrupt: It is neither a value nor a container that `torch.save` writes.
        """
        fqn = read_item.dest_index.fqn
        loaded = load_entry(fqn, value, self._trusted)
        if not isinstance(self.state_dict[fqn], Tensor):
            self._put(fqn, loaded)
            return
        for place, box in enumerate(self._kinds[fqn].boxes()):
            if box.numel:
                fill(fqn, self._shard(fqn, box, place), loaded, self._dtype_policy)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Take a filled tensor; if a number was asked for, put it in its place.

        Raises:
            DtypeMismatch: The number's type cannot hold it.
        """
        fqn = read_item.dest_index.fqn
        if not isinstance(self.state_dict[fqn], Tensor):
            self._put(fqn, number_like(fqn, tensor, self.state_dict[fqn], self._dtype_policy))

    def _put(self, fqn: str, value: object) -> None:
        self.state_dict[fqn] = value
        put(self.original_state_dict, self.mappings.get(fqn, (fqn,)), value)


def _is_empty(value: Any) -> bool:
    return Wrapper.takes(value) and not value.local_shards()


def _bytes_read(fqn: str) -> ReadItem:
    index, nothing = MetadataIndex(fqn), torch.Size((0,))
    return ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)
