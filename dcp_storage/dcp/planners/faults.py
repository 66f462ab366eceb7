"""Errors of a load's plan: all of one kind at once, and of which checkpoint they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch.distributed.checkpoint.metadata import Metadata

from dcp_storage.errors import CoverageError, DcpStorageError

_MOST_TOLD = 8


def raise_all(faults: Sequence[CoverageError]) -> None:
    """Raise one error of all that does not fit.

    Raises:
        CoverageError: There is something.
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
    """Say in an error which checkpoint it is of: a job may read several."""
    try:
        yield
    except DcpStorageError as error:
        where = getattr(metadata.storage_meta, "checkpoint_id", None)
        if where:
            error.args = (f"{where}: {error.args[0]}", *error.args[1:])
        raise
