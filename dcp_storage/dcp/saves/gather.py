"""Sources of small tensors on an accelerator, which are copied to the host in batches."""

import threading

from torch import Tensor

from dcp_storage.dcp.device import copying_from, host_memory
from dcp_storage.dcp.memory import byte_view
from dcp_storage.dcp.saves.sources import TensorSource
from dcp_storage.dcp.small import BATCH_BYTES, Batchable, batchable, gather_to_host
from dcp_storage.errors import UnsupportedTensor
from dcp_storage.raw import Raw
from dcp_storage.transfer.save import Source


class Gather:
    """Puts small tensors into batches, in the order of the plan, which is mostly that of the reads."""

    def __init__(self) -> None:
        self._filling: dict[Batchable, _Batch] = {}

    def source(self, source: TensorSource) -> Source:
        """Return a source that reads from a batch if the tensor is small, else the given one."""
        which = batchable(source.tensor)
        if which is None:
            return source
        batch = self._filling.get(which)
        if batch is None or batch.nbytes + source.nbytes > BATCH_BYTES:
            batch = self._filling[which] = _Batch(source.fqn)
        return _GatheredSource(batch, batch.add(source.tensor), source.nbytes, source.planes)


class _GatheredSource:
    def __init__(self, batch: "_Batch", offset: int, nbytes: int, planes: int) -> None:
        self._batch = batch
        self._offset = offset
        self.nbytes = nbytes
        self.planes = planes

    def read(self, start: int, stop: int) -> Raw:
        return self._batch.read(self._offset + start, self._offset + stop)


class _Batch:
    """Tensors of one device, copied when the first is read; the copy is dropped when the last was read."""

    def __init__(self, fqn: str) -> None:
        self.nbytes = 0
        self._fqn = fqn
        self._tensors: list[Tensor] = []
        self._unread = 0
        self._copy: memoryview | None = None
        self._lock = threading.Lock()

    def add(self, tensor: Tensor) -> int:
        """Add a tensor, and return its offset in the batch."""
        offset = self.nbytes
        self._tensors.append(tensor)
        self.nbytes += tensor.nbytes
        return offset

    def read(self, start: int, stop: int) -> Raw:
        """Return bytes of the batch in host memory.

        Raises:
            UnsupportedTensor: Torch cannot copy them.
        """
        with self._lock:
            if self._copy is None:
                self._copy, self._unread = self._copied(), self.nbytes
            found = self._copy[start:stop]
            self._unread -= stop - start
            if self._unread <= 0:
                self._copy = None
        return found

    def _copied(self) -> memoryview:
        first = self._tensors[0]
        out = host_memory(self.nbytes // first.element_size(), first.dtype, first.device)
        try:
            with copying_from(first.device) as non_blocking:
                gather_to_host(self._tensors, out, non_blocking=non_blocking)
        except RuntimeError as error:
            says = f"{self._fqn}, or one of the {len(self._tensors)} tensors copied with it, could not be copied"
            raise UnsupportedTensor(f"{says} to the host: {error}", fqn=self._fqn) from error
        return byte_view(out)
