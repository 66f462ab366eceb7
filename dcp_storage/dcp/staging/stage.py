"""`stage`: copies the parts of a state that a save may write to one piece of memory, before training changes it."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from dcp_storage.collector import gc_paused
from dcp_storage.dcp.device import copy_to_host, on_accelerator, wait_for_device
from dcp_storage.dcp.kinds.base import check_plain
from dcp_storage.dcp.kinds.of import kind_of
from dcp_storage.dcp.kinds.plain import Plain
from dcp_storage.dcp.small import BATCH_BYTES, Batchable, batchable, gather_to_host
from dcp_storage.dcp.staging.pool import POOL, Bytes
from dcp_storage.dcp.staging.staged import Place, StagedState, StagedTensor, lay
from dcp_storage.dcp.staging.walk import walk
from dcp_storage.errors import DcpStorageError, StagingError, UnsupportedEntry, UnsupportedTensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import WriteItem

_ALIGNMENT = 64

_UNCHANGING = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size)


@gc_paused
def stage(state_dict: dict[str, Any], *, keep: bool) -> StagedState:
    """Return a copy of a state dict, with only the elements that this rank holds, not their whole storages.

    Tensors become plain CPU tensors, or `StagedTensor`s if they are a part of a global tensor; other objects are
    deep-copied. With `keep` the memory is kept for the next state once nothing refers to this one.

    A failure is returned in the result's `error`: a rank that raised here would leave the others waiting.
    """
    try:
        return _staged(state_dict, keep=keep)
    except DcpStorageError as error:
        return StagedState({}, error=error)
    except Exception as error:  # noqa: BLE001 - raised later, where DCP reports it to all ranks
        failure = StagingError(f"the state could not be copied before async_save returned: {error!r}")
        failure.__cause__ = error
        return StagedState({}, error=failure)


def _staged(state_dict: dict[str, Any], *, keep: bool) -> StagedState:
    layout = _Layout()
    walk(state_dict, layout.add, lambda _, value: value)
    memory, pages = POOL.lend(max(1, layout.nbytes), device=bool(layout.devices), keep=keep)
    layout.copy(memory)
    copies = layout.copies(memory)
    values = walk(state_dict, lambda _fqn, _tensor: next(copies), _copied)
    for device in layout.devices:
        wait_for_device(device)
    return StagedState(dict(values), pages)


class _Part(NamedTuple):
    """A tensor, and the place that it is copied to."""

    fqn: str
    tensor: Tensor
    place: Place


class _Run:
    """Tensors that are copied together, to adjacent places."""

    def __init__(self, start: int, nbytes: int) -> None:
        self.parts: list[_Part] = []
        self._next = start
        self._stop = start + nbytes

    def has_room(self, nbytes: int) -> bool:
        return self._next + nbytes <= self._stop

    def add(self, fqn: str, tensor: Tensor, nbytes: int) -> Place:
        place = Place(self._next, tuple(tensor.shape), tensor.dtype)
        self.parts.append(_Part(fqn, tensor, place))
        self._next += nbytes
        return place


class _Layout:
    """Plans which tensors are copied where, in the order of a walk."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.devices: set[torch.device] = set()
        self._planned: list[tuple[list[WriteItem] | None, torch.dtype, list[Place]]] = []
        self._places: dict[object, Place] = {}
        self._runs: list[_Run] = []
        self._filling: dict[Batchable, _Run] = {}

    def add(self, fqn: str, tensor: Tensor) -> None:
        """Plan a tensor of a state dict.

        Raises:
            DcpStorageError: It cannot be stored.
        """
        kind = kind_of(fqn, tensor)
        if isinstance(kind, Plain):
            check_plain(fqn, kind.value)
            self._planned.append((None, kind.value.dtype, [self._shard(fqn, kind.value)]))
            return
        items = kind.write_items()
        shards = [kind.shard(MetadataIndex(fqn, item.index.offset, place)) for place, item in enumerate(items)]
        for shard in shards:
            check_plain(fqn, shard)
        self._planned.append((items, tensor.dtype, [self._shard(fqn, shard) for shard in shards]))

    def _shard(self, fqn: str, tensor: Tensor) -> Place:
        memory = _memory_of(tensor)
        if memory not in self._places:
            nbytes = tensor.numel() * tensor.element_size()
            self._places[memory] = self._run_for(tensor, nbytes).add(fqn, tensor, nbytes)
            if on_accelerator(tensor.device):
                self.devices.add(tensor.device)
        return self._places[memory]

    def _run_for(self, tensor: Tensor, nbytes: int) -> _Run:
        which = batchable(tensor)
        if which is None:
            return self._begin(nbytes)
        run = self._filling.get(which)
        if run is None or not run.has_room(nbytes):
            run = self._filling[which] = self._begin(BATCH_BYTES)
        return run

    def _begin(self, nbytes: int) -> _Run:
        run = _Run(self.nbytes, nbytes)
        self._runs.append(run)
        self.nbytes += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return run

    def copy(self, memory: Bytes) -> None:
        """Copy all planned tensors."""
        for run in self._runs:
            _copy(run.parts, memory)

    def copies(self, memory: Bytes) -> Iterator[Tensor]:
        """Yield the copies of the planned tensors, in order."""
        for items, dtype, places in self._planned:
            shards = [lay(memory, place) for place in places]
            yield shards[0] if items is None else StagedTensor(items, shards, dtype)


def _memory_of(tensor: Tensor) -> object:
    """Return a key that tensors with the same memory share, so that tied weights are copied once."""
    if not tensor.numel() or not (address := tensor.data_ptr()):
        return object()
    layout = tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
    return tensor.device, address, layout


@torch.no_grad()
def _copy(parts: Sequence[_Part], memory: Bytes) -> None:
    fqn, tensor, place = parts[0]
    try:
        if len(parts) == 1:
            copy_to_host(tensor.detach(), lay(memory, place), non_blocking=True)
        else:
            elements = sum(part.tensor.numel() for part in parts)
            batch = lay(memory, Place(place.offset, (elements,), place.dtype))
            gather_to_host([part.tensor for part in parts], batch, non_blocking=True)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
        raise UnsupportedTensor(f"{fqn}{more} could not be copied to the host: {error}", fqn=fqn) from error


def _copied(fqn: str, value: Any) -> Any:
    if isinstance(value, _UNCHANGING):
        return value
    try:
        return copy.deepcopy(value)
    except Exception as error:  # an object's own code may raise anything
        if isinstance(value, Mapping | list):
            return walk(dict(value) if isinstance(value, Mapping) else list(value), _copied, _copied, fqn)
        kind = type(value).__name__
        raise UnsupportedEntry(
            f"{fqn} holds a {kind} that cannot be copied before async_save returns, nor stored: {error!r}", fqn=fqn
        ) from error
