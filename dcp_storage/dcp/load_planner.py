"""`ShardedLoadPlanner`: every destination is covered by what is stored, or an error names the box that is not."""

import io
import pickle
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from dcp_storage.dcp.chunks import chunk_box, global_shape, local_dtype, wanted_boxes
from dcp_storage.errors import ConfigError, CoverageError, DtypeMismatch, MissingKeys, UnsupportedFormat
from dcp_storage.geometry import Box, contains, intersect, subtract

DtypePolicy = Literal["cast", "warn", "error"]


class ShardedLoadPlanner(DefaultLoadPlanner):
    """Plans a load into any sharding, `LocalShardsWrapper` included, and proves it complete before data is read.

    Args:
        allow_partial_load: Leave entries as they are that the checkpoint does not hold, instead of raising;
            `skipped` names them afterwards.
        dtype_policy: What to do where a destination's dtype is not the stored one: `"cast"` converts, `"warn"` converts
            and warns once a load, `"error"` raises.
        allowed_types: Types, beyond those that `torch.load(weights_only=True)` knows, that entries which are no tensors
            may hold. List only what you trust: their constructors run.
        flatten_state_dict: As it was in the save.
        flatten_sharded_tensors: As it was in the save.

    Attributes:
        skipped: Names that the last load left alone because the checkpoint does not hold them.
        unexpected: Names that the checkpoint holds and the last load did not ask for.

    Raises (inside of DCP's `CheckpointException`):
        MissingKeys: Entries are not in the checkpoint and `allow_partial_load` is false.
        CoverageError: Shapes differ, or a box of a destination is not stored; names the tensor and the box.
        DtypeMismatch: See `dtype_policy`.
        UnsupportedFormat: An entry that is no tensor holds a type that is not allowed.
    """

    def __init__(
        self,
        *,
        allow_partial_load: bool = False,
        dtype_policy: DtypePolicy = "warn",
        allowed_types: Sequence[type] = (),
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
    ) -> None:
        super().__init__(
            flatten_state_dict=flatten_state_dict,
            flatten_sharded_tensors=flatten_sharded_tensors,
            allow_partial_load=allow_partial_load,
        )
        if dtype_policy not in {"cast", "warn", "error"}:
            raise ConfigError(f'dtype_policy is {dtype_policy!r}; choose "cast", "warn" or "error"')
        self.skipped: list[str] = []
        self.unexpected: list[str] = []
        self._dtype_policy = dtype_policy
        self._allowed_types: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = list(allowed_types)

    def create_local_plan(self) -> LoadPlan:
        """Return the reads that fill this rank's destinations, and prove that they do."""
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata
        self.skipped = [fqn for fqn in self.state_dict if fqn not in stored]
        self.unexpected = [fqn for fqn in stored if fqn not in self.state_dict]
        if self.skipped and not self.allow_partial_load:
            raise MissingKeys(_missing_message(self.skipped, self.unexpected), fqns=self.skipped)
        reads: list[ReadItem] = []
        casts: list[str] = []
        for fqn, value in self.state_dict.items():
            entry = stored.get(fqn)
            if isinstance(entry, TensorStorageMetadata):
                reads.extend(_tensor_reads(fqn, value, entry))
                here = local_dtype(value) or entry.properties.dtype
                if here != entry.properties.dtype:
                    casts.append(f"{fqn} ({entry.properties.dtype} -> {here})")
            elif isinstance(entry, BytesStorageMetadata):
                reads.append(_bytes_read(fqn, value))
        self._judge(casts)
        return LoadPlan(reads)

    def _judge(self, casts: list[str]) -> None:
        if not casts or self._dtype_policy == "cast":
            return
        message = f"{len(casts)} tensors are stored in another dtype than they are loaded into: {_some(casts)}"
        if self._dtype_policy == "error":
            raise DtypeMismatch(message)
        warnings.warn(f"{message}. They are converted; dtype_policy decides on that", stacklevel=2)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put an object that is no tensor in its place, without running code that the checkpoint names.

        Raises:
            UnsupportedFormat: It holds a type that is neither torch's nor in `allowed_types`.
        """
        fqn = read_item.dest_index.fqn
        loaded = self._load_object(fqn, value)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[fqn], loaded)
        else:
            self.state_dict[fqn] = loaded

    def _load_object(self, fqn: str, value: io.BytesIO) -> Any:
        allowed = torch.serialization.safe_globals(self._allowed_types) if self._allowed_types else nullcontext()
        try:
            with allowed:
                return torch.load(value, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            value.seek(0)
            refused = ", ".join(_refused(value)) or str(error)
            raise UnsupportedFormat(
                f"{fqn} holds what is not loaded from an untrusted checkpoint: {refused}. If you trust it, list its "
                "types in ShardedLoadPlanner(allowed_types=...)",
                fqn=fqn,
            ) from error


def _refused(value: io.BytesIO) -> list[str]:
    return torch.serialization.get_unsafe_globals_in_checkpoint(value)


def _bytes_read(fqn: str, value: object) -> ReadItem:
    if isinstance(value, Tensor):
        raise CoverageError(f"{fqn} is a tensor here and another object in the checkpoint", fqn=fqn)
    index, nothing = MetadataIndex(fqn), torch.Size((0,))
    return ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)


def _tensor_reads(fqn: str, value: object, entry: TensorStorageMetadata) -> list[ReadItem]:
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise CoverageError(f"{fqn} is a {kind} here and a tensor in the checkpoint", fqn=fqn)
    shape, here = tuple(entry.size), global_shape(value)
    if here not in {None, shape}:
        raise CoverageError(f"{fqn} has shape {list(here or ())} here and {list(shape)} in the checkpoint", fqn=fqn)
    stored = [(number, box) for number, box in enumerate(map(chunk_box, entry.chunks)) if box.numel]
    reads: list[ReadItem] = []
    for number, wanted in enumerate(wanted_boxes(fqn, value)):
        if not contains(shape, wanted) and wanted.numel:
            raise CoverageError(f"{fqn}: its shard {wanted} is outside of the stored shape {list(shape)}", fqn=fqn)
        shared = [(source, *parts) for source, box in stored if (parts := _shared(wanted, box))]
        if sum(part.numel for _, part, _ in shared) != wanted.numel:
            missing = subtract(wanted, [box for _, box in stored])[0]
            raise CoverageError(f"{fqn}: the checkpoint does not hold {missing} of shape {list(shape)}", fqn=fqn)
        index = MetadataIndex(fqn, wanted.offsets, number)
        reads.extend(
            _read(index, wanted, MetadataIndex(fqn, box.offsets, source), part) for source, part, box in shared
        )
    return reads


def _shared(wanted: Box, stored: Box) -> tuple[Box, Box] | None:
    part = intersect(wanted, stored) if wanted.numel else None
    return (part, stored) if part else None


def _read(destination: MetadataIndex, wanted: Box, storage: MetadataIndex, part: Box) -> ReadItem:
    assert storage.offset is not None
    return ReadItem(
        LoadItemType.TENSOR,
        destination,
        torch.Size(part.relative_to(wanted.offsets).offsets),
        storage,
        torch.Size(part.relative_to(tuple(storage.offset)).offsets),
        torch.Size(part.sizes),
    )


def _missing_message(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    there = f"; it holds {len(unexpected)} that were not asked for: {_some(unexpected)}" if unexpected else ""
    return (
        f"the checkpoint does not hold {len(missing)} of the entries: {_some(missing)}{there}. "
        "Load without them, or pass allow_partial_load=True"
    )


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
