"""Blocks of items: the available codecs, and how an item's raw bytes become a sequence of blocks."""

from collections.abc import Sequence

from msgspec import Struct

from dcp_storage.config import Codec
from dcp_storage.format.codecs.base import BlockCodec
from dcp_storage.format.codecs.digests import make_digest
from dcp_storage.format.codecs.raw import RawCodec
from dcp_storage.format.codecs.zstd import ZstdCodec
from dcp_storage.raw import Raw

CODECS: dict[str, BlockCodec] = {"zstd": ZstdCodec(), "none": RawCodec()}
"""By their names in a manifest's head."""


class Encoded(Struct, frozen=True, gc=False):
    """Consecutive blocks of one item: their stored sizes and, in hexadecimal, their check values and the digest of all.

    The digest is empty if none is asked for.
    """

    lengths: tuple[int, ...]
    checks: str
    digest: str


class ItemEncoder:
    """Encodes items, block by block, for one thread."""

    def __init__(self, codec: Codec) -> None:
        self._block_bytes = codec.block_bytes
        self._digest = codec.digest
        self._encoder = CODECS[codec.compression].make_encoder(codec)

    def encode_items(self, items: Sequence[tuple[Raw, int]], out: memoryview) -> list[Encoded]:
        """Encode slices of items, each with its number of byte planes, one after another into `out`."""
        encoded, filled = [], 0
        for raw, planes in items:
            blocks = self.encode(raw, planes, out[filled:])
            filled += sum(blocks.lengths)
            encoded.append(blocks)
        return encoded

    def encode(self, raw: Raw, planes: int, out: memoryview) -> Encoded:
        """Encode consecutive blocks of one item.

        `raw` consists of whole elements of `planes` bytes, and a block ends every `block_bytes`. The stored bytes go
        to the start of `out`, which must have room for the codec's `limit`.
        """
        data = memoryview(raw)
        lengths, checks, filled = [], [], 0
        digest = make_digest(self._digest) if self._digest else None
        for start in range(0, len(data), self._block_bytes):
            block = data[start : start + self._block_bytes]
            if digest is not None:
                digest.update(block)  # which also brings it into the CPU's cache
            size, check = self._encoder.encode(block, planes, out[filled:], first=not start)
            lengths.append(size)
            checks.append(check)
            filled += size
        return Encoded(tuple(lengths), "".join(checks), "" if digest is None else digest.hexdigest())
