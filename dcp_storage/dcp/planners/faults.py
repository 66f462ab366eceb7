"""Errors of a load's plan: all of one kind are raised together, and name the checkpoint."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch.distributed.checkpoint.metadata import Metadata

from dcp_storage.errors import CoverageError, DcpStorageError

_MOST_TOLD = 8


def raise_all(faults: Sequence[CoverageError]) -> None:
    """Raise one error for all faults.

    Raises:
        CoverageError: There is at least one.
    """
    if len(faults) == 1:
        raise faults[0]
    if faults:
        told = "; ".join(str(fault) for fault in faults[:_MOST_TOLD])
        more = f"; and {len(faults) - _MOST_TOLD} more" if len(faults) > _MOST_TOLD else ""
        fqns = tuple(fault.__dict__.get("fqn") for fault in faults)
        raise CoverageError(f"{len(faults)} entries do not fit: {told}{more}", fqn=fqns[0], fqns=fqns)


@contextmanager
def naming_checkpoint(metadata: Metadata) -> Iterator[None]:
    """Add the checkpoint to an error's message: a job may read several."""
    try:
        yield
    except DcpStorageError as error:
        where = getattr(metadata.storage_meta, "checkpoint_id", None)
        if where:
            error.args = (f"{where}: {error.args[0]}", *error.args[1:])
        raise
