"""Finds the error that a rank raised in DCP's exception."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.checkpoint.api import CheckpointException

from dcp_storage.errors import BlockCorrupt, CheckpointNotFound, DcpStorageError, ManifestCorrupt, ObjectNotFound

_DAMAGE = (BlockCorrupt, CheckpointNotFound, ManifestCorrupt, ObjectNotFound)


def cause_of(error: BaseException) -> BaseException:
    """Return the error of the lowest rank in DCP's exception, preferably one of this package's."""
    if not isinstance(error, CheckpointException):
        return error
    failed = sorted(error.failures.items())
    rank, cause = next(
        ((rank, cause) for rank, (cause, _) in failed if isinstance(cause, DcpStorageError)),
        (failed[0][0], failed[0][1][0]),
    )
    cause.add_note(f"(raised on rank {rank})")
    return cause


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise a rank's error instead of DCP's `CheckpointException`, which `except Exception` does not catch."""
    try:
        yield
    except CheckpointException as error:
        cause = cause_of(error)
        raise cause from cause.__cause__


def is_damage(error: CheckpointException) -> bool:
    """Return whether all failures mean that the checkpoint is damaged or missing."""
    return all(isinstance(cause, _DAMAGE) for cause, _ in error.failures.values())
