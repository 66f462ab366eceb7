"""Small chunks for an accelerator: decoded into one piece of host memory and copied together."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dcp_storage.dcp.device import host_memory, wait_for_device
from dcp_storage.dcp.memory import byte_view
from dcp_storage.dcp.small import BATCH_BYTES, Batchable
from dcp_storage.dcp.undocumented import copy_all


class Member(Protocol):
    """A stored chunk whose destinations are all on one device."""

    @property
    def nbytes(self) -> int:
        """Raw size of the chunk in bytes."""

    def copies(self, start: int, elements: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each destination of the chunk's elements from byte `start` on, with its elements."""

    def commit(self) -> None:
        """Return the filled destinations to the planner."""


class Slot(NamedTuple):
    """The place of a chunk in a batch."""

    batch: "_Batch"
    memory: memoryview


class Scatter:
    """The batches of one load; used on one thread."""

    def __init__(self) -> None:
        self._filling: dict[Batchable, _Batch] = {}

    def join(self, member: Member, which: Batchable) -> Slot:
        """Return room for a chunk, in the current batch if it fits."""
        batch = self._filling.get(which)
        if batch is None or not batch.has_room(member):
            if batch:
                batch.end()
            batch = self._filling[which] = _Batch(*which)
        return batch.join(member)

    def finish(self) -> None:
        """Copy the batches that are not full."""
        for batch in self._filling.values():
            batch.end()


class _Batch:
    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._host = host_memory(BATCH_BYTES // dtype.itemsize, dtype, device)
        self._memory = byte_view(self._host)
        self._members: list[Member] = []
        self._nbytes = 0
        self._unfilled = 0
        self._ended = False

    def has_room(self, member: Member) -> bool:
        return self._nbytes + member.nbytes <= len(self._memory)

    def join(self, member: Member) -> Slot:
        start, self._nbytes = self._nbytes, self._nbytes + member.nbytes
        self._members.append(member)
        self._unfilled += 1
        return Slot(self, self._memory[start : self._nbytes])

    def filled(self) -> None:
        """Record that one of the members is decoded."""
        self._unfilled -= 1
        self._copy_if_whole()

    def end(self) -> None:
        """Accept no more members."""
        self._ended = True
        self._copy_if_whole()

    def _copy_if_whole(self) -> None:
        if self._ended and not self._unfilled:
            self._copy()
            for member in self._members:
                member.commit()

    @torch.inference_mode()  # tensors created in inference mode can only be written in it
    def _copy(self) -> None:
        item = self._host.element_size()
        sizes = [member.nbytes // item for member in self._members]
        parts = torch.split(self._on_device(self._host[: self._nbytes // item]), sizes)
        both = zip(self._members, parts, strict=True)
        copies = [copy for member, part in both for copy in member.copies(0, part)]
        if copies:
            destinations, sources = zip(*copies, strict=True)
            copy_all(destinations, sources)
            wait_for_device(self._device)  # the caller may go on in another stream

    def _on_device(self, elements: Tensor) -> Tensor:
        try:
            return elements.to(self._device)
        except torch.OutOfMemoryError:
            return elements  # copied one tensor at a time
