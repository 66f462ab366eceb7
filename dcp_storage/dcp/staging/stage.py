"""`stage`: copies the parts of a state that a save may write to one piece of memory, before training changes it."""

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from dcp_storage.collector import gc_paused
from dcp_storage.dcp.device import wait_for_device
from dcp_storage.dcp.kinds.base import check_plain
from dcp_storage.dcp.kinds.of import kind_of
from dcp_storage.dcp.kinds.plain import Plain
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
    copies = layout.copies(memory)
    values = walk(state_dict, lambda _fqn, _tensor: next(copies), _copied)
    for tensor in layout.devices.values():
        wait_for_device(tensor)
    return StagedState(dict(values), pages)


class _Layout:
    """Plans which tensors are copied where, in the order of a walk."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.devices: dict[torch.device, Tensor] = {}
        self._planned: list[tuple[list[WriteItem] | None, torch.dtype, list[tuple[str, Tensor, Place]]]] = []
        self._places: dict[object, Place] = {}

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

    def _shard(self, fqn: str, tensor: Tensor) -> tuple[str, Tensor, Place]:
        memory = _memory_of(tensor)
        if memory not in self._places:
            place = Place(self.nbytes, tuple(tensor.shape), tensor.dtype)
            nbytes = tensor.numel() * tensor.element_size()
            self.nbytes += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
            self._places[memory] = place
        if tensor.device.type != "cpu":
            self.devices.setdefault(tensor.device, tensor)
        return fqn, tensor, self._places[memory]

    def copies(self, memory: Bytes) -> Iterator[Tensor]:
        """Copy the planned tensors one by one."""
        copied: set[Place] = set()
        for items, dtype, parts in self._planned:
            shards = []
            for fqn, tensor, place in parts:
                shard = lay(memory, place)
                if place not in copied:
                    _copy(fqn, tensor, shard)
                    copied.add(place)
                shards.append(shard)
            yield shards[0] if items is None else StagedTensor(items, shards, dtype)


def _memory_of(tensor: Tensor) -> object:
    """Return a key that tensors with the same memory share, so that tied weights are copied once."""
    if not tensor.numel() or not (address := tensor.data_ptr()):
        return object()
    layout = tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
    return tensor.device, address, layout


def _copy(fqn: str, source: Tensor, target: Tensor) -> None:
    try:
        with torch.no_grad():
            target.copy_(source.detach(), non_blocking=True)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UnsupportedTensor(f"{fqn} could not be copied to the host: {error}", fqn=fqn) from error


def _copied(fqn: str, value: Any) -> Any:
    if isinstance(value, _UNCHANGING):
        return value
    try:
        return copy.deepcopy(value)
    except Exception as error:  # an object's own code may raise anything
        kind = type(value).__name__
        raise UnsupportedEntry(
            f"{fqn} holds a {kind} that cannot be copied before async_save returns, nor stored: {error!r}", fqn=fqn
        ) from error
