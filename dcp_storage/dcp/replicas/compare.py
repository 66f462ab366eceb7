"""Compares the fingerprints of all ranks before the commit."""

import logging
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from xxhash import xxh3_64_intdigest

from dcp_storage.dcp.kinds.boxes import chunk_box
from dcp_storage.errors import ReplicaMismatch
from dcp_storage.geometry import Box

ReplicaPolicy = Literal["warn", "error", "trust"]

_MOST_NAMED = 5

logger = logging.getLogger(__name__)


class Fingerprints(NamedTuple):
    """A rank's fingerprints of the items that other ranks hold too.

    Attributes:
        policy: What to do if ranks differ.
        keys: The `item_key` of each item, as an array of `uint64`.
        digests: Their fingerprints, likewise.
    """

    policy: ReplicaPolicy
    keys: Any
    digests: Any


class Mismatch(NamedTuple):
    """An item that differs between ranks, and the groups of ranks that agree, each list ascending."""

    fqn: str
    box: Box | None
    ranks: list[list[int]]
    pickled: bool


def item_key(fqn: str, box: Box | None) -> int:
    """Return the key of an item: a 64-bit hash of its name and box."""
    return xxh3_64_intdigest(f"{fqn}\0{box and (box.offsets, box.sizes)}".encode("utf-8", "surrogatepass"))


def find_mismatches(fingerprints: Sequence[Fingerprints | None], metadata: Metadata) -> list[Mismatch]:
    """Return the items that differ between ranks, in the order of the state dict."""
    told = [(rank, prints) for rank, prints in enumerate(fingerprints) if prints is not None and len(prints.keys)]
    if not told:
        return []
    keys = np.concatenate([prints.keys for _, prints in told])
    digests = np.concatenate([prints.digests for _, prints in told])
    ranks = np.concatenate([np.full(len(prints.keys), rank) for rank, prints in told])
    order = np.lexsort((digests, keys))
    keys, digests, ranks = keys[order], digests[order], ranks[order]
    differ = set(keys[1:][(keys[1:] == keys[:-1]) & (digests[1:] != digests[:-1])].tolist())
    return _named(differ, keys, digests, ranks, metadata) if differ else []


def _named(differ: set[int], keys: Any, digests: Any, ranks: Any, metadata: Metadata) -> list[Mismatch]:
    found = []
    for fqn, entry in metadata.state_dict_metadata.items():
        boxes = [chunk_box(c) for c in entry.chunks] if isinstance(entry, TensorStorageMetadata) else [None]
        for box in boxes:
            key = item_key(fqn, box)
            if key in differ:
                held = slice(np.searchsorted(keys, np.uint64(key)), np.searchsorted(keys, np.uint64(key), "right"))
                groups: defaultdict[int, list[int]] = defaultdict(list)
                for digest, rank in zip(digests[held].tolist(), ranks[held].tolist(), strict=True):
                    groups[digest].append(rank)
                pickled = box is None and any(digest & 1 for digest in groups)
                found.append(Mismatch(fqn, box, sorted(map(sorted, groups.values())), pickled))
    return found


def report_mismatches(fingerprints: Sequence[Fingerprints | None], metadata: Metadata, where: str) -> None:
    """Report items that differ between ranks.

    Raises:
        ReplicaMismatch: There are some, and the policy of a rank is `"error"`.
    """
    mismatches = find_mismatches(fingerprints, metadata)
    if not mismatches:
        return
    if any(prints and prints.policy == "error" for prints in fingerprints):
        raise ReplicaMismatch(
            f"{where}: {_told(mismatches)}. Nothing was committed: {_ADVICE}",
            url=where,
            fqns=tuple(dict.fromkeys(mismatch.fqn for mismatch in mismatches)),
        )
    message = f"{where}: {_told(mismatches)}. One rank's copy was saved: {_ADVICE}"
    logger.warning(message)
    warnings.warn(message, stacklevel=2)


_ADVICE = "save per-rank data under a separate name for each rank (see the README), and find out why replicas differ"


def _told(mismatches: Sequence[Mismatch]) -> str:
    named = "; ".join(map(_one, mismatches[:_MOST_NAMED]))
    more = f"; and {len(mismatches) - _MOST_NAMED} more" if len(mismatches) > _MOST_NAMED else ""
    pickled = ". Objects are compared by their pickles, and equal ones may pickle differently"
    how = pickled if any(mismatch.pickled for mismatch in mismatches) else ""
    return f"ranks hold different data under one name: {named}{more}{how}"


def _one(mismatch: Mismatch) -> str:
    groups = " against ".join(f"rank{'s' * (len(ranks) > 1)} {_list(ranks)}" for ranks in mismatch.ranks[:_MOST_NAMED])
    more = f" against {len(mismatch.ranks) - _MOST_NAMED} more" if len(mismatch.ranks) > _MOST_NAMED else ""
    part = "" if mismatch.box is None or not any(mismatch.box.offsets) else f" at {list(mismatch.box.offsets)}"
    return f"{mismatch.fqn}{part} ({groups}{more})"


def _list(ranks: Sequence[int]) -> str:
    most = 8
    return ", ".join(map(str, ranks[:most])) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")
