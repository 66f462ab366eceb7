"""`Kind`: the interface of tensors for the planners and the stager, whatever their type. A new kind is a new class."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from dcp_storage.dcp.kinds.boxes import box_item
from dcp_storage.dcp.undocumented import group_device
from dcp_storage.errors import CoverageError, DcpStorageError, UnsupportedTensor
from dcp_storage.geometry import Box, Shape


class LocalShard(NamedTuple):
    """A box of the global tensor, and the memory for it."""

    box: Box
    memory: Tensor


class Kind(ABC):
    """One value of a state dict, as a part of a global tensor.

    A kind that knows its parts implements `parts`; one that only has hooks overrides the methods that use it.

    Attributes:
        is_whole: Whether the value is its whole tensor, and is itself the memory to read and write.
    """

    is_whole = False

    def __init__(self, fqn: str, value: Any) -> None:
        self.fqn = fqn
        self.value = value

    @staticmethod
    @abstractmethod
    def takes(value: Any) -> bool:
        """Return whether a value is of this kind."""

    def parts(self) -> list[LocalShard]:
        """Return the parts on this rank, in the order of its shards.

        Raises:
            CoverageError: The value is inconsistent.
            UnsupportedTensor: Its kind is not supported.
        """
        raise NotImplementedError

    @property
    def shape(self) -> Shape | None:
        """The shape of the global tensor, or `None` if this rank cannot know it."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the elements."""
        dtype: torch.dtype = self.value.dtype
        return dtype

    def write_items(self) -> list[WriteItem]:
        """Return the items that this rank would write.

        Raises:
            CoverageError: The value is inconsistent.
            UnsupportedTensor: It cannot be stored.
        """
        parts = self.parts()
        for part in parts:
            check_plain(self.fqn, part.memory)
        return [box_item(self.fqn, part.box, self.shape or (), self.dtype) for part in parts]

    def boxes(self) -> list[Box]:
        """Return the boxes that this rank wants to read, in the order of its shards.

        Raises:
            CoverageError: The value is inconsistent.
            UnsupportedTensor: Its kind is not supported.
        """
        return [part.box for part in self.parts()]

    def shard(self, index: MetadataIndex) -> Tensor:
        """Return the memory of one of this rank's boxes.

        The index's hint is the position of the box among those of this rank; it distinguishes shards that share an
        offset. Without an offset the index means the only one.

        Raises:
            CoverageError: There is no such box.
            UnsupportedTensor: The value's own hook failed.
        """
        parts = self.parts()
        if index.offset is None and len(parts) == 1:
            return parts[0].memory
        wanted, place = tuple(index.offset or ()), index.index or 0
        if place < len(parts) and parts[place].box.offsets == wanted:
            return parts[place].memory
        for part in parts:
            if part.box.offsets == wanted:
                return part.memory
        raise CoverageError(f"{self.fqn}: this rank has no shard that begins at {list(wanted)}", fqn=self.fqn)

    def materialized(self) -> Any:
        """Return the value itself, or if it is on the meta device, one like it on the process group's device.

        Raises:
            UnsupportedTensor: Only the code of its type can allocate its memory.
        """
        if self.value.device.type != "meta":
            return self.value
        try:
            made = torch.empty_like(self.value, device=group_device(), requires_grad=False)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise self.no_memory() from error
        # Attributes may make a plain tensor a shard, or give it hooks.
        made.__dict__.update(self.value.__dict__)
        return made

    def no_memory(self) -> UnsupportedTensor:
        """Return the error that asks the user to allocate the memory."""
        kind = type(self.value).__name__
        return UnsupportedTensor(
            f"{self.fqn} is a {kind} on the meta device: allocate its memory before the load", fqn=self.fqn
        )

    def ask(self, hook: str, *arguments: Any) -> Any:
        """Call one of the value's own hooks.

        Raises:
            UnsupportedTensor: It failed.
        """
        try:
            return getattr(self.value, hook)(*arguments)
        except DcpStorageError:
            raise
        except Exception as error:
            kind = type(self.value).__name__
            raise UnsupportedTensor(f"{self.fqn}: {kind}.{hook} failed: {error!r}", fqn=self.fqn) from error


def dispatches(tensor: Tensor) -> bool:
    """Return whether a tensor's type overrides torch's operations: then its memory may not be what it appears to be."""
    # The attribute is the same object for every class that leaves dispatch to torch, including Parameter.
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def check_plain(fqn: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not plain strided memory.

    Raises:
        UnsupportedTensor: It is sparse, quantized, on the meta device, or a subclass that overrides operations.
    """
    if tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized or dispatches(tensor)):
        return
    advice = "materialize it before the save" if tensor.is_meta else "save its parts as tensors"
    kind = f"{type(tensor).__name__} of layout {tensor.layout} on device {tensor.device}"
    raise UnsupportedTensor(f"{fqn} is a {kind}; only plain strided memory can be stored: {advice}", fqn=fqn)
