"""Names of a checkpoint's objects: creating, parsing and checking them."""

import re
import secrets
from typing import NamedTuple, NewType

ObjectName = NewType("ObjectName", str)
"""The name of an object directly below a checkpoint's prefix; `is_safe` holds for it, unless a store listed it."""

MANIFEST = ObjectName(".metadata")

_SAFE = re.compile(r"(?!\.\.?$)[^/\\\x00-\x1f\x7f:]{1,255}")
_TOKEN = "[0-9a-f]{16}"  # noqa: S105 - not a password
_TEMPORARY = rf"(?:\.tmp-{_TOKEN})"
_DATA_OBJECT = re.compile(rf"({_TOKEN})-\d+-\d+\.distcp(?:\.zst)?({_TEMPORARY})?")
_MANIFEST_TEMPORARY = re.compile(rf"(?:__\d+(?:-{_TOKEN})?)?\.metadata{_TEMPORARY}")
_STOCK_OBJECT = re.compile(r"__\d+_\d+\.distcp")
_PART = re.compile(rf"__(\d+)(?:-({_TOKEN}))?\.metadata")


def is_safe(name: str) -> bool:
    """Return whether a name stays directly below the checkpoint's prefix on every store."""
    return _SAFE.fullmatch(name) is not None


def new_token() -> str:
    """Return 64 random bits in hexadecimal, so that no two saves use the same object names."""
    return secrets.token_hex(8)


def data_object(token: str, rank: int, number: int, suffix: str) -> ObjectName:
    """Return the name of a rank's `number`-th data object of one save; the suffix is that of its codec."""
    return ObjectName(f"{token}-{rank}-{number}{suffix}")


def temporary_name(name: str) -> str:
    """Return the name that an object has while it is written, if the store writes in place."""
    return f"{name}.tmp-{new_token()}"


def is_data_object(name: str) -> bool:
    """Return whether a name has the form of this package's data objects."""
    match = _DATA_OBJECT.fullmatch(name)
    return match is not None and match[2] is None


def is_stock_object(name: str) -> bool:
    """Return whether a name has the form of data objects of DCP's own writers."""
    return _STOCK_OBJECT.fullmatch(name) is not None


class Part(NamedTuple):
    """Identifies one rank's part of a save without collectives.

    The parts of one save share an `attempt` that no other save has; those of DCP's own writers have none.
    """

    attempt: str | None
    rank: int


def part_manifest(part: Part) -> ObjectName:
    """Return the name of the manifest that one rank commits in a save without collectives."""
    return ObjectName(f"__{part.rank}-{part.attempt}{MANIFEST}")


def parse_part_manifest(name: str) -> Part | None:
    """Return the part that a manifest's name stands for, or `None`."""
    match = _PART.fullmatch(name)
    return Part(match[2], int(match[1])) if match else None


def save_of(name: str) -> str | None:
    """Return an id that the objects of one save share, or `None` if a name does not have this package's form.

    For a data object it is the save's token. Names of single ranks' manifests and of temporary manifests do not
    identify their save, so each is its own id.
    """
    if match := _DATA_OBJECT.fullmatch(name):
        return match[1]
    return name if _MANIFEST_TEMPORARY.fullmatch(name) or parse_part_manifest(name) else None
