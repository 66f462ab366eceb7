"""`Kind`: what the planners and the stager ask of a tensor, whatever its type. A new kind is one new class of these."""

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
    """A box of the global tensor, and the memory that holds it."""

    box: Box
    memory: Tensor


class Kind(ABC):
    """One value of a state dict, as a part of a global tensor.

    A kind that knows its parts gives them; one that has only hooks overrides what is made of the parts here.

    Attributes:
        is_whole: Whether the value is all of its tensor, and itself the memory to read and write.
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
        """Return what this rank holds, in the order of its shards.

        Raises:
            CoverageError: The value contradicts itself.
            UnsupportedTensor: It is of a kind that cannot be told or held.
        """
        raise NotImplementedError

    @property
    def shape(self) -> Shape | None:
        """The shape of the global tensor, or `None` where this rank cannot know it."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the elements."""
        dtype: torch.dtype = self.value.dtype
        return dtype

    def write_items(self) -> list[WriteItem]:
        """Return what this rank would write.

        Raises:
            CoverageError: The value contradicts itself.
            UnsupportedTensor: It cannot be stored.
        """
        parts = self.parts()
        for part in parts:
            check_plain(self.fqn, part.memory)
        return [box_item(self.fqn, part.box, self.shape or (), self.dtype) for part in parts]

    def boxes(self) -> list[Box]:
        """Return the boxes that this rank wants read, in the order of its shards.

        Raises:
            CoverageError: The value contradicts itself.
            UnsupportedTensor: It is of a kind that cannot be told or held.
        """
        return [part.box for part in self.parts()]

    def shard(self, index: MetadataIndex) -> Tensor:
        """Return the memory of one of this rank's boxes.

        The index's hint is the box's place among those of this rank: with it, shards that share an offset are told
        apart. Without an offset it means the only one.

        Raises:
            CoverageError: There is none.
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
        raise CoverageError(f"{self.fqn}: this rank holds no shard that begins at {list(wanted)}", fqn=self.fqn)

    def materialized(self) -> Any:
        """Return a value like this one with memory where it has none, on the device of the process group, else itself.

        Raises:
            UnsupportedTensor: It is of a type whose memory only its own code can make.
        """
        if self.value.device.type != "meta":
            return self.value
        try:
            made = torch.empty_like(self.value, device=group_device(), requires_grad=False)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise self.no_memory() from error
        # Attributes make a plain tensor a shard, or give it the hooks of one.
        made.__dict__.update(self.value.__dict__)
        return made

    def no_memory(self) -> UnsupportedTensor:
        """Return the error that asks the user to make the memory."""
        kind = type(self.value).__name__
        return UnsupportedTensor(
            f"{self.fqn} is a {kind} on the meta device: give it memory before the load", fqn=self.fqn
        )

    def ask(self, hook: str, *arguments: Any) -> Any:
        """Call a hook of the value's own.

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
    """Return whether a tensor's type overrides torch's operations: its memory may then not be what it looks like."""
    # The attribute is the same object for every class that leaves dispatch to torch, Parameter among them.
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def check_plain(fqn: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not plain strided memory.

    Raises:
        UnsupportedTensor: It is sparse, quantized, on the meta device, or a subclass with operations of its own.
    """
    if tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized or dispatches(tensor)):
        return
    kind = f"{type(tensor).__name__} of layout {tensor.layout} on device {tensor.device}"
    raise UnsupportedTensor(
        f"{fqn} is a {kind}; what is stored must be plain strided memory: save its parts as tensors", fqn=fqn
    )
