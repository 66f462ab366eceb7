"""Entries that are not tensors, encoded as the stored bytes."""

import io
import pickletools
import warnings
from collections.abc import Mapping

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from dcp_storage.dcp.kinds.plain import SHARD_ATTRIBUTES
from dcp_storage.dcp.pickles.asked import asks_for
from dcp_storage.dcp.pickles.trust import Trust
from dcp_storage.dcp.planners.save_planner import ShardedSavePlanner
from dcp_storage.errors import DcpStorageError, UnsupportedEntry, UnsupportedTensor
from dcp_storage.format.container import read_container
from dcp_storage.format.values import encode_value

_SHARDS = ("DTensor", "ShardedTensor", "LocalShardsWrapper", "StagedTensor")
"""Types whose instances are one rank's part of a tensor."""


def encode_entry(item: WriteItem, planner: SavePlanner) -> tuple[bytes, list[str]]:
    """Return the bytes of an entry, and the names of the types that must be trusted to load it.

    A value of built-in types is stored as such if the planner would have pickled it unchanged; the bytes of other
    planners are stored as they are.

    Raises:
        UnsupportedEntry: It cannot be pickled.
        UnsupportedTensor: It contains a part of a distributed tensor.
    """
    if _pickles_as_it_is(type(planner)):
        assert isinstance(planner, DefaultSavePlanner)
        encoded = encode_value(planner.lookup_object(item.index))
        if encoded is not None:
            return encoded, []
    data = _resolve(item, planner)
    try:
        pickled = read_container(data).pickled
    except ValueError:  # the format of another planner
        return data, []
    _refuse_shards(item.index.fqn, pickled)
    return data, asks_for(pickled, Trust(()))


def _pickles_as_it_is(kind: type[SavePlanner]) -> bool:
    return (
        issubclass(kind, DefaultSavePlanner)
        and kind.resolve_data in {DefaultSavePlanner.resolve_data, ShardedSavePlanner.resolve_data}
        and kind.transform_object is DefaultSavePlanner.transform_object
    )


def _resolve(item: WriteItem, planner: SavePlanner) -> bytes:
    fqn = item.index.fqn
    try:
        data = planner.resolve_data(item)
    except DcpStorageError:
        raise
    except Exception as error:  # what is pickled runs its own code
        raise UnsupportedEntry(
            f"{fqn} cannot be pickled: {error}. Leave it out of the state dict, or store what it can be rebuilt from",
            fqn=fqn,
        ) from error
    assert isinstance(data, io.BytesIO), "DCP's planners resolve tensor items to tensors and others to BytesIO"
    return data.getvalue()


def _refuse_shards(fqn: str, pickled: bytes) -> None:
    """Refuse a part of a distributed tensor: that of one rank would become that of every rank.

    Raises:
        UnsupportedTensor: The entry contains one, in a tuple or another object.
    """
    if not any(name.encode() in pickled for name in (*_SHARDS, SHARD_ATTRIBUTES[0])):  # nearly always
        return
    words = {word for _, argument, _ in pickletools.genops(pickled) for word in str(argument).split()}
    held = sorted(words.intersection(_SHARDS))
    if held or words.issuperset(SHARD_ATTRIBUTES):
        kind = held[0] if held else "CheckpointableTensor"
        raise UnsupportedTensor(
            f"{fqn} is stored whole, from one rank, and contains a {kind} in a tuple or another object: put it in a "
            "dict or a list of the state dict, and keep flatten_state_dict=True",
            fqn=fqn,
        )


def warn_of_types(asked: Mapping[str, list[str]], most: int = 5) -> None:
    """Warn once about all entries of a save that can only be loaded if their types are listed."""
    entries = [f"{fqn} holds {', '.join(names)}" for fqn, names in asked.items() if names]
    types = list(dict.fromkeys(name for names in asked.values() for name in names))
    more = f"; and {len(entries) - most} more" if len(entries) > most else ""
    if entries:
        warnings.warn(
            f"{'; '.join(entries[:most])}{more}. To load them, list the types that you trust: "
            f"ShardedLoadPlanner(allowed_types=[{', '.join(types)}]). Or save their values in dicts and lists "
            "(vars(namespace), dataclasses.asdict(config)), which need no such list",
            stacklevel=2,
        )
