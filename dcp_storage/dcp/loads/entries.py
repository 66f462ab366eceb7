"""Non-tensor entries: built-in values, or `torch.save` containers that are read without running what they name."""

import io
from typing import Any, Literal, NamedTuple

import torch

from dcp_storage.dcp.pickles.asked import asks_for
from dcp_storage.dcp.pickles.listed import Failed
from dcp_storage.dcp.pickles.machine import rebuild
from dcp_storage.dcp.pickles.storages import Storages
from dcp_storage.dcp.pickles.trust import Allowed, Trust, check_allowed
from dcp_storage.errors import BlockCorrupt, ConfigError, UnsupportedEntry
from dcp_storage.format.container import Container, read_container
from dcp_storage.format.pickles import Damaged, Refused
from dcp_storage.format.values import decode_value, is_value

TrustPolicy = Literal["listed", "all"]


class Trusted(NamedTuple):
    """The types that a load may rebuild."""

    allowed: tuple[Any, ...] = ()
    trust: TrustPolicy = "listed"

    @classmethod
    def of(cls, allowed: Allowed, trust: TrustPolicy) -> "Trusted":
        """Return the choice of a caller.

        Raises:
            ConfigError: It is invalid.
        """
        if trust not in {"listed", "all"}:
            raise ConfigError(f'trust is {trust!r}; choose "listed" or "all"')
        return cls(check_allowed(allowed), trust)


_BUILT_IN = Trusted()


def load_entry(fqn: str, value: io.BytesIO, trusted: Trusted = _BUILT_IN) -> Any:
    """Return the object in an entry, if its types run no code or are allowed.

    Raises:
        UnsupportedEntry: It contains another type, whose code did not run; or an allowed type cannot be rebuilt.
        BlockCorrupt: It is not in the format that a save writes.
    """
    data = value.getvalue()
    try:
        if is_value(data):
            return decode_value(data)
        container = read_container(data)
    except ValueError as error:
        raise _damaged(fqn, str(error)) from error
    if trusted.trust == "all":
        return _load_anything(fqn, value)
    return _rebuild(fqn, container, trusted.allowed)


def _rebuild(fqn: str, container: Container, allowed: Allowed) -> Any:
    try:
        return rebuild(container.pickled, lambda: Trust(allowed), Storages(container).load)
    except Refused as refused:
        raise _untrusted(fqn, refused, asks_for(container.pickled, Trust(allowed))) from refused
    except (Damaged, ValueError) as error:
        raise _damaged(fqn, str(error)) from error
    except Failed as error:
        raise UnsupportedEntry(
            f"{fqn} could not be rebuilt: {error}. Its bytes are intact; has the type changed since? Load it with the "
            "code that saved it, or leave it out of the state dict",
            fqn=fqn,
        ) from error
    except Exception as error:  # hashing and comparing run listed code, too
        raise UnsupportedEntry(f"{fqn} could not be rebuilt: {type(error).__name__}: {error}", fqn=fqn) from error


def _untrusted(fqn: str, refused: Refused, names: list[str]) -> UnsupportedEntry:
    if names:
        says = f"{fqn} holds types that are not loaded from an untrusted checkpoint: {', '.join(names)}. "
        advice = f"If you trust them, list them: ShardedLoadPlanner(allowed_types=[{', '.join(names)}])"
    else:
        says = f"{fqn} holds a pickle that {refused}, which no listed type explains. "
        advice = 'If you trust the whole checkpoint, ShardedLoadPlanner(trust="all") runs any code in it'
    return UnsupportedEntry(says + advice, fqn=fqn, names=tuple(names))


def _load_anything(fqn: str, value: io.BytesIO) -> Any:
    try:
        return torch.load(value, map_location="cpu", weights_only=False)
    except Exception as error:  # arbitrary code
        raise UnsupportedEntry(f"{fqn} could not be unpickled: {type(error).__name__}: {error}", fqn=fqn) from error


def _damaged(fqn: str, says: str) -> BlockCorrupt:
    return BlockCorrupt(f"{fqn} is damaged: {says}. Restore its object, or load another checkpoint", fqn=fqn)
