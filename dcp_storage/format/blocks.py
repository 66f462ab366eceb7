"""One block at a time: raw little-endian element bytes to one zstd frame (or to themselves) and back.

Encoders and decoders hold scratch memory and a zstd context: one for each thread, never shared. The hot calls (zstd,
numpy on whole blocks) release the GIL.
"""

from collections.abc import Sequence

import zstandard
from msgspec import Struct
from numpy import empty, uint8
from xxhash import xxh3_64

from dcp_storage.config import Codec
from dcp_storage.errors import BlockCorrupt
from dcp_storage.format.digests import make_digest
from dcp_storage.format.planes import make_planes
from dcp_storage.format.zstd import (
    MAGIC,
    Compressor,
    make_compressor,
    make_decompressor,
    make_entropy_coder,
    make_glancing_compressor,
)
from dcp_storage.raw import Raw, copy_bytes

CHECK_CHARS = {"zstd": 8, "none": 16}
"""Hexadecimal characters of one block's check value, by compression."""

_ZSTD_BLOCK_BYTES = 128 << 10
"""What zstd compresses with one set of tables, at most."""

_LONG_SAMPLE = 40 << 10
_SHORT_SAMPLES, _SHORT_SAMPLE = 4, 4 << 10
_NOISE = 0.995
"""Of its size, what a sample of bits at random is stored in, at least."""
_CONSTANT_BYTES = 64
"""What a sample of equal bytes is stored in, at most."""
_WORTH_A_SEARCH = 0.97
"""Of a sample's size by the entropy coder alone: what a search for matches has to bring it to."""


def plane_count(itemsize: int, *, byte_planes: bool) -> int:
    """Return how many byte planes elements of `itemsize` bytes are laid out in; 1 is none."""
    return itemsize if byte_planes and itemsize in {2, 4, 8} else 1


def encoded_limit(raw_bytes: int, compression: str, blocks: int = 1) -> int:
    """Return the most bytes that so many blocks, of `raw_bytes` together, may be stored in."""
    # zstd's bound for incompressible input, and room for the frames' headers and checksums.
    return raw_bytes + (raw_bytes >> 7) + 256 * blocks if compression == "zstd" else raw_bytes


class Encoded(Struct, frozen=True, gc=False):
    """Consecutive blocks of one item: their stored sizes and, in hexadecimal, their check values and the digest of all.

    The digest is empty where none is asked for.
    """

    lengths: tuple[int, ...]
    checks: str
    digest: str


class BlockEncoder:
    """Encodes blocks for one thread."""

    def __init__(self, codec: Codec) -> None:
        self._compression = codec.compression
        self._block_bytes = codec.block_bytes
        self._digest = codec.digest
        self._planes = make_planes()
        self._laid = memoryview(empty(codec.block_bytes, uint8).data)
        self._searching = make_compressor(codec.level)
        # A search for matches in the planes of floating-point numbers finds nothing and takes half of the time.
        self._glancing = make_glancing_compressor() if codec.level == 1 else self._searching
        self._entropy_coder = make_entropy_coder() if codec.level == 1 else None
        self._sampled = memoryview(bytearray(encoded_limit(_LONG_SAMPLE, "zstd")))

    def encode_items(self, items: Sequence[tuple[Raw, int]], out: memoryview) -> list[Encoded]:
        """Encode slices of items, each with its number of byte planes, one behind the other into `out`."""
        encoded, filled = [], 0
        for raw, planes in items:
            blocks = self.encode(raw, planes, out[filled:])
            filled += sum(blocks.lengths)
            encoded.append(blocks)
        return encoded

    def encode(self, raw: Raw, planes: int, out: memoryview) -> Encoded:
        """Encode consecutive blocks of one item.

        `raw` is whole elements of `planes` bytes, and a block ends every `block_bytes`. The stored bytes are the
        beginning of `out`, which must have room for `encoded_limit` bytes.
        """
        data = memoryview(raw)
        compressor: Compressor | None = None
        lengths, checks, filled = [], [], 0
        digest = make_digest(self._digest) if self._digest else None
        for start in range(0, len(data), self._block_bytes):
            block, rest = data[start : start + self._block_bytes], out[filled:]
            if digest is not None:
                digest.update(block)  # and then the cache holds it
            if self._compression == "none":
                copy_bytes(block, rest[: len(block)])
                size, check = len(block), _check_value(block)
            else:
                laid = self._lay(block, planes)
                compressor = self._choose(laid, planes, compressor)
                size = _compress_planes(laid, planes, compressor, rest)
                check = rest[size - 4 : size].hex()
            lengths.append(size)
            checks.append(check)
            filled += size
        return Encoded(tuple(lengths), "".join(checks), "" if digest is None else digest.hexdigest())

    def _lay(self, block: memoryview, planes: int) -> memoryview:
        if planes == 1:
            return block
        laid = self._laid[: len(block)]
        self._planes.split(block, planes, laid)
        return laid

    def _choose(self, laid: memoryview, planes: int, before: Compressor | None) -> Compressor:
        """Return what compresses a block best, by samples of its planes and by what was chosen for the block before it.

        Entropy coding alone is enough where the lowest plane that says anything is noise: numbers of which some are
        equal, zero or integers show it there. The first block's sample is long, so that it holds rows that repeat; and
        rows that are multiples of each other repeat in the exponents alone. Later samples tell whether a block is like
        the first.
        """
        stride = len(laid) // planes
        if planes == 1:
            return self._searching
        if self._entropy_coder is None or stride < _LONG_SAMPLE or before is self._glancing:
            return self._glancing
        for plane in range(0, len(laid), stride):
            sample = _sample(laid[plane : plane + stride], long=before is None)
            size = self._glancing.compress(sample, self._sampled)
            if size > _CONSTANT_BYTES:
                repeats = size < _NOISE * len(sample) or (before is None and self._repeats(laid[-stride:]))
                return self._glancing if repeats else self._entropy_coder
        return self._glancing

    def _repeats(self, exponents: memoryview) -> bool:
        assert self._entropy_coder is not None, "samples are taken to choose it"
        sample = _sample(exponents, long=False)
        searched = self._glancing.compress(sample, self._sampled)
        return searched < _WORTH_A_SEARCH * self._entropy_coder.compress(sample, self._sampled)


