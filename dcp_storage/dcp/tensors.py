"""Tensors as the pipelines see them: sources of bytes, and targets for bytes."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from dcp_storage.config import Codec
from dcp_storage.dcp.device import copying_from, host_memory
from dcp_storage.dcp.dtypes import dtype_name, planes_of
from dcp_storage.dcp.hand_over import hand_over
from dcp_storage.dcp.kinds.base import check_plain, dispatches
from dcp_storage.dcp.undocumented import is_zero_tensor
from dcp_storage.errors import CoverageError, UnsupportedFormat, UnsupportedTensor
from dcp_storage.geometry import Box, Shape, boxes_of_run, flat_extent, intersect
from dcp_storage.raw import Raw


class BytesSource:
    """The bytes of an entry that is not a tensor."""

    planes = 1

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.nbytes = len(data)

    def read(self, start: int, stop: int) -> Raw:
        """Return a view of a slice."""
        return memoryview(self._data)[start:stop]


class TensorSource:
    """The row-major bytes of a tensor, whatever its device and strides.

    Contiguous CPU tensors are read where they lie; of any other only the slice in hand is copied.

    Raises:
        UnsupportedTensor: It is sparse, on the meta device, or a subclass that is not plain memory.
    """

    def __init__(self, tensor: Tensor, fqn: str, codec: Codec) -> None:
        check_plain(fqn, tensor)
        self._tensor = tensor.detach().as_subclass(Tensor)
        self._memory = borrowed_view(self._tensor) if tensor.device.type == "cpu" and as_it_lies(tensor) else None
        self._fqn = fqn
        self._item = tensor.element_size()
        self.nbytes = tensor.numel() * self._item
        self.planes = planes_of(dtype_name(tensor.dtype, fqn), codec)

    def read(self, start: int, stop: int) -> Raw:
        """Return bytes `start` to `stop`, which are on element boundaries, in host memory.

        Raises:
            UnsupportedTensor: Torch cannot copy it, as some bits of some dtypes.
        """
        if self._memory is not None:
            return self._memory[start:stop]
        try:
            return byte_view(self._copied(start // self._item, stop // self._item))
        except RuntimeError as error:
            raise UnsupportedTensor(f"{self._fqn} could not be copied to the host: {error}", fqn=self._fqn) from error

    def _copied(self, start: int, stop: int) -> Tensor:
        tensor = self._tensor
        out = host_memory(stop - start, tensor.dtype, tensor.device)
        with copying_from(tensor.device) as non_blocking:
            if as_it_lies(tensor):
                return out.copy_(tensor.view(-1)[start:stop], non_blocking=non_blocking)
            filled = 0
            for box in boxes_of_run(tuple(tensor.shape), start, stop):
                out[filled : filled + box.numel].view(box.sizes).copy_(tensor[box.slices], non_blocking=non_blocking)
                filled += box.numel
        return out


def as_it_lies(tensor: Tensor) -> bool:
    """Tell whether a tensor's memory holds its elements, in row-major order."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg() and not is_zero_tensor(tensor)


def borrowed_view(elements: Tensor) -> memoryview:
    """Return the same for a tensor that the caller keeps alive: much faster, where there are many."""
    nbytes = elements.numel() * elements.element_size()
    return (
        memoryview((ctypes.c_char * nbytes).from_address(elements.data_ptr())).cast("B") if nbytes else memoryview(b"")
    )


