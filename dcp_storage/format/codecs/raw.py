"""Blocks as their raw bytes."""

from typing import Any

from xxhash import xxh3_64

from dcp_storage.config import Codec
from dcp_storage.errors import BlockCorrupt
from dcp_storage.format.codecs.base import BlockCodec, BlockDecoder, BlockEncoder
from dcp_storage.raw import Raw, copy_bytes


class RawCodec(BlockCodec):
    """Raw bytes, checked by XXH3-64."""

    suffix = ".distcp"
    check_chars = 16
    verbatim = True

    def limit(self, raw_bytes: int, blocks: int = 1) -> int:  # noqa: ARG002 - blocks have no overhead
        """Return the raw size."""
        return raw_bytes

    def fits(self, lengths: Any, raw_bytes: Any) -> Any:
        """Return which blocks have equal stored and raw sizes."""
        return lengths == raw_bytes

    def make_encoder(self, codec: Codec) -> BlockEncoder:  # noqa: ARG002 - there is nothing to set
        """Return an encoder for one thread."""
        return _Coder()

    def make_decoder(self, block_bytes: int) -> BlockDecoder:  # noqa: ARG002 - no memory is needed
        """Return a decoder for one thread."""
        return _Coder()


class _Coder:
    def encode(self, block: memoryview, planes: int, out: memoryview, *, first: bool) -> tuple[int, str]:  # noqa: ARG002
        copy_bytes(block, out[: len(block)])
        return len(block), _check_value(block)

    def decode(self, stored: Raw, check: str, planes: int, out: memoryview) -> None:  # noqa: ARG002
        if len(stored) != len(out) or _check_value(stored) != check:
            raise BlockCorrupt("the bytes do not match their check value")
        copy_bytes(stored, out)


def _check_value(raw: Raw) -> str:
    # The object releases the GIL while it hashes; xxhash's functions do not.
    return xxh3_64(raw).hexdigest()
