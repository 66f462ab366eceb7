"""Finds what several ranks on a machine read: the disk should read it once, and the page cache serve the rest."""

import socket
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from xxhash import xxh3_64_intdigest

from dcp_storage.dcp.kinds.boxes import read_box
from dcp_storage.dcp.metadata import find_chunk
from dcp_storage.format.contents import Contents
from dcp_storage.format.dtypes import ITEM_BYTES
from dcp_storage.format.manifest.items import TensorEntry
from dcp_storage.format.manifest.manifest import Manifest
from dcp_storage.geometry import flat_extent

_MASK = (1 << 64) - 1


class Wanted(NamedTuple):
    """A rank's report to the coordinator on its plan.

    Attributes:
        identity: The save whose manifest it read.
        host: The machine that it runs on.
        reads: A hash of what each item reads; a collision only costs speed.
    """

    identity: Any
    host: str
    reads: NDArray[np.uint64]


def wanted_of(plan: LoadPlan, contents: Contents) -> Wanted:
    """Return a rank's report on its plan.

    Raises:
        CoverageError: The plan reads something that is not in the checkpoint.
    """
    # Stock checkpoints are read through the page cache anyway.
    compares = isinstance(contents, Manifest) and dist.is_initialized() and dist.get_world_size() > 1
    hashes = [_hash(contents, read) for read in plan.items] if compares else []  # type: ignore[arg-type]
    return Wanted(contents.identity, socket.gethostname(), np.array(hashes, np.uint64))


def mark_shared(plans: Sequence[LoadPlan]) -> list[LoadPlan]:
    """Return the plans, with a mark for each item: whether another rank on the same machine reads the same."""
    by_host: defaultdict[str, list[NDArray[np.uint64]]] = defaultdict(list)
    for plan in plans:
        by_host[plan.storage_data.host].append(plan.storage_data.reads)
    shared = {host: _common(reads) for host, reads in by_host.items()}
    return [
        replace(plan, storage_data=_among(plan.storage_data.reads, shared[plan.storage_data.host])) for plan in plans
    ]


def shared_items(plan: LoadPlan) -> Iterable[bool]:
    """Return whether each item of a marked plan is shared; if the planner changed the plan, none is."""
    marks = plan.storage_data
    if isinstance(marks, np.ndarray) and len(marks) == len(plan.items):
        return list(map(bool, marks))
    return [False] * len(plan.items)


def _hash(manifest: Manifest, read: ReadItem) -> int:
    """Return a hash of the first and the last block that an item reads, which is the same on all ranks.

    Python randomizes the hashes of strings, but not those of integers.
    """
    fqn = read.storage_index.fqn
    blocks = _blocks(manifest, manifest.tensors[fqn], read) if fqn in manifest.tensors else (0, 0, 0)
    return xxh3_64_intdigest(fqn.encode(errors="surrogatepass"), seed=hash(blocks) & _MASK)


def _blocks(manifest: Manifest, tensor: TensorEntry, read: ReadItem) -> tuple[int, int, int]:
    """Return the number of a chunk and of the first and the last block of it that an item reads."""
    number = find_chunk(read.storage_index, tensor.boxes)
    start, stop = flat_extent(tensor.boxes[number].sizes, read_box(read))
    item, block = ITEM_BYTES[tensor.dtype], manifest.codec.block_bytes
    return number, start * item // block, (stop - 1) * item // block


def _common(reads: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Return the hashes that more than one rank has."""
    ordered = np.sort(np.concatenate([_distinct(each) for each in reads]))
    return _distinct(ordered[1:][ordered[1:] == ordered[:-1]])


def _distinct(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the distinct hashes, ascending (`numpy.unique` imports a module when it is first called)."""
    ordered = np.sort(hashes)
    return np.concatenate([ordered[:1], ordered[1:][ordered[1:] != ordered[:-1]]])


def _among(hashes: NDArray[np.uint64], ordered: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return for each hash whether it is one of some others, which are ascending."""
    return np.searchsorted(ordered, hashes, "right") > np.searchsorted(ordered, hashes, "left")
