"""One block at a time: raw little-endian element bytes to one zstd frame (or to themselves) and back.

Encoders and decoders hold scratch memory and a zstd context: one for each thread, never shared. The hot calls (zstd,
numpy on whole blocks) release the GIL.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import zstandard
from msgspec import Struct
from numpy import array, copyto, empty, frombuffer, left_shift, may_share_memory, right_shift, uint8
from numpy.typing import NDArray
from xxhash import xxh3_64

from dcp_storage.config import Codec
from dcp_storage.errors import BlockCorrupt

Raw = bytes | bytearray | memoryview

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
CHECK_CHARS = {"zstd": 8, "none": 16}
"""Hexadecimal characters of one block's check value, by compression."""

_ZSTD_BLOCK_BYTES = 128 << 10
"""What zstd compresses with one set of tables, at most."""


def plane_count(itemsize: int, *, byte_planes: bool) -> int:
    """Return how many byte planes elements of `itemsize` bytes are laid out in; 1 is none."""
    return itemsize if byte_planes and itemsize in {2, 4, 8} else 1


def encoded_limit(raw_bytes: int, compression: str, blocks: int = 1) -> int:
    """Return the most bytes that so many blocks, of `raw_bytes` together, may be stored in."""
    # zstd's bound for incompressible input, and room for the frames' headers and checksums.
    return raw_bytes + (raw_bytes >> 7) + 256 * blocks if compression == "zstd" else raw_bytes


class Encoded(Struct, frozen=True, gc=False):
    """Consecutive blocks of one item: their stored sizes and, in hexadecimal, their check values."""

    lengths: tuple[int, ...]
    checks: str


