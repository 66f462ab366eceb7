"""Faults: invalid contents of a manifest, of this format or a stock one."""

from dataclasses import dataclass

from dcp_storage.errors import ManifestCorrupt

MAX_INT = (1 << 63) - 1
"""The largest extent, offset or size in bytes: more is neither a memory address nor a file offset."""


class Fault(Exception):
    """Something in a manifest is invalid."""


def require(holds: bool, says: str) -> None:
    """Raise a `Fault` unless a condition holds."""
    if not holds:
        raise Fault(says)


@dataclass(frozen=True)
class Blamed:
    """A context that turns a `Fault` into `ManifestCorrupt` for the manifest read at `where`."""

    where: str

    def __enter__(self) -> None:
        """Enter the context."""

    def __exit__(self, _type: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, Fault):
            raise ManifestCorrupt(f"{self.where} is invalid: {error}", url=self.where) from None
