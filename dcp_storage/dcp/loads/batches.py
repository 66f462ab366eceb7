"""Small chunks that go to an accelerator: decoded beside each other on the host, and copied there together."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dcp_storage.dcp.device import host_memory
from dcp_storage.dcp.memory import byte_view
from dcp_storage.dcp.small import BATCH_BYTES, aligned


class Member(Protocol):
    """A chunk whose destinations are on one device."""

    @property
    def nbytes(self) -> int:
        """Raw size of the chunk in bytes."""

    def copies(self, start: int, window: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every destination of the bytes from `start` on with what belongs there."""

    def commit(self) -> None:
        """Hand the destinations over, once they are filled."""


class Batches:
    """The batches of one load; used on one thread."""

    def __init__(self) -> None:
        self._filling: dict[torch.device, _Batch] = {}

    def join(self, member: Member, device: torch.device) -> "Room":
        """Return room for a chunk, in the batch with those before it while there is room for it."""
        batch = self._filling.get(device)
        if batch is None or batch.nbytes + aligned(member.nbytes) > BATCH_BYTES:
            if batch:
                batch.end()
            batch = self._filling[device] = _Batch(device)
        return batch.join(member)

    def finish(self) -> None:
        """Copy what is left."""
        for batch in self._filling.values():
            batch.end()


@dataclass(frozen=True)
class Room:
    """Where in a batch a chunk is decoded."""

    batch: "_Batch"
    offset: int

    def memory(self, start: int, stop: int) -> memoryview:
        """Return the memory of bytes of the chunk; on any thread."""
        return byte_view(self.batch.host[self.offset + start : self.offset + stop])

    def filled(self) -> None:
        """Say that all of the chunk is decoded."""
        self.batch.filled()


class _Batch:
    def __init__(self, device: torch.device) -> None:
        self.host = host_memory(BATCH_BYTES, torch.uint8, device)
        self.nbytes = 0
        self._device = device
        self._members: list[tuple[Member, int]] = []
        self._empty = 0
        self._ended = False

    def join(self, member: Member) -> Room:
        room = Room(self, self.nbytes)
        self._members.append((member, self.nbytes))
        self.nbytes += aligned(member.nbytes)
        self._empty += 1
        return room

    def filled(self) -> None:
        self._empty -= 1
        self._copy_if_whole()

    def end(self) -> None:
        """Take no more members."""
        self._ended = True
        self._copy_if_whole()

    def _copy_if_whole(self) -> None:
        if self._ended and not self._empty:
            self._copy()
            for member, _ in self._members:
                member.commit()

    @torch.inference_mode()  # destinations that were made in it take writes in it only
    def _copy(self) -> None:
        batch = self.host[: self.nbytes].to(self._device)
        copies = [
            copy
            for member, offset in self._members
            for copy in member.copies(0, batch[offset : offset + member.nbytes])
        ]
        if copies:
            destinations, sources = zip(*copies, strict=True)
            torch._foreach_copy_(destinations, sources)
