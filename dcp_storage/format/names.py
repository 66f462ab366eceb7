"""Names of objects: the only place that makes, parses and judges them."""

import re
import secrets
from typing import NamedTuple

MANIFEST = ".metadata"

_SAFE = re.compile(r"(?!\.\.?$)[^/\\\x00-\x1f\x7f:]{1,255}")
_TOKEN = "[0-9a-f]{16}"  # noqa: S105 - not a password
_TEMPORARY = rf"(?:\.tmp-{_TOKEN})"
_DATA_OBJECT = re.compile(rf"({_TOKEN})-\d+-\d+\.distcp(?:\.zst)?({_TEMPORARY})?")
_MANIFEST_TEMPORARY = re.compile(rf"(?:__\d+(?:-{_TOKEN})?)?\.metadata{_TEMPORARY}")
_STOCK_OBJECT = re.compile(r"__\d+_\d+\.distcp")
_PART = re.compile(rf"__(\d+)(?:-({_TOKEN}))?\.metadata")


def is_safe(name: str) -> bool:
    """Return whether a name stays directly below the checkpoint's prefix on every store: no path, scheme or control."""
    return _SAFE.fullmatch(name) is not None


def new_token() -> str:
    """Return 64 random bits in hexadecimal: no two saves name an object alike."""
    return secrets.token_hex(8)


def data_object(token: str, rank: int, number: int, suffix: str) -> str:
    """Return the name of a rank's `number`-th data object of one save; the suffix is its codec's."""
    return f"{token}-{rank}-{number}{suffix}"


def temporary_name(name: str) -> str:
    """Return the name that an object has while it is written, where a store writes it in place."""
    return f"{name}.tmp-{new_token()}"


def is_data_object(name: str) -> bool:
    """Return whether a name is of the form that this package gives to data objects."""
    match = _DATA_OBJECT.fullmatch(name)
    return match is not None and match[2] is None


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
    """Return the part that a manifest of this name is, or `None`."""
    match = _PART.fullmatch(name)
    return Part(match[2], int(match[1])) if match else None


def save_of(name: str) -> str | None:
    """Return what the objects of one save have in common, where a name is of this package's form; else `None`.

    That is the save's token for a data object. Manifests of single ranks, and temporaries of manifests, do not tell
    their save and stand for themselves.
    """
    if match := _DATA_OBJECT.fullmatch(name):
        return match[1]
    return name if _MANIFEST_TEMPORARY.fullmatch(name) or parse_part_manifest(name) else None
