"""The load plan: any layout of saved boxes into any layout of wanted ones, without a disk."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distavg.checkpoint import plan
from distavg.checkpoint.plan import Copy, Read, Straight, plan_reads
from distavg.layout import Box, chunk_extent, cover_fault, divide, range_boxes

Shape = tuple[int, ...]

ITEM_TYPES = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
SHAPES = st.lists(st.integers(1, 7), max_size=4).map(tuple)


# ---------------------------------------------------------------------------- layouts of one tensor


def chunked(shape: Shape, dim: int, parts: int) -> list[Box]:
    """As DTensor's Shard(dim) over this many ranks; uneven, and some empty."""
    boxes = []
    for index in range(parts):
        offset, size = chunk_extent(shape[dim], parts, index)
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[dim], sizes[dim] = offset, size
        boxes.append(Box(tuple(offsets), tuple(sizes)))
    return boxes


@st.composite
def layouts(draw: st.DrawFn, shape: Shape) -> list[Box]:
    """Boxes that cover the tensor once, as some wrapper or other would cut it."""
    kind = draw(st.sampled_from(["whole", "chunks", "grid", "ranges", "divided"]))
    parts = draw(st.integers(1, 6))
    total = math.prod(shape)
    if kind == "chunks" and shape:
        boxes = chunked(shape, draw(st.integers(0, len(shape) - 1)), parts)
    elif kind == "grid" and len(shape) > 1:
        rows, columns = chunked(shape, 0, parts), chunked(shape, 1, draw(st.integers(1, 4)))
        boxes = [each for row in rows for col in columns if (each := row.intersect(col))]
    elif kind == "ranges":
        cuts = sorted(draw(st.lists(st.integers(0, total), min_size=parts - 1, max_size=parts)))
        edges = [0, *cuts, total]
        boxes = [
            box
            for start, stop in itertools.pairwise(edges)
            for box in range_boxes(shape, start, stop)
        ]
    elif kind == "divided":
        boxes = [box for part in divide([shape], parts) for _, box in part]
    else:
        boxes = [Box.whole(shape)]
    assert cover_fault(shape, boxes) is None
    return boxes


@st.composite
def reshards(draw: st.DrawFn) -> tuple[Shape, list[Box], list[Box]]:
    shape = draw(SHAPES)
    return shape, draw(layouts(shape)), draw(layouts(shape))


# ------------------------------------------------------------------------------ carrying out


def carry_out(data: np.ndarray, reads: list[Read], target: np.ndarray, times: np.ndarray) -> None:
    """What a reader does: `data` are the elements of the saved box as they lie in the file."""
    for read in reads:
        assert read.begin % data.itemsize == read.nbytes % data.itemsize == 0
        buffer = data.view(np.uint8)[read.begin : read.begin + read.nbytes].view(data.dtype)
        assert buffer.nbytes == read.nbytes > 0
        if read.straight is not None:
            assert not read.copies
            for part in straight_parts(read, data, target.reshape(-1)):
                times.reshape(-1)[part] += 1
        for copy in read.copies:
            array = buffer[copy.start : copy.start + math.prod(copy.sizes)].reshape(copy.sizes)
            target[copy.target.slices()] = array[copy.source.slices()]
            times[copy.target.slices()] += 1


