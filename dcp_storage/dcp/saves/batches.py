"""Sources of small tensors of an accelerator, which are copied to the host together."""

import threading

import torch
from torch import Tensor

from dcp_storage.dcp.device import copying_from, host_memory
from dcp_storage.dcp.memory import byte_view
from dcp_storage.dcp.saves.sources import TensorSource
from dcp_storage.dcp.small import BATCH_BYTES, aligned, gather, is_small
from dcp_storage.errors import UnsupportedTensor
from dcp_storage.raw import Raw
from dcp_storage.transfer.save import Source


class Batches:
    """Puts small tensors into batches in the order of the plan, which is mostly that of their reads."""

    def __init__(self) -> None:
        self._batches: dict[torch.device, _Batch] = {}

    def source(self, source: TensorSource) -> Source:
        """Return the source, or one that reads the same bytes from a batch where its tensor is small."""
        tensor = source.tensor
        if not is_small(tensor):
            return source
        batch = self._batches.get(tensor.device)
        if batch is None or batch.nbytes + source.nbytes > BATCH_BYTES:
            batch = self._batches[tensor.device] = _Batch(source.fqn)
        return _BatchedSource(batch, batch.add(tensor), source.nbytes, source.planes)


class _BatchedSource:
    def __init__(self, batch: "_Batch", offset: int, nbytes: int, planes: int) -> None:
        self._batch = batch
        self._offset = offset
        self.nbytes = nbytes
        self.planes = planes

    def read(self, start: int, stop: int) -> Raw:
        return self._batch.read(self._offset + start, self._offset + stop)


class _Batch:
    """Tensors of one device. Their copy is made when the first of them is read, and dropped when all of them were."""

    def __init__(self, fqn: str) -> None:
        self.nbytes = 0
        self._fqn = fqn
        self._tensors: list[Tensor] = []
        self._unread = 0
        self._host: Tensor | None = None
        self._lock = threading.Lock()

    def add(self, tensor: Tensor) -> int:
        """Return where in the batch a tensor begins."""
        offset = self.nbytes
        self._tensors.append(tensor)
        self.nbytes += aligned(tensor.nbytes)
        return offset

    def read(self, start: int, stop: int) -> Raw:
        """Return bytes of the batch in host memory.

        Raises:
            UnsupportedTensor: Torch could not copy them.
        """
        with self._lock:
            if self._host is None:
                self._host = self._copied()
                self._unread = sum(tensor.nbytes for tensor in self._tensors)
            found = byte_view(self._host[start:stop])
            self._unread -= stop - start
            if self._unread <= 0:
                self._host = None
        return found

    def _copied(self) -> Tensor:
        device = self._tensors[0].device
        out = host_memory(self.nbytes, torch.uint8, device)
        try:
            with copying_from(device) as non_blocking:
                gather(self._tensors, out, non_blocking=non_blocking)
        except RuntimeError as error:
            raise UnsupportedTensor(
                f"{self._fqn} and {len(self._tensors) - 1} more could not be copied to the host: {error}", fqn=self._fqn
            ) from error
        return out
