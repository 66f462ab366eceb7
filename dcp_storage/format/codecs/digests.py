"""Digests of raw bytes, which show whether two checkpoints have equal contents without comparing the bytes."""

from hashlib import sha256
from typing import Any

from xxhash import xxh3_128

DIGEST_CHARS = {"xxh3_128": 32, "sha256": 64}
"""Hexadecimal characters of a digest, by algorithm."""

DEFAULT_DIGEST = "xxh3_128"
"""The algorithm for a manifest's frames, if no other is chosen."""

MAX_DIGESTED_BYTES = 64 << 20
"""Maximum raw bytes of a segment with a digest: whoever checks it needs all of them in memory."""

_MAKERS: dict[str, Any] = {"xxh3_128": xxh3_128, "sha256": sha256}


def make_digest(algorithm: str) -> Any:
    """Return a new hash object, with `update` and `hexdigest`."""
    return _MAKERS[algorithm]()


def digest_of(data: bytes, algorithm: str) -> str:
    """Return the digest of bytes, in lower-case hexadecimal."""
    digest = make_digest(algorithm)
    digest.update(data)
    text: str = digest.hexdigest()
    return text