def straight_parts(read: Read, data: np.ndarray, target: np.ndarray) -> Iterator[slice]:
    """The same by small reads of whole blocks, and by one of exactly what is wanted."""
    parts = list(read.split(2 * plan.BLOCK_BYTES, data.itemsize))
    check_blocks([part for part, _ in parts], data.nbytes, plan.BLOCK_BYTES, 2 * plan.BLOCK_BYTES)
    assert sum(part.nbytes for part, _ in parts) == read.nbytes
    for part, (skip, numel, place) in parts:
        items = data[part.begin // data.itemsize :][: part.nbytes // data.itemsize]
        target[place : place + numel] = items[skip : skip + numel]
        yield slice(place, place + numel)
    exact = read.narrowed(data.itemsize)
    skip, numel, place = exact.straight
    assert (skip, numel * data.itemsize) == (0, exact.nbytes)
    found = data[exact.begin // data.itemsize :][:numel]
    np.testing.assert_array_equal(target[place : place + numel], found)


def check_blocks(reads: list[Read], total_bytes: int, block_bytes: int, buffer_bytes: int) -> None:
    """Whole blocks in ascending order, none twice, none in vain."""
    end = -1
    for read in reads:
        assert read.begin == read.first_block * block_bytes
        assert read.nbytes % block_bytes == 0 or read.begin + read.nbytes == total_bytes
        assert read.begin + read.nbytes <= total_bytes
        assert read.nbytes <= buffer_bytes or read.straight is not None
        assert read.begin >= end
        end = read.begin + read.nbytes


@given(
    reshards(),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([8, 16, 40, 2**18]),
    st.integers(1, 5),
    st.booleans(),
)
def test_every_layout_into_every_layout(
    case: tuple[Shape, list[Box], list[Box]],
    item_bytes: int,
    block_bytes: int,
    blocks: int,
    is_flat: bool,
) -> None:
    shape, saved_boxes, wanted_boxes = case
    whole = np.arange(1, 1 + math.prod(shape), dtype=np.int64).reshape(shape)
    whole = whole.astype(ITEM_TYPES[item_bytes])  # wraps around in int8, alike on both sides
    with patch.object(plan, "BLOCK_BYTES", block_bytes):
        for wanted in wanted_boxes:
            target = np.zeros(wanted.sizes, whole.dtype)
            times = np.zeros(wanted.sizes, int)
            for saved in saved_boxes:
                data = np.ascontiguousarray(whole[saved.slices()]).reshape(-1)
                reads = plan_reads(saved, wanted, item_bytes, blocks * block_bytes, is_flat=is_flat)
                check_blocks(reads, data.nbytes, block_bytes, blocks * block_bytes)
                assert all(read.copies or read.straight for read in reads)
                carry_out(data, reads, target, times)
            np.testing.assert_array_equal(target, whole[wanted.slices()])
            assert (times == 1).all()


def test_what_lies_in_one_piece_is_read_straight_to_its_place() -> None:
    """Rows 3 to 8 of ten rows of four, in blocks of four elements, into rows 2 to 9."""
    with patch.object(plan, "BLOCK_BYTES", 16):
        saved, wanted = Box((3, 0), (6, 4)), Box((2, 0), (8, 4))
        reads = plan_reads(saved, wanted, 4, 64, is_flat=True)
        assert reads == [Read(0, 0, 96, (), Straight(0, 24, 4))]  # however small the buffer
        assert list(reads[0].split(64, 4)) == [
            (Read(0, 0, 64, ()), Straight(0, 16, 4)),
            (Read(4, 64, 32, ()), Straight(0, 8, 20)),
        ]
        # Columns do not lie so.
        for box in (Box((3, 1), (6, 3)), Box((3, 0), (6, 2))):
            assert all(r.straight is None for r in plan_reads(saved, box, 4, 64, is_flat=True))
        # Blocks of which a part is wanted are apart.
        assert plan_reads(Box((0,), (14,)), Box((3,), (8,)), 4, 64, is_flat=True) == [
            Read(0, 0, 16, (), Straight(3, 1, 0)),
            Read(1, 16, 16, (), Straight(0, 4, 1)),
            Read(2, 32, 16, (), Straight(0, 3, 5)),
        ]


@given(reshards(), st.sampled_from([8, 16, 40]))
def test_only_blocks_with_wanted_elements_are_read(
    case: tuple[Shape, list[Box], list[Box]], block_bytes: int
) -> None:
    shape, saved_boxes, wanted_boxes = case
    items = block_bytes // 4
    with patch.object(plan, "BLOCK_BYTES", block_bytes):
        for saved in saved_boxes:
            for wanted in wanted_boxes:
                is_wanted = np.zeros(shape, bool)
                is_wanted[wanted.slices()] = True
                flat = is_wanted[saved.slices()].reshape(-1)
                expected = {
                    index
                    for index in range(-(-flat.size // items))
                    if flat[index * items : (index + 1) * items].any()
                }
                found = [
                    read.first_block + i
                    for read in plan_reads(saved, wanted, 4, 3 * block_bytes)
                    for i in range(-(-read.nbytes // block_bytes))
                ]
                assert found == sorted(expected)


def test_a_plan_in_full() -> None:
    """Columns 1 and 2 of three rows of four, in blocks of two elements, two blocks a read."""
    with patch.object(plan, "BLOCK_BYTES", 8):
        reads = plan_reads(Box((2, 0), (3, 4)), Box((0, 1), (9, 2)), 4, 16)
    row = Box((0, 1), (1, 2))
    assert reads == [
        Read(2 * i, 16 * i, 16, (Copy(0, (1, 4), row, Box((2 + i, 0), (1, 2))),)) for i in range(3)
    ]


def test_boxes_that_do_not_meet() -> None:
    assert plan_reads(Box((0, 0), (2, 4)), Box((2, 0), (2, 4)), 4, 2**18) == []
    assert plan_reads(Box((0,), (0,)), Box((0,), (0,)), 4, 2**18) == []


def test_zero_dims() -> None:
    scalar = Box((), ())
    assert plan_reads(scalar, scalar, 8, 2**18) == [
        Read(0, 0, 8, (Copy(0, (), scalar, scalar),)),
    ]


@pytest.mark.parametrize("lose", [lambda reads: reads[:-1], lambda reads: reads + reads[:1]])
def test_the_oracle_can_fail(lose: Callable[[list[Read]], list[Read]]) -> None:
    box = Box.whole((4, 4))
    with patch.object(plan, "BLOCK_BYTES", 8):
        reads = plan_reads(box, box, 4, 16)
    target, times = np.zeros((4, 4), np.int32), np.zeros((4, 4), int)
    carry_out(np.arange(16, dtype=np.int32), lose(reads), target, times)
    assert not (times == 1).all()
