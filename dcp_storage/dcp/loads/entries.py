"""Entries that are not tensors: built-in values, or `torch.save` containers read without running what they name."""

import io
from typing import Any, Literal

import torch

from dcp_storage.dcp.pickles.asked import asks_for
from dcp_storage.dcp.pickles.listed import Failed
from dcp_storage.dcp.pickles.machine import rebuild
from dcp_storage.dcp.pickles.storages import Storages
from dcp_storage.dcp.pickles.trust import Allowed, Trust
from dcp_storage.errors import BlockCorrupt, UnsupportedEntry
from dcp_storage.format.container import Container, read_container
from dcp_storage.format.pickles import Damaged, Refused
from dcp_storage.format.values import decode_value, is_value

TrustPolicy = Literal["listed", "all"]


def load_entry(fqn: str, value: io.BytesIO, allowed: Allowed = (), *, trust: TrustPolicy = "listed") -> Any:
    """Return the object in an entry: of types that run no code, or that are allowed.

    Raises:
        UnsupportedEntry: It holds another type, no code of which ran; or an allowed type cannot take what was stored.
        BlockCorrupt: It is not what a save makes.
    """
    data = value.getvalue()
    try:
        if is_value(data):
            return decode_value(data)
        container = read_container(data)
    except ValueError as error:
        raise _damaged(fqn, str(error)) from error
    if trust == "all":
        return _load_anything(fqn, value)
    return _rebuild(fqn, container, allowed)


def _rebuild(fqn: str, container: Container, allowed: Allowed) -> Any:
    try:
        return rebuild(container.pickled, lambda: Trust(allowed), Storages(container).load)
    except Refused as refused:
        raise _untrusted(fqn, refused, asks_for(container.pickled, Trust(allowed))) from refused
    except (Damaged, ValueError) as error:
        raise _damaged(fqn, str(error)) from error
    except Failed as error:
        raise UnsupportedEntry(
            f"{fqn} could not be rebuilt: {error}. It is stored whole; has the type changed since? Load it with the "
            "code that saved it, or leave it out of the state dict",
            fqn=fqn,
        ) from error
    except Exception as error:  # hashing and comparing run what is listed, too
        raise UnsupportedEntry(f"{fqn} could not be rebuilt: {type(error).__name__}: {error}", fqn=fqn) from error


def _untrusted(fqn: str, refused: Refused, names: list[str]) -> UnsupportedEntry:
    if names:
        says = f"{fqn} holds what is not loaded from an untrusted checkpoint: {', '.join(names)}. "
        advice = f"If you trust it, list its types: ShardedLoadPlanner(allowed_types=[{', '.join(names)}])"
    else:
        says = f"{fqn} holds a pickle that {refused}, which no listed type explains. "
        advice = 'If you trust all of the checkpoint, ShardedLoadPlanner(trust="all") runs whatever it holds'
    return UnsupportedEntry(says + advice, fqn=fqn, names=tuple(names))


def _load_anything(fqn: str, value: io.BytesIO) -> Any:
    try:
        return torch.load(value, map_location="cpu", weights_only=False)
    except Exception as error:  # anybody's code
        raise UnsupportedEntry(f"{fqn} could not be unpickled: {type(error).__name__}: {error}", fqn=fqn) from error


def _damaged(fqn: str, says: str) -> BlockCorrupt:
    return BlockCorrupt(f"{fqn} is damaged: {says}. Restore its object, or load another checkpoint", fqn=fqn)
