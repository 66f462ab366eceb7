"""Finds chunks that several ranks on a machine read: the disk should read them once, the page cache serve the rest."""

import socket
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from xxhash import xxh3_64_intdigest


class Wanted(NamedTuple):
    """A rank's report to the coordinator on its plan.

    Attributes:
        identity: The save whose manifest it read.
        host: The machine that it runs on.
        chunks: A hash of the stored chunk of each item; a collision only costs speed.
    """

    identity: Any
    host: str
    chunks: NDArray[np.uint64]


def wanted_of(plan: LoadPlan, identity: Any) -> Wanted:
    """Return a rank's report on its plan."""
    return Wanted(identity, socket.gethostname(), np.fromiter(map(_number, plan.items), np.uint64, len(plan.items)))


def mark_shared(plans: Sequence[LoadPlan]) -> list[LoadPlan]:
    """Return the plans, with a mark for each item: whether other ranks on the same machine read its chunk too."""
    by_host: defaultdict[str, list[NDArray[np.uint64]]] = defaultdict(list)
    for plan in plans:
        by_host[plan.storage_data.host].append(plan.storage_data.chunks)
    shared = {host: _common(chunks) for host, chunks in by_host.items()}
    return [
        replace(plan, storage_data=np.isin(plan.storage_data.chunks, shared[plan.storage_data.host])) for plan in plans
    ]


def shared_items(plan: LoadPlan) -> Iterable[bool]:
    """Return for each item of a marked plan whether its chunk is shared; if the planner changed the plan, none is."""
    marks = plan.storage_data
    if isinstance(marks, np.ndarray) and len(marks) == len(plan.items):
        return list(map(bool, marks))
    return [False] * len(plan.items)


def _number(read: ReadItem) -> int:
    index = read.storage_index
    return xxh3_64_intdigest(index.fqn.encode(errors="surrogatepass"), seed=index.index or 0)


def _common(chunks: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Return the hashes that more than one rank has."""
    numbers, counts = np.unique(np.concatenate([np.unique(each) for each in chunks]), return_counts=True)
    return numbers[counts > 1]
