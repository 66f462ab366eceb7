"""Targets: the destinations of tensors and of other entries, which the load pipeline fills."""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from dcp_storage.dcp.device import host_memory, on_accelerator, on_host
from dcp_storage.dcp.kinds.boxes import read_box
from dcp_storage.dcp.loads.destination import Destination, Destinations
from dcp_storage.dcp.loads.hand_over import hand_over
from dcp_storage.dcp.loads.scatter import Scatter, Slot
from dcp_storage.dcp.memory import as_it_lies, borrowed_view, byte_view
from dcp_storage.dcp.small import SMALL_BYTES
from dcp_storage.errors import UnsupportedFormat
from dcp_storage.geometry import Box, Shape, boxes_of_run, flat_extent, intersect


class BytesTarget:
    """Collects a whole non-tensor entry, and passes it to the planner."""

    def __init__(self, read: ReadItem, nbytes: int, planner: LoadPlanner) -> None:
        self._read = read
        self._planner = planner
        self._nbytes = nbytes
        self._data = memoryview(b"")

    def open(self) -> None:
        """Allocate; the size was validated against the number of stored blocks.

        Raises:
            UnsupportedFormat: There is not enough memory for it.
        """
        try:
            self._data = memoryview(bytearray(self._nbytes))
        except MemoryError as error:
            fqn = self._read.storage_index.fqn
            raise UnsupportedFormat(f"{fqn} is an entry of {self._nbytes} bytes: not enough memory", fqn=fqn) from error

    def direct(self, start: int, stop: int) -> memoryview:
        """Return the slice's memory."""
        return self._data[start:stop]

    def fill(self, start: int, stop: int, decode: Callable[[memoryview], None]) -> None:
        """Decode the slice into place."""
        decode(self.direct(start, stop))

    def close(self) -> None:
        """Let the planner load the bytes."""
        hand_over(self._planner, self._read, self._data)


class _Part(NamedTuple):
    """One read of a chunk, and the destination of its box."""

    box: Box
    destination: Destination
    target: Tensor  # the tensor to fill
    start: int  # the bytes of the chunk between the box's first and last element
    stop: int
    memory: memoryview | None  # of the destination, if it is laid out like the chunk


class ChunkTarget:
    """The destinations of all reads of one stored chunk, so that each of its blocks is decoded once for all of them.

    Raises (in `open` and `close`):
        CoverageError: The planner resolved a read to a tensor of a different shape.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        reads: Sequence[ReadItem],
        destinations: Destinations,
        scatter: Scatter,
    ) -> None:
        self.nbytes = prod(shape) * dtype.itemsize
        self._shape = shape
        self._dtype = dtype
        self._item = dtype.itemsize
        self._reads = reads
        self._destinations = destinations
        self._scatter = scatter
        self._parts: list[_Part] = []
        self._slot: Slot | None = None

    def open(self) -> None:
        """Resolve the destinations."""
        self._parts = [self._resolve(read) for read in self._reads]
        device = self._parts[0].target.device
        if self.nbytes <= SMALL_BYTES and all(_takes_batches(part.target, device) for part in self._parts):
            self._slot = self._scatter.join(self, (device, self._dtype))

    def _resolve(self, read: ReadItem) -> _Part:
        box, destination = read_box(read), self._destinations.open(read, self._dtype)
        target = destination.memory
        start, stop = flat_extent(self._shape, box)
        plain = on_host(target.device) and target.dtype == self._dtype and as_it_lies(target)
        memory = borrowed_view(target) if plain and stop - start == box.numel else None  # the part keeps it alive
        return _Part(box, destination, target, start * self._item, stop * self._item, memory)

    def direct(self, start: int, stop: int) -> memoryview | None:
        """Return the destination's memory if exactly one read wants all of this slice, laid out as in the chunk."""
        touched = [part for part in self._parts if part.start < stop and start < part.stop]
        if len(touched) != 1:
            return None
        [part] = touched
        if part.memory is None or start < part.start or stop > part.stop:
            return None
        return part.memory[start - part.start : stop - part.start]

    def fill(self, start: int, stop: int, decode: Callable[[memoryview], None]) -> None:
        """Decode the slice into place, or into a window from which its elements are copied into place."""
        memory = self.direct(start, stop)
        if memory is not None:
            decode(memory)
            return
        if self._slot is not None:
            decode(self._slot.memory[start:stop])
            return
        # Near the first destination, since most slices have only one.
        window = host_memory(stop - start, torch.uint8, self._parts[0].target.device)
        decode(byte_view(window))
        self._copy(start, window.view(self._dtype))

    @torch.inference_mode()  # tensors created in inference mode can only be written in it
    def _copy(self, start: int, elements: Tensor) -> None:
        for destination, source in self.copies(start, elements):
            destination.copy_(source)

    def copies(self, start: int, elements: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every destination of the chunk's elements from byte `start` on, with what belongs there.

        Both have the same shape; destinations are of any dtype and device.
        """
        if elements.nbytes == self.nbytes and all(part.box.sizes == self._shape for part in self._parts):
            yield from ((part.target, elements.view(self._shape)) for part in self._parts)
            return
        first, at = start // self._item, 0
        stop = start + elements.nbytes
        parts = [part for part in self._parts if part.start < stop and start < part.stop]
        for run in boxes_of_run(self._shape, first, first + len(elements)):
            source = elements[at : at + run.numel].view(run.sizes)
            at += run.numel
            for part in parts:
                if shared := intersect(run, part.box):
                    destination = part.target[shared.relative_to(part.box.offsets).slices]
                    yield destination, source[shared.relative_to(run.offsets).slices]

    def close(self) -> None:
        """Hand the tensors back to the planner, at once or with the rest of their batch."""
        if self._slot is not None:
            self._slot.batch.filled()
        else:
            self.commit()

    def commit(self) -> None:
        """Hand the tensors back to the planner."""
        for part in self._parts:
            part.destination.commit()


def _takes_batches(target: Tensor, device: torch.device) -> bool:
    """Return whether a tensor may be filled in a batch on a device, which applies no lazy conjugation or negation."""
    return on_accelerator(device) and target.device == device and not target.is_conj() and not target.is_neg()
