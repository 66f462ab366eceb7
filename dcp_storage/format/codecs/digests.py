"""Digests of raw bytes: what tells whether two checkpoints hold the same without comparing them."""

from hashlib import sha256
from typing import Any

from xxhash import xxh3_128

DIGEST_CHARS = {"xxh3_128": 32, "sha256": 64}
"""Hexadecimal characters of a digest, by algorithm."""

DEFAULT_DIGEST = "xxh3_128"
"""That of a manifest's frames, where no other is asked for."""

MAX_DIGESTED_BYTES = 64 << 20
"""Raw bytes of a segment that has a digest, at most: whoever checks it holds them at once."""

_MAKERS: dict[str, Any] = {"xxh3_128": xxh3_128, "sha256": sha256}


def make_digest(algorithm: str) -> Any:
    """Return what takes bytes (`update`) and then gives their digest (`hexdigest`)."""
    return _MAKERS[algorithm]()


def digest_of(data: bytes, algorithm: str) -> str:
    """Return the digest of bytes, in lower-case hexadecimal."""
    digest = make_digest(algorithm)
    digest.update(data)
    text: str = digest.hexdigest()
    return text
