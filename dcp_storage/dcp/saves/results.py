"""What a rank tells the coordinator of what it wrote."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from torch.distributed.checkpoint.metadata import MetadataIndex

from dcp_storage.config import Codec
from dcp_storage.dcp.replicas.compare import Fingerprints
from dcp_storage.format.manifest.columns import Columns, numbers


class Items(NamedTuple):
    """What tells items apart: a row for each, of arrays of `int64`.

    Attributes:
        dims: How many offsets each has; 0 for entries that are not tensors.
        offsets: Where each begins in its tensor, all of them one after another.
        nbytes: Their raw sizes.
    """

    dims: Any
    offsets: Any
    nbytes: Any

    def table(self, dims: int) -> Any:
        """Return the offsets as a table of so many columns; what an item has not is -1."""
        table = np.full((len(self.dims), dims), -1, np.int64)
        table[np.arange(dims) < self.dims[:, None]] = self.offsets
        return table


def items_of(offsets: Sequence[Sequence[int]], nbytes: Iterable[int]) -> Items:
    """Return the rows of items by their offsets and raw sizes."""
    return Items(numbers(map(len, offsets)), numbers(chain.from_iterable(offsets)), numbers(nbytes))


@dataclass(frozen=True)
class Results:
    """What a rank wrote. DCP hands it to the coordinator's `finish` as it is.

    Attributes:
        names: The fully qualified name of each item.
        items: Which part of it each is.
        objects: The names of this rank's data objects, by their numbers.
        stored: Where the items lie in them.
        codec: How they are encoded.
        seconds: How long that took.
        fingerprints: What it tells of the items that others hold, too.
    """

    names: Sequence[str]
    items: Items
    objects: Sequence[str]
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
