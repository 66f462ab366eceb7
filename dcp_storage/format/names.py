"""Names of the objects of a checkpoint: what a save makes, and what a reader accepts."""

import re
import secrets
from typing import NamedTuple

MANIFEST = ".metadata"
SUFFIXES = {"zstd": ".distcp.zst", "none": ".distcp"}

_SAFE = re.compile(r"(?!\.\.?$)[^/\\\x00-\x1f\x7f:]{1,255}")
_DATA_OBJECT = re.compile(r"[0-9a-f]{16}-\d+-\d+\.distcp(?:\.zst)?")
_STOCK_OBJECT = re.compile(r"__\d+_\d+\.distcp")
_PART = re.compile(r"__(\d+)(?:-([0-9a-f]{16}))?\.metadata")


def new_token() -> str:
    """Return 64 random bits in hexadecimal: no two saves name an object alike."""
    return secrets.token_hex(8)


def data_object(token: str, rank: int, number: int, *, compression: str) -> str:
    """Return the name of a rank's `number`-th data object of one save."""
    return f"{token}-{rank}-{number}{SUFFIXES[compression]}"


def is_data_object(name: str) -> bool:
    """Return whether a name is of the form that this package gives to data objects."""
    return _DATA_OBJECT.fullmatch(name) is not None


def is_stock_object(name: str) -> bool:
    """Return whether a name is of the form that DCP's own writers give to data objects."""
    return _STOCK_OBJECT.fullmatch(name) is not None


class Part(NamedTuple):
    """Whose part of a save without collectives a manifest is.

    `attempt` is what the parts of one save share, as no others; those of DCP's own writers have none.
    """

    attempt: str | None
    rank: int


def part_manifest(part: Part) -> str:
    """Return the name of the manifest that a rank commits by itself in a save without collectives."""
    return f"__{part.rank}-{part.attempt}{MANIFEST}"


def parse_part_manifest(name: str) -> Part | None:
    """Return whose part this name is that of, or `None`."""
    match = _PART.fullmatch(name)
    return Part(match[2], int(match[1])) if match else None


def is_safe(name: str) -> bool:
    """Return whether a name stays directly below the checkpoint's prefix on every store: no path, scheme or control."""
    return _SAFE.fullmatch(name) is not None
