"""Staged values: a tensor that DCP asks for its shards, and a state dict of them that can be sent to a process."""

import os
import threading
from collections.abc import ItemsView, Sequence
from dataclasses import replace
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from dcp_storage.dcp.staging.pool import POOL, Bytes, Memory, map_shared, shared_memory
from dcp_storage.dcp.staging.walk import walk
from dcp_storage.dcp.undocumented import without_memory
from dcp_storage.errors import DcpStorageError


class StagedTensor(Tensor):
    """One rank's copied shards of a tensor of any kind: the results of DCP's three hooks when it was staged."""

    items: list[WriteItem]
    shards: list[Tensor]

    def __new__(cls, items: Sequence[WriteItem], shards: Sequence[Tensor], dtype: torch.dtype) -> Self:
        """Create one from the items that this rank would write, and the memory of each."""
        size = next((item.tensor_data.size for item in items if item.tensor_data), torch.Size([0]))
        self = without_memory(cls, size, dtype)
        self.items, self.shards = list(items), list(shards)
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} of a staged tensor, which only knows the shards that a save writes")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StagedTensor({list(self.shape)}, {len(self.shards)} shards)"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return StagedTensor, (self.items, self.shards, self.dtype)

    def __create_write_items__(self, fqn: str, value: Any) -> list[WriteItem]:
        return [replace(item, index=_renamed(item.index, fqn)) for item in self.items]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [item.tensor_data.chunk for item in self.items if item.tensor_data]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        wanted = tuple(index.offset or ())
        found = [n for n, item in enumerate(self.items) if tuple(item.index.offset or ()) == wanted]
        if not found:
            raise ValueError(f"{index.fqn}: no shard that begins at {list(wanted)} was staged")
        filled = [n for n in found if self.shards[n].numel()] or found
        return self.shards[index.index if index.index in filled else filled[0]]


def _renamed(index: MetadataIndex, fqn: str) -> MetadataIndex:
    """Return the same index for another entry."""
    return MetadataIndex(fqn, index.offset, index.index)


class Place(NamedTuple):
    """The position of a staged tensor in the memory of its state."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Shards(NamedTuple):
    """A `StagedTensor` on its way to another process."""

    items: list[WriteItem]
    places: list[Place]
    dtype: torch.dtype


class _Unstaged:
    """Replaces a state that could not be staged: a writer that does not check for the error cannot store it."""

    def __init__(self, error: DcpStorageError) -> None:
        self._error = error

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self._error


class _Thread(threading.local):
    state: "StagedState | None" = None


_thread = _Thread()


class StagedState(dict[str, Any]):
    """A copy of a state dict, made by `AsyncStorageWriter.stage`, or the error that prevented it.

    DCP saves its `items()` in the thread or process of the save, where the writer can then find the state.
    """

    def __init__(
        self, values: dict[str, Any], memory: Memory | None = None, error: DcpStorageError | None = None
    ) -> None:
        super().__init__({"the state": _Unstaged(error)} if error else values)
        self.error = error
        self.seconds: float | None = None
        self._memory = memory

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        """Return the entries, and record that this thread saves them."""
        _thread.state = self
        return super().items()

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.error:
            return StagedState, ({}, None, self.error)
        if self._memory is None:
            return StagedState, (dict(self), None, None)
        try:
            shared = self._shared(self._memory)
        except (AttributeError, OSError):  # without such memory torch sends each tensor
            return StagedState, (dict(self), None, None)
        base, nbytes = self._memory.array.ctypes.data, len(self._memory.array)
        parts = walk(dict(self), lambda _, tensor: _placed(tensor, base, nbytes), lambda _, value: value)
        assert shared.file is not None, "shared memory has a file"
        return _received, (DupFd(shared.file), nbytes, parts)

    @staticmethod
    def _shared(memory: Memory) -> Memory:
        if memory.file is not None:
            return memory
        copy = shared_memory(len(memory.array))
        copy.array[:] = memory.array
        POOL.shares = True
        return copy


class Redeemed(NamedTuple):
    """The outcome of staging the state to be saved: the error, if any, and how long it took."""

    error: DcpStorageError | None = None
    seconds: float | None = None


def redeem() -> Redeemed:
    """Return the outcome of staging the state that this thread is about to save; DCP now owns its tensors."""
    state, _thread.state = _thread.state, None
    if state is None:
        return Redeemed()
    state.clear()  # DCP's thread keeps it longer than the save needs it
    return Redeemed(state.error, state.seconds)


def lay(memory: Bytes, place: Place) -> Tensor:
    """Return the tensor at a place of a state's memory, which it keeps alive."""
    count = place.dtype.itemsize * torch.Size(place.shape).numel()
    if not count:
        return torch.empty(place.shape, dtype=place.dtype, device="cpu")
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=place.offset)
    return flat.view(place.dtype).view(place.shape)


def _placed(tensor: Tensor, base: int, nbytes: int) -> Any:
    if isinstance(tensor, StagedTensor):
        places = [_placed(shard, base, nbytes) for shard in tensor.shards]
        return _Shards(tensor.items, places, tensor.dtype)
    return Place(max(0, tensor.data_ptr() - base), tuple(tensor.shape), tensor.dtype)


def _received(file: Any, nbytes: int, parts: dict[str, Any]) -> StagedState:
    fd = file.detach()
    lent = map_shared(fd, nbytes)
    os.close(fd)

    def make(_: str, part: Any) -> Any:
        if isinstance(part, _Shards):
            return StagedTensor(part.items, [lay(lent, place) for place in part.places], part.dtype)
        return lay(lent, part) if isinstance(part, Place) else part

    return StagedState(walk(parts, make, make))