def byte_view(elements: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor of any dtype as bytes."""
    # Not view(-1): a dimension of one element may have any stride.
    flat = elements.detach().as_strided((elements.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy().data)


class BytesTarget:
    """Collects a whole entry that is not a tensor, and gives it to the planner."""

    def __init__(self, read: ReadItem, nbytes: int, planner: LoadPlanner) -> None:
        self._read = read
        self._planner = planner
        self._nbytes = nbytes
        self._data = memoryview(b"")

    def open(self) -> None:
        """Allocate; the size was validated against the number of stored blocks.

        Raises:
            UnsupportedFormat: This machine has no memory for it.
        """
        try:
            self._data = memoryview(bytearray(self._nbytes))
        except MemoryError as error:
            fqn = self._read.storage_index.fqn
            raise UnsupportedFormat(f"{fqn} is an entry of {self._nbytes} bytes: no memory for it", fqn=fqn) from error

    def direct(self, start: int, stop: int) -> memoryview | None:
        """Return the slice's memory."""
        return self._data[start:stop]

    def window(self, size: int) -> memoryview:
        """Never needed: every slice is direct."""
        raise NotImplementedError

    def scatter(self, start: int, raw: memoryview) -> None:
        """Never needed either."""
        raise NotImplementedError

    def close(self) -> None:
        """Let the planner make an object of the bytes."""
        hand_over(self._planner, self._read, self._data)


class _Part(NamedTuple):
    """One read of a chunk: which box of it goes where."""

    read: ReadItem
    box: Box
    tensor: Tensor  # what the planner gave
    target: Tensor  # what the blocks are decoded into: the same, if it is plain memory
    start: int  # the bytes of the chunk between the box's first and last element
    stop: int
    memory: memoryview | None  # of the destination, where it is laid out as the chunk is


class ChunkTarget:
    """The destinations of all reads of one stored chunk, so that each of its blocks is decoded once for all of them.

    A destination with operations of its own is filled by its `copy_`, once all of its box is there.

    Raises (in `open`):
        CoverageError: The planner resolved a read to a tensor of another shape than the read's.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, reads: Sequence[ReadItem], planner: LoadPlanner) -> None:
        self._shape = shape
        self._dtype = dtype
        self._item = dtype.itemsize
        self._reads = reads
        self._planner = planner
        self._parts: list[_Part] = []

    def open(self) -> None:
        """Resolve the destinations."""
        self._parts = [self._resolve(read) for read in self._reads]

    def _resolve(self, read: ReadItem) -> _Part:
        box = read_box(read)
        tensor = self._planner.resolve_tensor(read).detach()
        if tuple(tensor.shape) != box.sizes:
            raise CoverageError(
                f"{read.dest_index.fqn}: the planner gave a tensor of shape {list(tensor.shape)} to read {box} into",
                fqn=read.dest_index.fqn,
            )
        target = torch.empty(box.sizes, dtype=self._dtype, device="cpu") if dispatches(tensor) else tensor
        start, stop = flat_extent(self._shape, box)
        plain = target.device.type == "cpu" and target.dtype == self._dtype and as_it_lies(target)
        memory = byte_view(target) if plain and stop - start == box.numel else None
        return _Part(read, box, tensor, target, start * self._item, stop * self._item, memory)

    def direct(self, start: int, stop: int) -> memoryview | None:
        """Return the destination's memory where exactly one read wants all of this slice, as it lies in the chunk."""
        touched = [part for part in self._parts if part.start < stop and start < part.stop]
        if len(touched) != 1:
            return None
        [part] = touched
        if part.memory is None or start < part.start or stop > part.stop:
            return None
        return part.memory[start - part.start : stop - part.start]

    def window(self, size: int) -> memoryview:
        """Return memory to scatter from: near the first destination, as most have one only."""
        return byte_view(host_memory(size, torch.uint8, self._parts[0].target.device))

    @torch.inference_mode()  # destinations that were made in it take writes in it only
    def scatter(self, start: int, raw: memoryview) -> None:
        """Copy the slice's elements to every destination that wants them, converting dtype and device."""
        elements = torch.frombuffer(raw, dtype=torch.uint8).view(self._dtype)
        first, at = start // self._item, 0
        parts = [part for part in self._parts if part.start < start + len(raw) and start < part.stop]
        for run in boxes_of_run(self._shape, first, first + len(elements)):
            source = elements[at : at + run.numel].view(run.sizes)
            at += run.numel
            for part in parts:
                if shared := intersect(run, part.box):
                    destination = part.target[shared.relative_to(part.box.offsets).slices]
                    destination.copy_(source[shared.relative_to(run.offsets).slices])

    def close(self) -> None:
        """Hand the tensors back to the planner."""
        for part in self._parts:
            if part.target is not part.tensor:
                part.tensor.copy_(part.target)
            self._planner.commit_tensor(part.read, part.tensor)


def read_box(read: ReadItem) -> Box:
    """Return the box of the stored chunk that a read wants."""
    return Box(tuple(read.storage_offsets), tuple(read.lengths))
