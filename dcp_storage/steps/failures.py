"""What a rank raised, out of what DCP makes of it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.checkpoint.api import CheckpointException

from dcp_storage.errors import BlockCorrupt, CheckpointNotFound, DcpStorageError, ManifestCorrupt, ObjectNotFound

_DAMAGE = (BlockCorrupt, CheckpointNotFound, ManifestCorrupt, ObjectNotFound)


def cause_of(error: BaseException) -> BaseException:
    """Return the error of the lowest rank that DCP tells all ranks of, one of this package's if there is any."""
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
    """Raise what a rank raised instead of DCP's `CheckpointException`, which `except Exception` misses."""
    try:
        yield
    except CheckpointException as error:
        cause = cause_of(error)
        raise cause from cause.__cause__


def is_damage(error: CheckpointException) -> bool:
    """Return whether what was read is damaged or not there, and nothing else failed."""
    return all(isinstance(cause, _DAMAGE) for cause, _ in error.failures.values())
