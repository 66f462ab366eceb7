"""The fingerprints of one rank."""

from collections.abc import Iterable

import numpy as np
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from dcp_storage.collector import gc_paused
from dcp_storage.dcp.kinds.boxes import item_box
from dcp_storage.dcp.replicas.compare import Fingerprints, ReplicaPolicy, item_key
from dcp_storage.dcp.replicas.objects import object_digest
from dcp_storage.dcp.replicas.tensors import tensor_digest
from dcp_storage.geometry import Box

Place = tuple[str, Box | None]


def item_place(item: WriteItem) -> Place:
    """Return the name of an item, and its box if it belongs to a tensor."""
    return item.index.fqn, item_box(item) if item.tensor_data else None


@gc_paused
def fingerprint(policy: ReplicaPolicy, items: Iterable[WriteItem], planner: DefaultSavePlanner) -> Fingerprints:
    """Return the fingerprints of items that a planner holds."""
    keys, digests = [], []
    for item in items:
        fqn, box = item_place(item)
        if box is not None and not box.numel:
            continue
        key = item_key(fqn, box)
        keys.append(key)
        digests.append(_digest(key, item, planner))
    return Fingerprints(policy, np.array(keys, np.uint64), np.array(digests, np.uint64))


def _digest(key: int, item: WriteItem, planner: DefaultSavePlanner) -> int:
    if item.tensor_data is None:
        return object_digest(planner.lookup_object(item.index))
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor), "tensor items resolve to tensors"
    return tensor_digest(key, tensor)
