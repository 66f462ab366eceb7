"""`ShardedLoadPlanner`: every destination is covered by what is stored, or an error names the box that is not."""

import io
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from dcp_storage.collector import uncollected
from dcp_storage.dcp.entries import TrustPolicy, load_entry
from dcp_storage.dcp.kinds.hooked import Wrapper
from dcp_storage.dcp.kinds.of import kind_of
from dcp_storage.dcp.planners.coverage import StoredTensor
from dcp_storage.dcp.planners.flatten import flatten, flatten_as_before_2_4, put
from dcp_storage.errors import ConfigError, CoverageError, DtypeMismatch, MissingKeys

if TYPE_CHECKING:
    from dcp_storage.dcp.kinds.base import Kind

DtypePolicy = Literal["cast", "warn", "error"]


class ShardedLoadPlanner(DefaultLoadPlanner):
    """Plans a load into any sharding, `LocalShardsWrapper` included, and proves it complete before data is read.

    Args:
        allow_partial_load: Leave entries as they are that the checkpoint does not hold, instead of raising;
            `skipped` names them afterwards.
        dtype_policy: What to do where a destination's dtype is not the stored one: `"cast"` converts, `"warn"` converts
            and warns once a load, `"error"` raises.
        allowed_types: Types and functions that entries which are not tensors may hold and call, beyond tensors and
            what of Python's standard library and of NumPy runs no code of its own. `(Config, "old.module.Config")` is
            a type that was stored under another name. List only what you trust: its own code runs.
        trust: `"all"` loads entries of any type, which may run anything: only for checkpoints that you made yourself.
        flatten_state_dict: As it was in the save.

    Attributes:
        skipped: Names that the last load left alone because the checkpoint does not hold them.
        unexpected: Names that the checkpoint holds and the last load did not ask for.

    Raises (inside of DCP's `CheckpointException`):
        MissingKeys: Entries are not in the checkpoint and `allow_partial_load` is false.
        CoverageError: Shapes differ, or a box of a destination is not stored; names the tensor and the box.
        DtypeMismatch: See `dtype_policy`.
        UnsupportedTensor: A destination's own hooks failed, or it is on the meta device and cannot be given memory.
        UnsupportedEntry: An entry that is not a tensor holds a type that is not allowed, or cannot be rebuilt.
    """

    def __init__(
        self,
        *,
        allow_partial_load: bool = False,
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
        if trust not in {"listed", "all"}:
            raise ConfigError(f'trust is {trust!r}; choose "listed" or "all"')
        self.skipped: list[str] = []
        self.unexpected: list[str] = []
        self._dtype_policy = dtype_policy
        self._allowed_types = tuple(allowed_types)
        self._trust = trust
        self._shards: dict[tuple[str, int | None], Tensor] = {}
        self._kinds: dict[str, Kind] = {}

    @uncollected
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the state dict that is to be filled; what of it is stored and on the meta device gets memory.

        Raises:
            ConfigError: Two paths of the state dict make the same name.
            UnsupportedTensor: A tensor on the meta device is of a type whose memory only its own code can make.
        """
        assert metadata is not None
        self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator
        self._shards.clear()
        self.state_dict, self.mappings = flatten(state_dict, nested=self.flatten_state_dict)
        self._compare_names(metadata)
        self._kinds = {}
        for fqn, value in self.state_dict.items():
            if isinstance(value, Tensor) and fqn in metadata.state_dict_metadata:
                self._kinds[fqn] = kind_of(fqn, value)
                filled = self._kinds[fqn].materialized()
                if filled is not self._kinds[fqn].value:
                    self._kinds[fqn] = kind_of(fqn, filled)
                    self._put(fqn, filled)

    def _compare_names(self, metadata: Metadata) -> None:
        stored = metadata.state_dict_metadata
        self.unexpected = [fqn for fqn in stored if fqn not in self.state_dict]
        if self.unexpected and self.flatten_state_dict:
            old = flatten_as_before_2_4(self.original_state_dict)
            if any(fqn in old[0] for fqn in self.unexpected):
                self.state_dict, self.mappings = old
                self.unexpected = [fqn for fqn in stored if fqn not in self.state_dict]
        self.skipped = [fqn for fqn, held in self.state_dict.items() if fqn not in stored and not _is_empty(held)]

    @uncollected
    def create_local_plan(self) -> LoadPlan:
        """Return the reads that fill this rank's destinations, and prove that they do."""
        assert self.metadata is not None
        if self.skipped and not self.allow_partial_load:
            raise MissingKeys(_missing_message(self.skipped, self.unexpected), fqns=self.skipped)
        reads: list[ReadItem] = []
        casts: list[str] = []
        for fqn, value in self.state_dict.items():
            entry = self.metadata.state_dict_metadata.get(fqn)
            if isinstance(entry, TensorStorageMetadata):
                reads.extend(self._tensor_reads(fqn, value, entry, casts))
            elif isinstance(entry, BytesStorageMetadata):
                reads.append(_bytes_read(fqn, value))
        self._judge(casts)
        return LoadPlan(reads)

    def _tensor_reads(self, fqn: str, value: object, entry: TensorStorageMetadata, casts: list[str]) -> list[ReadItem]:
        if fqn not in self._kinds:
            kind_here = type(value).__name__
            raise CoverageError(f"{fqn} is a {kind_here} here and a tensor in the checkpoint", fqn=fqn)
        kind, stored = self._kinds[fqn], StoredTensor(fqn, entry)
        here = kind.shape
        if here not in {None, stored.shape}:
            says = f"Size mismatch between saved {list(stored.shape)} and current {list(here or ())}"
            raise CoverageError(f"{says} for {fqn}", fqn=fqn)
        reads: list[ReadItem] = []
        for place, wanted in enumerate(kind.boxes()):
            if not wanted.numel:
                continue
            reads.extend(stored.reads(wanted, place))
            shard = kind.value if kind.is_whole else self.lookup_tensor(MetadataIndex(fqn, wanted.offsets, place))
            if tuple(shard.shape) != wanted.sizes:
                raise CoverageError(f"{fqn}: its shard {wanted} is of shape {list(shard.shape)}", fqn=fqn)
            if shard.device.type == "meta":  # a hook that still knows the tensor before it got memory
                raise kind.no_memory()
            if shard.dtype != entry.properties.dtype:
                casts.append(f"{fqn} ({entry.properties.dtype} -> {shard.dtype})")
        return reads

    def _judge(self, casts: list[str]) -> None:
        if not casts or self._dtype_policy == "cast":
            return
        names = list(dict.fromkeys(casts))
        message = f"{len(names)} tensors are stored in another dtype than they are loaded into: {_some(names)}"
        if self._dtype_policy == "error":
            raise DtypeMismatch(message)
        warnings.warn(f"{message}. They are converted; dtype_policy decides on that", stacklevel=2)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the memory of one of this rank's shards: the one whose box was proved to be stored.

        Raises:
            CoverageError: The value's own hook returned no tensor.
            UnsupportedTensor: The hook raised.
        """
        place = (index.fqn, index.index)
        if place not in self._shards:
            self._shards[place] = self._kinds[index.fqn].shard(index)
        return self._shards[place]

    def transform_tensor(self, read_item: ReadItem, tensor: Tensor) -> Tensor:
        """Return the part of a shard's memory that a read fills; mostly all of it, which need not be cut out."""
        if tuple(read_item.lengths) == tuple(tensor.shape):
            return tensor
        part: Tensor = super().transform_tensor(read_item, tensor)
        return part

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put an object that is no tensor in its place, without running code that the checkpoint names.

        Raises:
            UnsupportedEntry: It holds a type that is not in `allowed_types` and may run code, or cannot be rebuilt.
            BlockCorrupt: It is neither a value nor a container that `torch.save` makes.
        """
        fqn = read_item.dest_index.fqn
        self._put(fqn, load_entry(fqn, value, self._allowed_types, trust=self._trust))

    def _put(self, fqn: str, value: object) -> None:
        self.state_dict[fqn] = value
        put(self.original_state_dict, self.mappings.get(fqn, (fqn,)), value)


def _is_empty(value: Any) -> bool:
    return Wrapper.takes(value) and not value.local_shards()


def _bytes_read(fqn: str, value: object) -> ReadItem:
    if isinstance(value, Tensor):
        raise CoverageError(f"{fqn} is a tensor here and another object in the checkpoint", fqn=fqn)
    index, nothing = MetadataIndex(fqn), torch.Size((0,))
    return ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)


def _missing_message(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    total = f" ({len(missing)} in all)" if len(missing) > 1 else ""
    there = f"; it holds {len(unexpected)} that were not asked for: {_some(unexpected)}" if unexpected else ""
    return (
        f"Missing key in checkpoint state_dict: {_some(missing)}{total}{there}. "
        "Load without them, or pass allow_partial_load=True"
    )


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
