"""Columns and layouts by their rows, as tests write them."""

from collections.abc import Iterable, Sequence

import numpy as np

from dcp_storage.format.manifest.columns import Columns, numbers, texts
from dcp_storage.format.manifest.draft import layout_of
from dcp_storage.format.manifest.schema import Layout, Segment
from dcp_storage.geometry import Box, Shape


def columns_of(items: Iterable[Sequence[Segment]], chars: int = 8) -> Columns:
    """Return the columns of items by their segments."""
    items = list(items)
    segments = [segment for item in items for segment in item]
    return Columns(
        numbers(map(len, items)),
        numbers(len(segment.lengths) for segment in segments),
        numbers(segment.object for segment in segments),
        numbers(segment.offset for segment in segments),
        numbers(length for segment in segments for length in segment.lengths),
        texts([segment.checks for segment in segments], chars),
        texts([], 1),
    )


def arrays_of(size: Shape, boxes: Sequence[Box]):
    """Return the offsets and the sizes of boxes, as arrays."""
    return [np.array([box[at] for box in boxes], np.int64).reshape(len(boxes), len(size)) for at in (0, 1)]


def layout(size: Shape, boxes: Sequence[Box]) -> Layout:
    """Return how a frame says what boxes are."""
    return layout_of(size, *arrays_of(size, boxes))
