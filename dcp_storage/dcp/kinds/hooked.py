"""Values with DCP's three hooks: types from any library, and `LocalShardsWrapper`."""

from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from dcp_storage.dcp.kinds.base import Kind, check_plain
from dcp_storage.dcp.kinds.boxes import box_item, chunk_box, item_box, reach
from dcp_storage.dcp.kinds.plain import Plain
from dcp_storage.dcp.undocumented import LocalShardsWrapper
from dcp_storage.errors import CoverageError
from dcp_storage.geometry import Box, Shape

_HOOKS = ("__create_write_items__", "__create_chunk_list__", "__get_tensor_shard__")


def has_hooks(value: Any) -> bool:
    """Return whether a value has any of DCP's hooks, on its type or on itself."""
    return any(hasattr(value, hook) for hook in _HOOKS)


class Hooked(Kind):
    """A value with some of DCP's hooks, whose results are checked; without a hook it is treated as plain."""

    @staticmethod
    def takes(value: Any) -> bool:
        """Take a value with hooks."""
        return has_hooks(value)

    def write_items(self) -> list[WriteItem]:
        """Return the items that the value's hook returns.

        Raises:
            CoverageError: The hook did not return items of this entry.
            UnsupportedTensor: The hook failed.
        """
        hook = "__create_write_items__"
        if not hasattr(self.value, hook):
            return Plain(self.fqn, self.value).write_items()
        items: list[WriteItem] = self.ask(hook, self.fqn, self.value)
        fault = self._fault(items)
        if fault:
            raise CoverageError(f"{self.fqn}: {type(self.value).__name__}.{hook} returned {fault}", fqn=self.fqn)
        return items

    def _fault(self, items: Any) -> str | None:
        try:
            for item in items:
                if item.index.fqn != self.fqn:
                    return f"an item of {item.index.fqn!r}"
                if item.tensor_data is not None:
                    item_box(item)
        except (AttributeError, TypeError, ValueError) as error:
            return f"{items!r}: {error}"
        return None

    def boxes(self) -> list[Box]:
        """Return the chunks that the value's hook returns.

        Raises:
            CoverageError: They are not chunks.
            UnsupportedTensor: The hook failed.
        """
        hook = "__create_chunk_list__"
        if not hasattr(self.value, hook):
            return Plain(self.fqn, self.value).boxes()
        chunks = self.ask(hook)
        try:
            return [chunk_box(chunk) for chunk in chunks]
        except (AttributeError, TypeError, ValueError) as error:
            raise CoverageError(
                f"{self.fqn}: {type(self.value).__name__}.{hook} returned {chunks!r}, which are not chunks: {error}",
                fqn=self.fqn,
            ) from error

    def shard(self, index: MetadataIndex) -> Tensor:
        """Return the tensor that the value's hook finds.

        Raises:
            CoverageError: The hook did not return a tensor.
            UnsupportedTensor: The hook failed.
        """
        hook = "__get_tensor_shard__"
        if not hasattr(self.value, hook):
            return Plain(self.fqn, self.value).shard(index)
        found = self.ask(hook, index)
        if not isinstance(found, Tensor):
            kind = type(self.value).__name__
            raise CoverageError(f"{self.fqn}: {kind}.{hook} returned {found!r}, which is not a tensor", fqn=self.fqn)
        return found

    def materialized(self) -> Any:
        """Return a value of the same type with memory.

        Raises:
            UnsupportedTensor: The type cannot be created this way.
        """
        made = super().materialized()
        if type(made) is not type(self.value):
            raise self.no_memory()
        return made


class Wrapper(Hooked):
    """A bare `LocalShardsWrapper`: it knows its own shards but no global shape.

    A save uses the extent of its shards as the shape, and the largest of all ranks is the tensor's.
    """

    @staticmethod
    def takes(value: Any) -> bool:
        """Take a wrapper."""
        return isinstance(value, LocalShardsWrapper)

    @property
    def shape(self) -> Shape | None:
        """Unknown."""
        return None

    def write_items(self) -> list[WriteItem]:
        """Return an item for each shard.

        Raises:
            UnsupportedTensor: A shard is not plain strided memory.
        """
        for shard in self.value.local_shards():
            check_plain(self.fqn, shard)
        items = super().write_items()
        boxes = [item_box(item) for item in items]
        dtypes = [item.tensor_data.properties.dtype for item in items if item.tensor_data]
        return [box_item(self.fqn, box, reach(boxes), dtype) for box, dtype in zip(boxes, dtypes, strict=True)]

    def materialized(self) -> Any:
        """Return a wrapper whose shards have memory.

        Raises:
            UnsupportedTensor: The memory of one cannot be allocated.
        """
        shards = self.value.local_shards()
        filled = [Plain(self.fqn, shard).materialized() for shard in shards]
        if all(new is old for new, old in zip(filled, shards, strict=True)):
            return self.value
        return LocalShardsWrapper(filled, [tuple(at) for at in self.value.local_offsets()])
