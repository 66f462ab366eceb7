"""One block at a time: raw little-endian element bytes to one zstd frame (or to themselves) and back.

Encoders and decoders hold scratch memory and a zstd context: one for each thread, never shared. The hot calls (zstd,
numpy on whole blocks) release the GIL.
"""

import zstandard
from numpy import array, copyto, empty, frombuffer, left_shift, right_shift, uint8
from numpy.typing import NDArray
from xxhash import xxh3_64_hexdigest

from dcp_storage.config import Codec
from dcp_storage.errors import BlockCorrupt

Raw = bytes | bytearray | memoryview

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
CHECK_CHARS = {"zstd": 8, "none": 16}
"""Hexadecimal characters of one block's check value, by compression."""

MAX_PLANES = 8


def plane_count(itemsize: int, *, byte_planes: bool) -> int:
    """Return how many byte planes elements of `itemsize` bytes are laid out in; 1 is none."""
    return itemsize if byte_planes and itemsize in {2, 4, 8} else 1


def encoded_limit(raw_bytes: int, compression: str) -> int:
    """Return the most bytes that a block of `raw_bytes` may be stored in."""
    # zstd's bound for incompressible input, and room for the frame's header and checksum.
    return raw_bytes + (raw_bytes >> 7) + 256 if compression == "zstd" else raw_bytes


class BlockEncoder:
    """Encodes blocks for one thread."""

    def __init__(self, codec: Codec) -> None:
        self._compression = codec.compression
        self._scratch = _Scratch(codec.block_bytes)
        self._searching = _compressor(codec.level)
        # A search for matches in the planes of floating-point numbers finds nothing and takes half of the time.
        self._entropy_only = (
            _compressor(1, hash_log=6, chain_log=6, min_match=7) if codec.level == 1 else self._searching
        )

    def encode(self, raw: Raw, planes: int) -> tuple[bytes | memoryview, str]:
        """Return a block's stored bytes and its check value in hexadecimal.

        `raw` is at most `block_bytes` long and whole elements of `planes` bytes. With `compression="none"` the stored
        bytes are a view of `raw`.
        """
        if self._compression == "none":
            return memoryview(raw), xxh3_64_hexdigest(raw)
        if planes == 1:
            frame = self._searching.compress(raw)
        else:
            frame = self._compress_planes(self._scratch.split(raw, planes), planes)
        return frame, frame[-4:].hex()

    def _compress_planes(self, laid: memoryview, planes: int) -> bytes:
        """Compress into one frame whose zstd blocks end where planes do.

        Exponents and mantissas would otherwise share the tables of the zstd blocks (of 128 KiB) that hold some of both.
        """
        frame = self._entropy_only.compressobj(size=len(laid))
        parts = []
        stride = len(laid) // planes
        for start in range(0, len(laid), stride):
            parts.append(frame.compress(laid[start : start + stride]))
            last = start + stride == len(laid)
            parts.append(frame.flush() if last else frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        return b"".join(parts)


class BlockDecoder:
    """Decodes blocks for one thread."""

    def __init__(self, compression: str, block_bytes: int) -> None:
        self._compression = compression
        self._scratch = _Scratch(block_bytes)
        self._decompressor = zstandard.ZstdDecompressor()

    def decode_into(self, stored: Raw, check: str, planes: int, out: memoryview) -> None:
        """Decode a block into `out`, whose length is the block's raw size; never allocate more than that.

        Raises:
            BlockCorrupt: The bytes are not the block that `check` was taken of. `out` may be partly written.
        """
        if self._compression == "none":
            if len(stored) != len(out) or xxh3_64_hexdigest(stored) != check:
                raise BlockCorrupt("the bytes do not match their check value")
            out[:] = stored
            return
        raw = self._decompress(stored, check, len(out))
        if planes == 1:
            out[:] = raw
        else:
            self._scratch.merge(raw, planes, out)

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


class _Scratch:
    """Byte planes, by whole-block shifts and narrowing copies (several times the speed of strided byte copies)."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._planes = empty(0, uint8)
        self._shifted = empty(0, uint8)

    def split(self, raw: Raw, planes: int) -> memoryview:
        """Return the bytes of `raw` plane by plane, in memory that the next call uses again."""
        elements = frombuffer(raw, f"<u{planes}")
        out, shifted = self._room(len(raw))
        lanes, shifted = out.reshape(planes, -1), shifted.view(elements.dtype)
        copyto(lanes[0], elements, casting="unsafe")
        for plane in range(1, planes):
            right_shift(elements, _shift(plane, planes), out=shifted)
            copyto(lanes[plane], shifted, casting="unsafe")
        return memoryview(out.data)

    def merge(self, laid: bytes, planes: int, out: memoryview) -> None:
        """Undo `split` into `out`."""
        lanes = frombuffer(laid, uint8).reshape(planes, -1)
        elements = frombuffer(out, f"<u{planes}")
        shifted = self._room(len(laid))[1].view(elements.dtype)
        copyto(elements, lanes[0])
        for plane in range(1, planes):
            copyto(shifted, lanes[plane])
            left_shift(shifted, _shift(plane, planes), out=shifted)
            elements |= shifted

    def _room(self, size: int) -> tuple[NDArray[uint8], NDArray[uint8]]:
        if len(self._planes) < size:
            room = max(size, self._block_bytes)
            self._planes, self._shifted = empty(room, uint8), empty(room, uint8)
        return self._planes[:size], self._shifted[:size]


def _shift(plane: int, planes: int) -> NDArray[uint8]:
    return array(8 * plane, f"<u{planes}")


def _compressor(level: int, **parameters: int) -> zstandard.ZstdCompressor:
    chosen = zstandard.ZstdCompressionParameters.from_level(
        level, write_content_size=True, write_checksum=True, write_dict_id=False, **parameters
    )
    return zstandard.ZstdCompressor(compression_params=chosen)
