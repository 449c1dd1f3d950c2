"""Box arithmetic against numpy: a box is what its slices select from an array of flat indices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distavg.layout import (
    Box,
    BoxIndex,
    chunk_extent,
    cover_fault,
    divide,
    nested_extent,
    range_boxes,
)

Shape = tuple[int, ...]

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
FULL_SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def flat_indices(shape: Sequence[int]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


@st.composite
def boxes_in(draw: st.DrawFn, shape: Shape, min_size: int = 0) -> Box:
    offsets = tuple(draw(st.integers(0, n - min_size)) for n in shape)
    sizes = tuple(draw(st.integers(min_size, n - o)) for n, o in zip(shape, offsets, strict=True))
    return Box(offsets, sizes)


@st.composite
def two_boxes(draw: st.DrawFn) -> tuple[Shape, Box, Box]:
    shape = draw(SHAPES)
    return shape, draw(boxes_in(shape)), draw(boxes_in(shape))


@st.composite
def flat_ranges(draw: st.DrawFn) -> tuple[Shape, int, int]:
    shape = draw(SHAPES)
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


# ------------------------------------------------------------------------------------------ Box


@given(two_boxes())
def test_intersection_is_the_common_elements(case: tuple[Shape, Box, Box]) -> None:
    shape, a, b = case
    indices = flat_indices(shape)
    expected = set(indices[a.slices()].ravel()) & set(indices[b.slices()].ravel())
    common = a.intersect(b)
    assert (set(indices[common.slices()].ravel()) if common else set()) == expected
    assert common == b.intersect(a)


@given(st.data())
def test_a_box_contains_what_lies_in_it(data: st.DataObject) -> None:
    shape = data.draw(FULL_SHAPES)
    a, b = data.draw(boxes_in(shape)), data.draw(boxes_in(shape, min_size=1))
    indices = flat_indices(shape)
    is_subset = set(indices[b.slices()].ravel()) <= set(indices[a.slices()].ravel())
    assert a.contains(b) is is_subset


@given(two_boxes())
def test_relative_to_reads_the_same_elements_from_a_part(case: tuple[Shape, Box, Box]) -> None:
    shape, a, b = case
    indices = flat_indices(shape)
    if common := a.intersect(b):
        inner = common.relative_to(a)
        np.testing.assert_array_equal(indices[a.slices()][inner.slices()], indices[common.slices()])
        assert inner.shifted(a.offsets) == common


@given(two_boxes())
def test_numel_and_ends(case: tuple[Shape, Box, Box]) -> None:
    shape, box, _ = case
    assert box.numel == flat_indices(shape)[box.slices()].size
    assert box.ends == tuple(s.stop for s in box.slices())
    assert Box.whole(shape).contains(box)


# --------------------------------------------------------------------------------- chunk_extent


@given(st.integers(0, 40), st.integers(1, 9))
def test_chunk_extent_is_torch_chunk(length: int, parts: int) -> None:
    chunks = torch.arange(length).chunk(parts)
    for index in range(parts):
        offset, size = chunk_extent(length, parts, index)
        found = torch.arange(length)[offset : offset + size]
        expected = chunks[index] if index < len(chunks) else torch.arange(0)
        assert found.tolist() == expected.tolist()
        assert 0 <= offset <= length


# ---------------------------------------------------------------------------------- range_boxes


@given(flat_ranges())
def test_range_boxes_are_the_range_in_flat_order(case: tuple[Shape, int, int]) -> None:
    shape, start, stop = case
    boxes = list(range_boxes(shape, start, stop))
    indices = flat_indices(shape)
    found = [int(i) for box in boxes for i in indices[box.slices()].ravel()]
    assert found == list(range(start, stop))
    assert all(box.numel for box in boxes)


@given(flat_ranges())
def test_range_boxes_are_few(case: tuple[Shape, int, int]) -> None:
    shape, start, stop = case
    assert len(list(range_boxes(shape, start, stop))) <= max(1, 2 * len(shape) - 1)


def test_range_boxes_reaches_its_bound() -> None:
    assert len(list(range_boxes((4, 4, 4), 1, 63))) == 5


@given(flat_ranges())
def test_range_boxes_are_contiguous_views(case: tuple[Shape, int, int]) -> None:
    shape, start, stop = case
    whole = torch.empty(shape)
    for box in range_boxes(shape, start, stop):
        assert whole[box.slices()].is_contiguous()


# --------------------------------------------------------------------------------------- divide


@given(st.lists(SHAPES, max_size=5), st.integers(1, 7))
def test_divide_gives_every_element_to_one_part(shapes: list[Shape], parts: int) -> None:
    division = divide(shapes, parts)
    assert len(division) == parts
    indices = [flat_indices(shape) for shape in shapes]
    found = [
        (index, int(i))
        for part in division
        for index, box in part
        for i in indices[index][box.slices()].ravel()
    ]
    # Concatenated in order, and each element once.
    assert found == [(i, j) for i, shape in enumerate(shapes) for j in range(math.prod(shape))]
    for part in division:
        for index, box in part:
            assert torch.empty(shapes[index])[box.slices()].is_contiguous()
            assert box.numel


@given(st.lists(SHAPES, max_size=5), st.integers(1, 7))
def test_divide_is_balanced(shapes: list[Shape], parts: int) -> None:
    total = sum(math.prod(shape) for shape in shapes)
    unit = max((shape[-1] for shape in shapes if len(shape) > 1 and math.prod(shape)), default=1)
    for part in divide(shapes, parts):
        # Each of a part's two cuts is at most half a unit away from the even division.
        assert sum(box.numel for _, box in part) < total / parts + unit + 1e-9
        assert sum(box.numel for _, box in part) > total / parts - unit - 1e-9


@given(st.lists(FULL_SHAPES, min_size=1, max_size=4), st.integers(2, 7))
def test_divide_cuts_between_rows(shapes: list[Shape], parts: int) -> None:
    for part in divide(shapes, parts):
        for index, box in part:
            if len(shapes[index]) > 1:
                assert box.sizes[-1] == shapes[index][-1]


def test_divide_balances_stacked_experts() -> None:
    # Two experts over four ranks: cut within an expert, not only between experts.
    assert [[box.sizes for _, box in part] for part in divide([(2, 6, 4)], 4)] == [[(1, 3, 4)]] * 4


def test_divide_of_nothing() -> None:
    assert divide([], 3) == [[], [], []]
    assert divide([(0,), (3, 0)], 2) == [[], []]
    assert divide([()], 2) == [[], [(0, Box((), ()))]]


# ---------------------------------------------------------------------------------- cover_fault


@st.composite
def partitions(draw: st.DrawFn) -> tuple[Shape, list[Box]]:
    """An exact cover, made by cutting boxes in two again and again."""
    shape = draw(FULL_SHAPES)
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dims = [d for d, size in enumerate(box.sizes) if size > 1]
        if not dims:
            boxes.append(box)
            continue
        dim = draw(st.sampled_from(dims))
        cut = draw(st.integers(1, box.sizes[dim] - 1))
        for low, size in ((0, cut), (cut, box.sizes[dim] - cut)):
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[dim] += low
            sizes[dim] = size
            boxes.append(Box(tuple(offsets), tuple(sizes)))
    return shape, draw(st.permutations(boxes))


@given(partitions())
def test_an_exact_cover_has_no_fault(case: tuple[Shape, list[Box]]) -> None:
    shape, boxes = case
    assert cover_fault(shape, boxes) is None
    empty = Box((0,) * len(shape), (0,) * len(shape))
    if shape:
        assert cover_fault(shape, [*boxes, empty]) is None


@given(partitions(), st.data())
def test_a_lost_box_is_a_gap(case: tuple[Shape, list[Box]], data: st.DataObject) -> None:
    shape, boxes = case
    lost = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
    total = math.prod(shape)
    assert cover_fault(shape, boxes) == f"{lost.numel} of {total} elements are in no box"


@given(partitions(), st.data())
def test_an_overlap_is_found(case: tuple[Shape, list[Box]], data: st.DataObject) -> None:
    shape, boxes = case
    again = data.draw(boxes_in(shape, min_size=1))
    fault = cover_fault(shape, data.draw(st.permutations([*boxes, again])))
    assert fault is not None
    assert "overlap" in fault


@given(st.data())
def test_cover_fault_is_exactly_right(data: st.DataObject) -> None:
    shape = data.draw(FULL_SHAPES)
    boxes = data.draw(st.lists(boxes_in(shape), max_size=4))
    counts = np.zeros(shape, dtype=int)
    for box in boxes:
        counts[box.slices()] += 1
    assert (cover_fault(shape, boxes) is None) is bool((counts == 1).all())


def test_an_overlap_and_a_gap_of_equal_volume_are_found() -> None:
    # The volume is right, so only the search for overlaps can find it.
    fault = cover_fault((4, 2), [Box((0, 0), (3, 2)), Box((2, 0), (1, 2))])
    assert fault == "two boxes overlap at (2, 0) in sizes (1, 2)"


@pytest.mark.parametrize("box", [Box((3, 0), (2, 2)), Box((0,), (4,)), Box((0, 0, 0), (4, 2, 1))])
def test_a_box_outside_the_tensor_is_found(box: Box) -> None:
    assert cover_fault((4, 2), [box]) == (
        f"the box at {box.offsets} of sizes {box.sizes} is outside the tensor"
    )


@given(st.data())
def test_the_boxes_that_meet_another_are_found(data: st.DataObject) -> None:
    shape = data.draw(FULL_SHAPES)
    boxes = data.draw(st.lists(boxes_in(shape), max_size=6))
    wanted = data.draw(boxes_in(shape))
    found = BoxIndex(boxes).meeting(wanted)
    assert found == [number for number, box in enumerate(boxes) if box.intersect(wanted)]


def test_few_of_many_boxes_are_looked_at() -> None:
    """Of rows, of columns and of a grid: not each of the many ranks' for each of the many."""
    rows = [Box((2 * i, 0), (2, 8)) for i in range(1000)]
    columns = [Box((0, 2 * i), (8, 2)) for i in range(1000)]
    grid = [Box((4 * i, 4 * j), (4, 4)) for i in range(30) for j in range(30)]
    for boxes, wanted, most in (
        (rows, Box((501, 0), (2, 8)), 4),
        (columns, Box((0, 501), (8, 2)), 4),
        (grid, Box((13, 13), (4, 4)), 90),
    ):
        index = BoxIndex(boxes)
        with mock.patch.object(Box, "intersect", autospec=True, side_effect=Box.intersect) as seen:
            assert 0 < len(index.meeting(wanted)) <= 4
        assert seen.call_count <= most


def test_cover_of_zero_dims() -> None:
    one = Box((), ())
    assert cover_fault((), [one]) is None
    assert cover_fault((), [one, one]) == "two boxes overlap"
    assert cover_fault((), []) == "1 of 1 elements are in no box"
    assert cover_fault((3, 0), []) is None


@given(st.integers(0, 40), st.lists(st.integers(1, 4), max_size=3))
def test_nested_cuts_are_those_of_torch_chunk(length: int, parts: list[int]) -> None:
    for place in itertools.product(*(range(n) for n in parts)):
        rows = torch.arange(length)
        for n, index in zip(parts, place, strict=True):
            chunks = rows.chunk(n) if len(rows) else ()
            rows = chunks[index] if index < len(chunks) else rows[:0]
        offset, size = nested_extent(length, list(zip(parts, place, strict=True)))
        assert list(range(offset, offset + size)) == rows.tolist()
