"""Sources: the bytes of tensors and of other entries, as the save pipeline reads them."""

from torch import Tensor

from dcp_storage.config import Codec
from dcp_storage.dcp.device import copy_to_host, copying_from, host_memory, on_host
from dcp_storage.dcp.dtypes import dtype_name, planes_of
from dcp_storage.dcp.kinds.base import check_plain
from dcp_storage.dcp.memory import as_it_lies, borrowed_view, byte_view
from dcp_storage.errors import UnsupportedTensor
from dcp_storage.geometry import boxes_of_run
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

    Contiguous CPU tensors are read in place; of any other only the requested slice is copied.

    Raises:
        UnsupportedTensor: It is sparse, on the meta device, or a subclass that is not plain memory.
    """

    def __init__(self, tensor: Tensor, fqn: str, codec: Codec) -> None:
        check_plain(fqn, tensor)
        self.tensor = tensor.detach().as_subclass(Tensor)
        self._memory = borrowed_view(self.tensor) if on_host(tensor.device) and as_it_lies(tensor) else None
        self.fqn = fqn
        self._item = tensor.element_size()
        self.nbytes = tensor.numel() * self._item
        self.planes = planes_of(dtype_name(tensor.dtype, fqn), codec)

    def read(self, start: int, stop: int) -> Raw:
        """Return bytes `start` to `stop`, which are on element boundaries, in host memory.

        Raises:
            UnsupportedTensor: Torch cannot copy it, which is the case for some dtypes.
        """
        if self._memory is not None:
            return self._memory[start:stop]
        try:
            return byte_view(self._copied(start // self._item, stop // self._item))
        except RuntimeError as error:
            raise UnsupportedTensor(f"{self.fqn} could not be copied to the host: {error}", fqn=self.fqn) from error

    def _copied(self, start: int, stop: int) -> Tensor:
        tensor = self.tensor
        out = host_memory(stop - start, tensor.dtype, tensor.device)
        with copying_from(tensor.device) as non_blocking:
            if as_it_lies(tensor):
                copy_to_host(tensor.view(-1)[start:stop], out, non_blocking=non_blocking)
                return out
            filled = 0
            for box in boxes_of_run(tuple(tensor.shape), start, stop):
                target = out[filled : filled + box.numel].view(box.sizes)
                copy_to_host(tensor[box.slices], target, non_blocking=non_blocking)
                filled += box.numel
        return out
