"""Entries that are no tensors: `torch.save` containers, read without running what a checkpoint names."""

import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from dcp_storage.dcp.kinds.plain import SHARD_ATTRIBUTES
from dcp_storage.errors import BlockCorrupt, UnsupportedFormat, UnsupportedTensor

Allowed = Sequence[Callable[..., Any] | tuple[Callable[..., Any], str]]


def load_entry(fqn: str, value: io.BytesIO, allowed: Allowed = ()) -> Any:
    """Return the object in a container, of types that `torch.load(weights_only=True)` knows or that are allowed.

    Raises:
        UnsupportedFormat: It holds another type; no code of it ran.
        BlockCorrupt: It is no container that `torch.save` makes.
    """
    _check_container(fqn, value)
    try:
        with torch.serialization.safe_globals(list(allowed)) if allowed else nullcontext():
            return torch.load(value, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsupportedFormat(
            f"{fqn} holds what is not loaded from an untrusted checkpoint: {_refused(value) or error}. If you trust "
            "it, list its types in ShardedLoadPlanner(allowed_types=...)",
            fqn=fqn,
        ) from error
    except Exception as error:  # torch.load raises what it comes upon in damaged bytes
        raise _damaged(fqn, f"torch.load cannot read it: {str(error).partition(chr(10))[0]:.200}") from error


_SHARDS = ("DTensor", "ShardedTensor", "LocalShardsWrapper", "StagedTensor")
"""Types whose instances hold one rank's part of a tensor."""


def refuse_shards(fqn: str, value: io.BytesIO) -> None:
    """Refuse a container that pickles a part of a distributed tensor: one rank's would become every rank's.

    Raises:
        UnsupportedTensor: It holds one, in a tuple or another object.
    """
    data = value.getvalue()
    if not any(name.encode() in data for name in (*_SHARDS, SHARD_ATTRIBUTES[0])):  # as in nearly all
        return
    with zipfile.ZipFile(value) as container:
        pickled = container.read(next(name for name in container.namelist() if name.endswith("/data.pkl")))
    words = {word for _, argument, _ in pickletools.genops(pickled) for word in str(argument).split()}
    held = sorted(words.intersection(_SHARDS))
    if held or words.issuperset(SHARD_ATTRIBUTES):
        kind = held[0] if held else "CheckpointableTensor"
        raise UnsupportedTensor(
            f"{fqn} is stored whole, as one rank has it, and holds a {kind} in a tuple or another object: put it in a "
            "dict or a list of the state dict, and keep flatten_state_dict=True",
            fqn=fqn,
        )


def hand_over(planner: LoadPlanner, read: ReadItem, value: io.BytesIO) -> None:
    """Give an entry to a planner; to one that would run any code in it, only after a load that runs none.

    DCP's default planner loads with `weights_only=False`. What the restricted load takes calls nothing else then.

    Raises:
        UnsupportedFormat: See `load_entry`.
        BlockCorrupt: See `load_entry`.
    """
    if getattr(type(planner), "load_bytes", None) is DefaultLoadPlanner.load_bytes:
        load_entry(read.dest_index.fqn, value)
        value.seek(0)
    planner.load_bytes(read, value)


def _check_container(fqn: str, value: io.BytesIO) -> None:
    """Refuse records that are not stored as they are: torch would inflate a compressed one to any size."""
    try:
        with zipfile.ZipFile(value) as container:
            records = container.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise _damaged(fqn, f"it is no container of torch.save: {error}") from error
    value.seek(0)
    if any(
        record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size for record in records
    ):
        raise _damaged(fqn, "it is no container that torch.save made")


def _damaged(fqn: str, says: str) -> BlockCorrupt:
    return BlockCorrupt(f"{fqn} is damaged: {says}. Restore its object, or load another checkpoint", fqn=fqn)


def _refused(value: io.BytesIO) -> str:
    """Return the names that the container asks for and may not, as far as they can be told."""
    value.seek(0)
    try:
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(value))
    except Exception:  # noqa: BLE001 - it was refused already; a hostile pickle need not let itself be listed
        return ""
