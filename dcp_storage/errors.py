"""The error tree. Every error says what, where and what to do, and every error pickles.

DCP sends exceptions between ranks, so an error carries its message as its only argument and everything else as plain
attributes: pickle restores both, and the cause.
"""

import pickle
from collections.abc import Sequence
from typing import Any


class DcpStorageError(Exception):
    """Base of every error that this package raises on purpose.

    The attributes are for code that handles the error; for a person the message alone is enough.

    Attributes:
        url: URL of the checkpoint, without credentials.
        object_name: The object in the store.
        offset: Byte offset of the fault in the object.
        fqn: The entry of the state dict.
        fqns: The entries, if there are several.
        ranks: The ranks involved.
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
        """Pickle the cause too; plain exceptions leave it out."""
        return type(self), self.args, {**self.__dict__, "__cause__": picklable(self.__cause__)}


def picklable(error: BaseException | None) -> BaseException | None:
    """Return an error, or if it cannot be pickled, a `RuntimeError` with its text."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - pickled just now
    except Exception:  # noqa: BLE001 - its own code may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class CheckpointNotFound(DcpStorageError, FileNotFoundError):
    """There is no checkpoint at this path."""


class CheckpointExists(DcpStorageError, FileExistsError):
    """A checkpoint already exists at this path and may not be replaced."""


class CheckpointReplaced(DcpStorageError):
    """Another save has replaced the checkpoint that was being read or replaced. Start again."""


class ManifestCorrupt(DcpStorageError):
    """`.metadata` exists but is damaged, or its contents are invalid."""


class BlockCorrupt(DcpStorageError):
    """Stored bytes do not match their check value in the manifest, even when read again."""


class MissingKeys(DcpStorageError, KeyError):
    """The state dict asks for entries that are not in the checkpoint."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the message's repr


class UnsupportedFormat(DcpStorageError):
    """Well-formed, but of a version or kind that this package does not read."""


class UnsupportedTensor(DcpStorageError, TypeError):
    """A dtype, layout or planner value that cannot be stored without loss."""


class UnsupportedEntry(UnsupportedFormat, TypeError):
    """A non-tensor object that cannot be stored, or whose type a load does not trust."""


class StagingError(DcpStorageError):
    """A state could not be copied before `dcp.async_save` returned; the host may be out of memory."""


class CoverageError(DcpStorageError, ValueError):
    """The parts of a tensor do not tile it: a gap, an overlap, or a box out of bounds."""


class DtypeMismatch(DcpStorageError, TypeError):
    """A tensor's dtype differs from the one in the plan or the checkpoint."""


class ReplicaMismatch(DcpStorageError, ValueError):
    """Ranks hold different data under one name, of which only one rank's copy would be saved."""


class StoreError(DcpStorageError, OSError):
    """The storage system refused an operation, or the operation failed."""


class AccessDenied(StoreError, PermissionError):
    """The storage system denied permission for an operation."""


class ObjectNotFound(StoreError, FileNotFoundError):
    """An object that should be in the store is missing."""


class ObjectExists(StoreError, FileExistsError):
    """An object exists where none, or a different version of it, was expected."""


class ConfigError(DcpStorageError, ValueError):
    """An argument has an invalid value."""
