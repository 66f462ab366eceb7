"""zstd frames with content size and checksum, through zstd's C API if cffi is installed (the extra `fast`).

The C API writes straight into our memory, without the GIL, and can skip the match search. Otherwise zstandard's Python
API is used: slower, with frames of about the same size. Each coder is for one thread: sharing one crashes.

The result of `from_buffer` must not outlive a call: in a frame that an error's traceback keeps alive, it crashes
Python's cyclic garbage collector.
"""

from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from typing import Any, Protocol

import zstandard

from dcp_storage.raw import Raw, copy_bytes

_FFI: Any = None
_LIB: Any = None
with suppress(ImportError):
    _backend: Any = import_module("zstandard.backend_cffi")
    _FFI, _LIB = _backend.ffi, _backend.lib

MAGIC = b"\x28\xb5\x2f\xfd"

_ENTROPY_ONLY = -131072
"""zstd's lowest level: it does nothing but entropy coding, if literals are to be compressed."""


class Compressor(Protocol):
    """Compresses for one thread."""

    def compress(self, raw: Raw, out: memoryview) -> int:
        """Write one frame to the start of `out`, and return its size in bytes."""

    def compress_parts(self, raw: memoryview, stops: Iterable[int], out: memoryview) -> int:
        """Like `compress`, but end a zstd block at each of `stops`, the last of which is the end of `raw`."""


class Decompressor(Protocol):
    """Decompresses for one thread."""

    def decompress(self, frame: memoryview, out: memoryview) -> None:
        """Fill `out` with the whole content of one frame.

        Raises:
            zstandard.ZstdError: The frame is damaged, or more bytes follow it.
        """


def make_compressor(level: int) -> Compressor:
    """Return a compressor for a level, 1 to 22."""
    return PlainCompressor(level) if _LIB is None else NativeCompressor(level)


def make_glancing_compressor() -> Compressor:
    """Return a compressor that finds only long, nearby matches, of which planes of weights have hardly any."""
    if _LIB is None:
        return PlainCompressor(1, hash_log=6, chain_log=6, min_match=7)
    return NativeCompressor(1, hashLog=6, chainLog=6, minMatch=7)


def make_entropy_coder() -> Compressor | None:
    """Return a compressor that does not search for matches at all, or `None` without zstd's C API."""
    return None if _LIB is None else NativeCompressor(_ENTROPY_ONLY, literalCompressionMode=_LIB.ZSTD_ps_enable)


def make_decompressor() -> Decompressor:
    """Return a decompressor."""
    return PlainDecompressor() if _LIB is None else NativeDecompressor()


class NativeCompressor:
    """Uses `ZSTD_CCtx`."""

    def __init__(self, level: int, **parameters: int) -> None:
        self._context = _FFI.gc(_LIB.ZSTD_createCCtx(), _LIB.ZSTD_freeCCtx)
        for name, value in {"compressionLevel": level, "checksumFlag": 1, **parameters}.items():
            _check(_LIB.ZSTD_CCtx_setParameter(self._context, getattr(_LIB, f"ZSTD_c_{name}"), value))
        self._taken, self._made = _FFI.new("size_t *"), _FFI.new("size_t *")

    def compress(self, raw: Raw, out: memoryview) -> int:
        """Write one frame to the start of `out`, and return its size in bytes."""
        pointer = _FFI.from_buffer
        return _check(_LIB.ZSTD_compress2(self._context, pointer(out), len(out), pointer(raw), len(raw)))

    def compress_parts(self, raw: memoryview, stops: Iterable[int], out: memoryview) -> int:
        """Like `compress`, but end a zstd block at each of `stops`, the last of which is the end of `raw`."""
        _check(_LIB.ZSTD_CCtx_reset(self._context, _LIB.ZSTD_reset_session_only))
        _check(_LIB.ZSTD_CCtx_setPledgedSrcSize(self._context, len(raw)))
        start = size = 0
        for stop in stops:
            end = _LIB.ZSTD_e_end if stop == len(raw) else _LIB.ZSTD_e_flush
            size += self._take(raw[start:stop], end, out[size:])
            start = stop
        return size

    def _take(self, raw: memoryview, end: int, out: memoryview) -> int:
        pointer, taken, made = _FFI.from_buffer, self._taken, self._made
        taken[0] = made[0] = 0
        left = _LIB.ZSTD_compressStream2_simpleArgs(
            self._context, pointer(out), len(out), made, pointer(raw), len(raw), taken, end
        )
        if _check(left):
            raise zstandard.ZstdError("a frame is larger than zstd's own bound")
        return int(made[0])


class PlainCompressor:
    """Uses zstandard's `ZstdCompressor`, which returns new memory each time."""

    def __init__(self, level: int, **parameters: int) -> None:
        chosen = zstandard.ZstdCompressionParameters.from_level(
            level, write_content_size=True, write_checksum=True, write_dict_id=False, **parameters
        )
        self._compressor = zstandard.ZstdCompressor(compression_params=chosen)

    def compress(self, raw: Raw, out: memoryview) -> int:
        """Write one frame in one call, which is a quarter faster than zstd's streams, as these copy their input."""
        frame = self._compressor.compress(raw)
        copy_bytes(frame, out[: len(frame)])
        return len(frame)

    def compress_parts(self, raw: memoryview, stops: Iterable[int], out: memoryview) -> int:
        """Like `compress`, but end a zstd block at each of `stops`, the last of which is the end of `raw`."""
        frame = self._compressor.compressobj(size=len(raw))
        start = size = 0
        for stop in stops:
            last = stop == len(raw)
            end = zstandard.COMPRESSOBJ_FLUSH_FINISH if last else zstandard.COMPRESSOBJ_FLUSH_BLOCK
            for part in (frame.compress(raw[start:stop]), frame.flush(end)):
                out[size : size + len(part)] = part
                size += len(part)
            start = stop
        return size


class NativeDecompressor:
    """Uses `ZSTD_DCtx`."""

    def __init__(self) -> None:
        self._context = _FFI.gc(_LIB.ZSTD_createDCtx(), _LIB.ZSTD_freeDCtx)

    def decompress(self, frame: memoryview, out: memoryview) -> None:
        """Fill `out` with the whole content of one frame."""
        pointer = _FFI.from_buffer
        if _check(_LIB.ZSTD_findFrameCompressedSize(pointer(frame), len(frame))) != len(frame):
            raise zstandard.ZstdError("more bytes follow the frame")
        filled = _LIB.ZSTD_decompressDCtx(self._context, pointer(out), len(out), pointer(frame), len(frame))
        if _check(filled) != len(out):
            raise zstandard.ZstdError("the frame's content is shorter than its header says")


class PlainDecompressor:
    """Uses zstandard's `ZstdDecompressor`, which returns new memory each time."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor()

    def decompress(self, frame: memoryview, out: memoryview) -> None:
        """Fill `out` with the whole content of one frame."""
        copy_bytes(self._decompressor.decompress(frame, allow_extra_data=False), out)


def _check(code: Any) -> int:
    if _LIB.ZSTD_isError(code):
        raise zstandard.ZstdError(_FFI.string(_LIB.ZSTD_getErrorName(code)).decode())
    return int(code)
