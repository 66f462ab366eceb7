"""A rank's report to the coordinator on what it wrote."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from torch.distributed.checkpoint.metadata import MetadataIndex

from dcp_storage.config import Codec
from dcp_storage.dcp.replicas.compare import Fingerprints
from dcp_storage.format.manifest.columns import Columns, numbers
from dcp_storage.format.names import ObjectName


class Items(NamedTuple):
    """The properties that identify items: `int64` arrays with a row for each.

    Attributes:
        dims: The number of offsets of each; 0 for entries that are not tensors.
        offsets: The offsets of each in its tensor, concatenated.
        nbytes: Their raw sizes.
    """

    dims: Any
    offsets: Any
    nbytes: Any

    def table(self, dims: int) -> Any:
        """Return the offsets as a table with `dims` columns, filled up with -1."""
        table = np.full((len(self.dims), dims), -1, np.int64)
        table[np.arange(dims) < self.dims[:, None]] = self.offsets
        return table


def items_of(offsets: Sequence[Sequence[int]], nbytes: Iterable[int]) -> Items:
    """Return the rows of items from their offsets and raw sizes."""
    return Items(numbers(map(len, offsets)), numbers(chain.from_iterable(offsets)), numbers(nbytes))


@dataclass(frozen=True)
class Results:
    """What a rank wrote. DCP passes it to the coordinator's `finish` unchanged.

    Attributes:
        names: The fully qualified name of each item.
        items: The part of its entry that each item is.
        objects: The names of this rank's data objects, by number.
        stored: Where the items are stored in them.
        codec: How they are encoded.
        seconds: How long that took.
        fingerprints: Those of the items that other ranks hold too.
    """

    names: Sequence[str]
    items: Items
    objects: Sequence[ObjectName]
    stored: Columns
    codec: Codec
    seconds: float = 0.0
    fingerprints: Fingerprints | None = None

    @property
    def nbytes(self) -> int:
        """Raw size of all items."""
        return int(self.items.nbytes.sum())


def index_items(indices: Sequence[MetadataIndex], nbytes: Iterable[int]) -> tuple[list[str], Items]:
    """Return the names and rows of a plan's items."""
    return [index.fqn for index in indices], items_of([index.offset or () for index in indices], nbytes)
