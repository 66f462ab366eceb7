import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_storage.geometry import (
    Box,
    boxes_of_run,
    contains,
    find_overlap,
    flat_extent,
    intersect,
    subtract,
    tiling_fault,
    whole,
)

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def boxes_in(draw, shape):
    starts = [draw(st.integers(0, extent)) for extent in shape]
    return Box(tuple(starts), tuple(draw(st.integers(0, extent - o)) for extent, o in zip(shape, starts, strict=True)))


@st.composite
def shape_and_boxes(draw, count):
    shape = draw(shapes)
    return shape, [draw(boxes_in(shape)) for _ in range(count)]


def painted(shape, boxes):
    canvas = np.zeros(shape, int)
    for box in boxes:
        canvas[box.slices] += 1
    return canvas


@given(shape_and_boxes(2))
def test_intersect_is_what_both_boxes_paint(case):
    shape, (a, b) = case
    shared = intersect(a, b)
    both = painted(shape, [a, b]) == 2
    assert np.array_equal(both, painted(shape, [shared] if shared else []) == 1)


@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape), st.integers(0, 700), st.integers(0, 700))))
def test_boxes_of_run_are_the_run_in_order(case):
    shape, start, stop = case
    numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    start, stop = min(start, numbers.size), min(stop, numbers.size)
    boxes = list(boxes_of_run(shape, start, stop))
    found = np.concatenate([numbers[box.slices].ravel() for box in boxes]) if boxes else np.empty(0, int)
    assert found.tolist() == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(shape_and_boxes(1))
def test_flat_extent_is_as_long_as_the_box_exactly_where_it_is_contiguous(case):
    shape, [box] = case
    if not box.numel:
        return
    numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape)[box.slices].ravel()
    contiguous = bool((np.diff(numbers) == 1).all())
    start, stop = flat_extent(shape, box)
    assert (start, stop) == (numbers[0], numbers[-1] + 1)
    assert (stop - start == box.numel) is contiguous


@given(shape_and_boxes(4))
def test_subtract_leaves_what_no_hole_covers_and_its_boxes_are_disjoint(case):
    shape, (box, *holes) = case
    left = painted(shape, subtract(box, holes))
    assert np.array_equal(left, (painted(shape, [box]) == 1) & (painted(shape, holes) == 0))


@given(shape_and_boxes(4))
def test_overlap_is_found_exactly_where_one_is(case):
    shape, boxes = case
    found = find_overlap(boxes)
    assert (found is not None) == bool((painted(shape, boxes) > 1).any())
    assert found is None or intersect(*found)


@given(shape_and_boxes(4))
def test_only_a_tiling_has_no_fault(case):
    shape, boxes = case
    assert (tiling_fault(shape, boxes) is None) == bool((painted(shape, boxes) == 1).all())


def test_faults_name_the_boxes():
    assert tiling_fault((4, 2), [Box((0, 0), (3, 2))]) == "no part covers [3:4, 0:2] of shape [4, 2]"
    assert "[0:3, 0:2] and [2:4, 0:2] overlap" in tiling_fault((4, 2), [Box((0, 0), (3, 2)), Box((2, 0), (2, 2))])
    assert "[3:5, 0:2] is outside" in tiling_fault((4, 2), [Box((3, 0), (2, 2))])
    assert tiling_fault((), []) == "no part covers [] of shape []"


@pytest.mark.parametrize("box", [Box((0,), (3,)), Box((-1, 0), (1, 1)), Box((0, 0), (1, -1)), Box((4, 0), (1, 1))])
def test_contains_refuses_boxes_that_are_not_inside(box):
    assert not contains((4, 2), box)


def test_a_tensor_without_dimensions_is_one_element():
    assert whole(()).numel == 1
    assert tiling_fault((), [whole(())]) is None
    assert find_overlap([whole(()), whole(())])
