"""The error tree. Every error says what, where and what to do, and every error pickles.

DCP sends exceptions between ranks, so an error carries its message as its only argument and everything else as plain
attributes: pickle restores both, and the cause.
"""

import pickle
from collections.abc import Sequence
from typing import Any


class DcpStorageError(Exception):
    """Base of every error that this package raises on purpose.

    Its attributes are for code that has to decide something; the message alone tells a person enough.

    Attributes:
        url: Where the checkpoint is, without credentials.
        object_name: The object in the store.
        offset: The byte of the object at which the fault is.
        fqn: The entry of the state dict.
        fqns: The entries, where there are several.
        ranks: The ranks that are concerned.
    """

    url: str | None = None
    object_name: str | None = None
    offset: int | None = None
    fqn: str | None = None
    fqns: Sequence[str] = ()
    ranks: Sequence[int] = ()

    def __init__(self, message: str, **context: Any) -> None:
        super().__init__(message)
        self.__dict__.update(context)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the cause too, which exceptions leave out."""
        return type(self), self.args, {**self.__dict__, "__cause__": _picklable(self.__cause__)}


def _picklable(cause: BaseException | None) -> BaseException | None:
    try:
        pickle.loads(pickle.dumps(cause))  # noqa: S301 - what was pickled just now
    except Exception:  # noqa: BLE001 - its own code may raise anything
        return RuntimeError(f"{type(cause).__name__}: {cause}")
    return cause


class CheckpointNotFound(DcpStorageError, FileNotFoundError):
    """There is no checkpoint at this path."""


class CheckpointExists(DcpStorageError, FileExistsError):
    """There is a checkpoint at this path already, and it may not be replaced."""


class CheckpointReplaced(DcpStorageError):
    """Another save committed in between: over the checkpoint that is read, or that is being replaced. Begin again."""


class ManifestCorrupt(DcpStorageError):
    """`.metadata` is there but is damaged, or says something that cannot be true."""


class BlockCorrupt(DcpStorageError):
    """Stored bytes do not match the check value that the manifest holds for them, even when read again."""


class MissingKeys(DcpStorageError, KeyError):
    """The state dict asks for entries that the checkpoint does not hold."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the message's repr


class UnsupportedFormat(DcpStorageError):
    """Well-formed, but of a version or kind that this package does not read."""


class UnsupportedTensor(DcpStorageError, TypeError):
    """A dtype, layout or planner value that cannot be stored without loss."""


class UnsupportedEntry(UnsupportedFormat, TypeError):
    """An object that is not a tensor and cannot be stored, or is of a type that a load does not trust."""


class StagingError(DcpStorageError):
    """A state could not be copied before `dcp.async_save` returned: the host may have no memory for it."""


class CoverageError(DcpStorageError, ValueError):
    """The parts of a tensor do not tile it: a gap, an overlap, or a box outside of its bounds."""


class DtypeMismatch(DcpStorageError, TypeError):
    """A tensor's dtype is not the one that the plan or the checkpoint says."""


class ReplicaMismatch(DcpStorageError, ValueError):
    """Ranks hold different data under one name, of which only one rank's copy would be saved."""


class StoreError(DcpStorageError, OSError):
    """The storage system refused or failed an operation."""


class AccessDenied(StoreError, PermissionError):
    """The storage system does not allow an operation to whoever asks."""


class ObjectNotFound(StoreError, FileNotFoundError):
    """An object that should be in the store is not there."""


class ObjectExists(StoreError, FileExistsError):
    """An object stands where none, or another version of it, was expected."""


class ConfigError(DcpStorageError, ValueError):
    """An argument has an impossible value."""
