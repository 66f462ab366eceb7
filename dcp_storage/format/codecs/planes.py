"""Byte planes: the first bytes of all elements, then the second bytes, and so on (Parquet's BYTE_STREAM_SPLIT).

Uses blosc2's C library if it is installed (the extra `fast`), else numpy; the bytes are the same.
"""

import ctypes
import logging
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from numpy import array, copyto, empty, frombuffer, left_shift, right_shift, uint8
from numpy.typing import NDArray

from dcp_storage.raw import Raw, address_of

logger = logging.getLogger(__name__)


class Planes(Protocol):
    """Lays out elements in planes and back, for one thread. `raw` and `laid` are whole elements of `count` bytes."""

    def split(self, raw: Raw, count: int, laid: memoryview) -> None:
        """Write the planes of `raw` to `laid`, which has the same length."""

    def merge(self, laid: Raw, count: int, raw: memoryview) -> None:
        """Undo `split`."""


def make_planes() -> Planes:
    """Return the fastest implementation that is installed."""
    library = _blosc2()
    return NumpyPlanes() if library is None else BloscPlanes(library)


class NumpyPlanes:
    """Uses shifts and conversions, several times as fast as copying single bytes."""

    def __init__(self) -> None:
        self._scratch = empty(0, uint8)

    def split(self, raw: Raw, count: int, laid: memoryview) -> None:
        """Write the planes in one call, since each call takes and releases the GIL, which slows concurrent training."""
        elements = frombuffer(raw, f"<u{count}")
        lanes = frombuffer(laid, uint8).reshape(count, -1)
        right_shift(elements, _shifts(count), out=lanes, dtype=elements.dtype, casting="unsafe")

    def merge(self, laid: Raw, count: int, raw: memoryview) -> None:
        """Undo `split`."""
        lanes = frombuffer(laid, uint8).reshape(count, -1)
        elements = frombuffer(raw, f"<u{count}")
        if len(self._scratch) < len(laid):
            self._scratch = empty(len(laid), uint8)
        shifted = self._scratch[: len(laid)].view(elements.dtype)
        copyto(elements, lanes[0])
        for lane, shift in zip(lanes[1:], _shifts(count)[1:], strict=True):
            copyto(shifted, lane)
            left_shift(shifted, shift, out=shifted)
            elements |= shifted


class BloscPlanes:
    """Uses SIMD instructions, without the GIL."""

    def __init__(self, library: Any) -> None:
        self._shuffle, self._unshuffle = library.blosc2_shuffle, library.blosc2_unshuffle

    def split(self, raw: Raw, count: int, laid: memoryview) -> None:
        """Write the planes."""
        self._shuffle(count, len(raw), address_of(raw), address_of(laid))

    def merge(self, laid: Raw, count: int, raw: memoryview) -> None:
        """Undo `split`."""
        self._unshuffle(count, len(laid), address_of(laid), address_of(raw))


@cache
def _shifts(planes: int) -> NDArray[Any]:
    return array(range(0, 8 * planes, 8), f"<u{planes}").reshape(-1, 1)


@cache
def _blosc2() -> Any:
    """Return the C library in blosc2's wheels, or `None` if there is no usable one."""
    try:
        return _load_blosc2()
    except (OSError, AttributeError) as error:
        logger.warning("cannot use blosc2's library (%s): byte planes fall back to numpy, which is slower", error)
        return None


def _load_blosc2() -> Any:
    package = find_spec("blosc2")  # importing it is slow
    for place in package.submodule_search_locations or () if package else ():
        for path in sorted(Path(place, "lib").glob("libblosc2.*")):
            if path.suffix in {".so", ".dylib"}:
                library = ctypes.CDLL(str(path))
                for name in ("blosc2_shuffle", "blosc2_unshuffle"):
                    getattr(library, name).argtypes = (ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)
                return library
    return None