class BlockEncoder:
    """Encodes blocks for one thread."""

    def __init__(self, codec: Codec) -> None:
        self._compression = codec.compression
        self._block_bytes = codec.block_bytes
        self._laid = empty(codec.block_bytes, uint8)
        self._searching = _compressor(codec.level)
        # A search for matches in the planes of floating-point numbers finds nothing and takes half of the time.
        self._entropy_only = (
            _compressor(1, hash_log=6, chain_log=6, min_match=7) if codec.level == 1 else self._searching
        )

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
        lengths, checks, filled = [], [], 0
        for start in range(0, len(data), self._block_bytes):
            block = data[start : start + self._block_bytes]
            size, check = self._encode_block(block, planes, out[filled:])
            lengths.append(size)
            checks.append(check)
            filled += size
        return Encoded(tuple(lengths), "".join(checks))

    def _encode_block(self, block: memoryview, planes: int, out: memoryview) -> tuple[int, str]:
        if self._compression == "none":
            copy_bytes(block, out[: len(block)])
            return len(block), _check_value(block)
        if planes == 1:
            size = _compress(self._searching, block, out)
        else:
            size = self._compress_planes(_split(block, planes, self._laid), planes, out)
        return size, out[size - 4 : size].hex()

    def _compress_planes(self, laid: memoryview, planes: int, out: memoryview) -> int:
        """Compress into one frame, whose zstd blocks end where the planes of exponents do.

        Exponents and mantissas would otherwise share the tables of the zstd blocks that hold some of both. The planes
        before hold mantissas only, and an end costs as much as the encoding of a small plane.
        """
        stride = len(laid) // planes
        if stride % _ZSTD_BLOCK_BYTES == 0:
            return _compress(self._entropy_only, laid, out)
        frame = self._entropy_only.compressobj(size=len(laid))
        start = size = 0
        for stop in range(stride * (planes - max(1, planes // 4)), len(laid) + 1, stride):
            last = stop == len(laid)
            end = zstandard.COMPRESSOBJ_FLUSH_FINISH if last else zstandard.COMPRESSOBJ_FLUSH_BLOCK
            for part in (frame.compress(laid[start:stop]), frame.flush(end)):
                out[size : size + len(part)] = part
                size += len(part)
            start = stop
        return size


class BlockDecoder:
    """Decodes blocks for one thread."""

    def __init__(self, compression: str, block_bytes: int) -> None:
        self._compression = compression
        self._shifted = empty(block_bytes, uint8)
        self._decompressor = zstandard.ZstdDecompressor()

    def decode_into(self, stored: Raw, check: str, planes: int, out: memoryview) -> None:
        """Decode a block into `out`, whose length is the block's raw size; never allocate more than that.

        Raises:
            BlockCorrupt: The bytes are not the block that `check` was taken of. `out` may be partly written.
        """
        if self._compression == "none":
            if len(stored) != len(out) or _check_value(stored) != check:
                raise BlockCorrupt("the bytes do not match their check value")
            copy_bytes(stored, out)
            return
        raw = self._decompress(stored, check, len(out))
        if planes == 1:
            copy_bytes(raw, out)
        else:
            _merge(raw, planes, self._shifted, out)

    def _decompress(self, stored: Raw, check: str, raw_bytes: int) -> bytes:
        frame = memoryview(stored)
        if frame[:4] != ZSTD_MAGIC or frame[-4:].hex() != check:
            raise BlockCorrupt("the bytes are not the zstd frame that belongs here")
        try:
            header = zstandard.get_frame_parameters(frame)
            if header.content_size != raw_bytes or not header.has_checksum:
                raise BlockCorrupt("the zstd frame is of another size than its block")
            return self._decompressor.decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise BlockCorrupt(f"the zstd frame is damaged: {error}") from error


def _split(raw: Raw, planes: int, out: NDArray[uint8]) -> memoryview:
    """Return the bytes of `raw` plane by plane, in `out`: shifted and narrowed, several times as fast as byte copies.

    One call, since each takes and gives the GIL, which costs the training beside it.
    """
    elements = frombuffer(raw, f"<u{planes}")
    laid = out[: len(raw)]
    lanes = laid.reshape(planes, -1)
    right_shift(elements, _shifts(planes), out=lanes, dtype=elements.dtype, casting="unsafe")
    return memoryview(laid.data)


def _merge(laid: bytes, planes: int, scratch: NDArray[uint8], out: memoryview) -> None:
    """Undo `_split` into `out`."""
    lanes = frombuffer(laid, uint8).reshape(planes, -1)
    elements = frombuffer(out, f"<u{planes}")
    shifted = scratch[: len(laid)].view(elements.dtype)
    copyto(elements, lanes[0])
    for lane, shift in zip(lanes[1:], _shifts(planes)[1:], strict=True):
        copyto(shifted, lane)
        left_shift(shifted, shift, out=shifted)
        elements |= shifted


@cache
def _shifts(planes: int) -> NDArray[Any]:
    return array(range(0, 8 * planes, 8), f"<u{planes}").reshape(-1, 1)


def _check_value(raw: Raw) -> str:
    # The object releases the GIL while it hashes; xxhash's functions do not.
    return xxh3_64(raw).hexdigest()


def copy_bytes(raw: Raw, out: memoryview) -> None:
    """Copy without the GIL, unless the bytes were read to where they belong."""
    source, target = frombuffer(raw, uint8), frombuffer(out, uint8)
    if not may_share_memory(source, target):
        copyto(target, source)


def _compressor(level: int, **parameters: int) -> zstandard.ZstdCompressor:
    chosen = zstandard.ZstdCompressionParameters.from_level(
        level, write_content_size=True, write_checksum=True, write_dict_id=False, **parameters
    )
    return zstandard.ZstdCompressor(compression_params=chosen)


def _compress(compressor: zstandard.ZstdCompressor, raw: Raw, out: memoryview) -> int:
    """Compress in one call, and copy: a quarter quicker than zstd's streams, which copy what goes in."""
    frame = compressor.compress(raw)
    copy_bytes(frame, out[: len(frame)])
    return len(frame)
