"""Blocks as zstd frames, of byte planes if elements have them."""

from typing import Any

import zstandard
from numpy import empty, uint8

from dcp_storage.config import Codec
from dcp_storage.errors import BlockCorrupt
from dcp_storage.format.codecs.base import BlockCodec, BlockDecoder, BlockEncoder
from dcp_storage.format.codecs.libzstd import (
    MAGIC,
    Compressor,
    make_compressor,
    make_decompressor,
    make_entropy_coder,
    make_glancing_compressor,
)
from dcp_storage.format.codecs.planes import make_planes
from dcp_storage.raw import Raw

_ZSTD_BLOCK_BYTES = 128 << 10
"""The most that zstd compresses with one set of tables."""

_LONG_SAMPLE = 40 << 10
_SHORT_SAMPLES, _SHORT_SAMPLE = 4, 4 << 10
_NOISE = 0.995
"""A sample of random bits compresses to at least this fraction of its size."""
_CONSTANT_BYTES = 64
"""A sample of equal bytes compresses to at most this size."""
_WORTH_A_SEARCH = 0.97
"""A match search must bring a sample below this fraction of its size by entropy coding alone."""


class ZstdCodec(BlockCodec):
    """One standard zstd frame per block, with content size and checksum; the check value is that checksum."""

    suffix = ".distcp.zst"
    check_chars = 8

    def planes(self, itemsize: int) -> int:
        """Return one plane per byte for elements of 2, 4 or 8 bytes."""
        return itemsize if itemsize in {2, 4, 8} else 1

    def limit(self, raw_bytes: int, blocks: int = 1) -> int:
        """Return zstd's bound for incompressible input, plus room for the frames' headers and checksums."""
        return raw_bytes + (raw_bytes >> 7) + 256 * blocks

    def fits(self, lengths: Any, raw_bytes: Any) -> Any:
        """Return which blocks of these raw sizes may have these stored lengths."""
        return (lengths > 0) & (lengths <= raw_bytes + (raw_bytes >> 7) + 256)

    def make_encoder(self, codec: Codec) -> BlockEncoder:
        """Return an encoder for one thread."""
        return _Encoder(codec)

    def make_decoder(self, block_bytes: int) -> BlockDecoder:
        """Return a decoder for one thread."""
        return _Decoder(block_bytes)


class _Encoder:
    def __init__(self, codec: Codec) -> None:
        self._planes = make_planes()
        self._laid = memoryview(empty(codec.block_bytes, uint8).data)
        self._searching = make_compressor(codec.level)
        # A match search in the planes of floating-point numbers finds nothing and takes half of the time.
        self._glancing = make_glancing_compressor() if codec.level == 1 else self._searching
        self._entropy_coder = make_entropy_coder() if codec.level == 1 else None
        self._sampled = memoryview(bytearray(2 * _LONG_SAMPLE))
        self._before: Compressor | None = None

    def encode(self, block: memoryview, planes: int, out: memoryview, *, first: bool) -> tuple[int, str]:
        laid = self._lay(block, planes)
        self._before = self._choose(laid, planes, None if first else self._before)
        size = _compress_planes(laid, planes, self._before, out)
        return size, out[size - 4 : size].hex()

    def _lay(self, block: memoryview, planes: int) -> memoryview:
        if planes == 1:
            return block
        laid = self._laid[: len(block)]
        self._planes.split(block, planes, laid)
        return laid

    def _choose(self, laid: memoryview, planes: int, before: Compressor | None) -> Compressor:
        """Return the best compressor for a block, by samples of its planes and by the choice for the previous block.

        Entropy coding alone is enough if the lowest plane that is not constant is noise: it is not if some numbers are
        equal, zero or integers. The first block's sample is long enough to contain repeated rows; rows that are
        multiples of each other repeat in the exponents alone. Later samples show whether a block is like the first.
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

    Exponents and mantissas would otherwise share the tables of the zstd blocks that contain both. The earlier planes
    are mantissas only, and ending a block costs as much as encoding a small plane.
    """
    stride = len(laid) // planes
    if planes == 1 or stride % _ZSTD_BLOCK_BYTES == 0:
        return compressor.compress(laid, out)
    return compressor.compress_parts(laid, range(stride * (planes - max(1, planes // 4)), len(laid) + 1, stride), out)


class _Decoder:
    def __init__(self, block_bytes: int) -> None:
        self._planes = make_planes()
        self._laid = memoryview(empty(block_bytes, uint8).data)
        self._decompressor = make_decompressor()

    def decode(self, stored: Raw, check: str, planes: int, out: memoryview) -> None:
        if planes == 1:
            self._decompress(stored, check, out)
        else:
            laid = self._laid[: len(out)]
            self._decompress(stored, check, laid)
            self._planes.merge(laid, planes, out)

    def _decompress(self, stored: Raw, check: str, out: memoryview) -> None:
        frame = memoryview(stored)
        if frame[:4] != MAGIC or frame[-4:].hex() != check:
            raise BlockCorrupt("the bytes are not the expected zstd frame")
        try:
            header = zstandard.get_frame_parameters(frame)
            if header.content_size != len(out) or not header.has_checksum:
                raise BlockCorrupt("the zstd frame's content size differs from the block's")
            self._decompressor.decompress(frame, out)
        except zstandard.ZstdError as error:
            raise BlockCorrupt(f"the zstd frame is damaged: {error}") from error