def _sample(plane: memoryview, *, long: bool) -> Raw:
    if long:
        return plane[:_LONG_SAMPLE]
    step = (len(plane) - _SHORT_SAMPLE) // (_SHORT_SAMPLES - 1)
    return b"".join(plane[at * step : at * step + _SHORT_SAMPLE] for at in range(_SHORT_SAMPLES))


def _compress_planes(laid: memoryview, planes: int, compressor: Compressor, out: memoryview) -> int:
    """Compress into one frame, whose zstd blocks end where the planes of exponents do.

    Exponents and mantissas would otherwise share the tables of the zstd blocks that hold some of both. The planes
    before hold mantissas only, and an end costs as much as the encoding of a small plane.
    """
    stride = len(laid) // planes
    if planes == 1 or stride % _ZSTD_BLOCK_BYTES == 0:
        return compressor.compress(laid, out)
    return compressor.compress_parts(laid, range(stride * (planes - max(1, planes // 4)), len(laid) + 1, stride), out)


class BlockDecoder:
    """Decodes blocks for one thread."""

    def __init__(self, compression: str, block_bytes: int) -> None:
        self._compression = compression
        self._planes = make_planes()
        self._laid = memoryview(empty(block_bytes, uint8).data)
        self._decompressor = make_decompressor()

    def decode_into(self, stored: Raw, check: str, planes: int, out: memoryview) -> None:
        """Decode a block into `out`, whose length is the block's raw size; never allocate more than that.

        Raises:
            BlockCorrupt: The bytes are not the block that `check` was taken of. `out` may be partly written.
        """
        if self._compression == "none":
            if len(stored) != len(out) or _check_value(stored) != check:
                raise BlockCorrupt("the bytes do not match their check value")
            copy_bytes(stored, out)
        elif planes == 1:
            self._decompress(stored, check, out)
        else:
            laid = self._laid[: len(out)]
            self._decompress(stored, check, laid)
            self._planes.merge(laid, planes, out)

    def _decompress(self, stored: Raw, check: str, out: memoryview) -> None:
        frame = memoryview(stored)
        if frame[:4] != MAGIC or frame[-4:].hex() != check:
            raise BlockCorrupt("the bytes are not the zstd frame that belongs here")
        try:
            header = zstandard.get_frame_parameters(frame)
            if header.content_size != len(out) or not header.has_checksum:
                raise BlockCorrupt("the zstd frame is of another size than its block")
            self._decompressor.decompress(frame, out)
        except zstandard.ZstdError as error:
            raise BlockCorrupt(f"the zstd frame is damaged: {error}") from error


def _check_value(raw: Raw) -> str:
    # The object releases the GIL while it hashes; xxhash's functions do not.
    return xxh3_64(raw).hexdigest()
