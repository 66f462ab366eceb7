"""Faults: what a manifest, of this format or a stock one, must not say."""

from dataclasses import dataclass

from dcp_storage.errors import ManifestCorrupt

MAX_INT = (1 << 63) - 1
"""What an extent, an offset or a size in bytes may be: more is neither a memory address nor a place in a file."""


class Fault(Exception):
    """Something in a manifest that cannot be."""


def require(holds: bool, says: str) -> None:
    """Raise a `Fault` unless something holds."""
    if not holds:
        raise Fault(says)


@dataclass(frozen=True)
class Blamed:
    """A context that raises a `Fault` as `ManifestCorrupt` of what was read at `where`."""

    where: str

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, _type: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, Fault):
            raise ManifestCorrupt(f"{self.where} cannot be right: {error}", url=self.where) from None
