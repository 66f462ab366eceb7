"""Basic tensor indexing, translated to the box to read."""

from numbers import Integral
from operator import index as index_of
from types import EllipsisType

from dcp_storage.geometry import Box, Shape

Index = int | slice | EllipsisType


def box_of(shape: Shape, index: tuple[Index, ...]) -> tuple[Box, tuple[int | slice, ...]]:
    """Return the bounding box of an index, and the index to apply within that box."""
    offsets: list[int] = []
    sizes: list[int] = []
    rest: list[int | slice] = []
    for dim, one in enumerate(_expand(shape, index)):
        extent = shape[dim]
        if isinstance(one, slice):
            start, stop, step = one.indices(extent)
            if step < 1:
                raise IndexError(f"a step of {step}; only positive steps are supported")
            offsets.append(start)
            sizes.append(max(0, stop - start))
            rest.append(slice(None, None, step))
        else:
            if not -extent <= one < extent:
                raise IndexError(f"index {one} is out of range in dimension {dim}, of size {extent}")
            offsets.append(one % extent)
            sizes.append(1)
            rest.append(0)
    return Box(tuple(offsets), tuple(sizes)), tuple(rest)


def _expand(shape: Shape, index: tuple[Index, ...]) -> list[int | slice]:
    """Return an index for each dimension.

    Raises:
        IndexError: There are too many indices, or one of an unsupported type.
    """
    given = [one for one in index if not isinstance(one, EllipsisType)]
    plain = all(isinstance(one, slice | Integral) and not isinstance(one, bool) for one in given)
    if not plain or len(index) > len(given) + 1:
        raise IndexError(f"{index!r}: use integers, slices and at most one `...`")
    if len(given) > len(shape):
        raise IndexError(f"{len(given)} indices for {len(shape)} dimensions")
    at = next((at for at, one in enumerate(index) if isinstance(one, EllipsisType)), len(given))
    filler = [slice(None)] * (len(shape) - len(given))
    # NumPy's small integers would overflow in the arithmetic of offsets.
    exact = [one if isinstance(one, slice) else index_of(one) for one in given]
    return [*exact[:at], *filler, *exact[at:]]
