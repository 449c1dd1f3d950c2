"""Boxes: n-dimensional rectangles of a global tensor, in plain Python.

A box says which part of a whole tensor a rank holds. Every wrapper becomes boxes in
`distavg.wrappers`, and every file of a checkpoint is boxes, so resharding is the intersection of
two lists of boxes and nothing else.
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

__all__ = [
    "Box",
    "BoxIndex",
    "chunk_extent",
    "cover_fault",
    "divide",
    "nested_extent",
    "range_boxes",
]


class Box(NamedTuple):
    """A rectangle of a global tensor: where it begins and how long it is in each tensor dim.

    >>> Box((0, 2), (3, 2)).intersect(Box((1, 0), (5, 3)))
    Box(offsets=(1, 2), sizes=(2, 1))
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Box":
        """The box that covers a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """The number of elements (1 for a zero-dim tensor)."""
        return math.prod(self.sizes)

    @property
    def ends(self) -> tuple[int, ...]:
        """Offset plus size in each dim."""
        return tuple(o + s for o, s in zip(self.offsets, self.sizes, strict=True))

    def intersect(self, other: "Box") -> "Box | None":
        """The part that two boxes of one tensor share; None if that holds no element."""
        offsets, sizes = [], []
        for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True):
            offset, end = max(a, b), min(a + m, b + n)
            if offset >= end:
                return None
            offsets.append(offset)
            sizes.append(end - offset)
        return Box(tuple(offsets), tuple(sizes))

    def contains(self, other: "Box") -> bool:
        """Whether `other` lies within this box."""
        pairs = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        return all(a <= b and b + n <= a + m for a, m, b, n in pairs)

    def relative_to(self, origin: "Box") -> "Box":
        """The same rectangle in the coordinates of the box `origin` that contains it."""
        return Box(
            tuple(a - b for a, b in zip(self.offsets, origin.offsets, strict=True)), self.sizes
        )

    def shifted(self, offsets: Sequence[int]) -> "Box":
        """The same rectangle moved by `offsets`: the inverse of `relative_to`."""
        return Box(tuple(a + b for a, b in zip(self.offsets, offsets, strict=True)), self.sizes)

    def slices(self) -> tuple[slice, ...]:
        """Index a tensor that starts at the origin with this."""
        return tuple(slice(o, e) for o, e in zip(self.offsets, self.ends, strict=True))


def chunk_extent(length: int, parts: int, index: int) -> tuple[int, int]:
    """Offset and size of chunk `index` when a dim of `length` is cut as `torch.chunk` does.

    DTensor's `Shard` placement divides a dim this way: pieces of ceil(length / parts), so that
    the last ones may be short or empty.

    >>> [chunk_extent(5, 4, i) for i in range(4)]
    [(0, 2), (2, 2), (4, 1), (5, 0)]
    """
    size = -(-length // parts)
    offset = min(length, index * size)
    return offset, min(length, offset + size) - offset


def nested_extent(length: int, cuts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Offset and size of what is left of a dim that is cut several times, each cut in the last one.

    Args:
        length: Of the whole dim.
        cuts: (parts, index) of each cut, the outermost first; see `chunk_extent`.

    >>> nested_extent(10, [(2, 1), (3, 2)])
    (9, 1)
    """
    offset, size = 0, length
    for parts, index in cuts:
        inner, size = chunk_extent(size, parts, index)
        offset += inner
    return offset, size


def range_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Split the flat (row-major) range [start, stop) of a tensor into boxes, in flat order.

    An n-D tensor needs at most 2n-1 of them: ragged edges on either side of a full middle.

    >>> list(range_boxes((4, 3), 2, 10))  # doctest: +NORMALIZE_WHITESPACE
    [Box(offsets=(0, 2), sizes=(1, 1)), Box(offsets=(1, 0), sizes=(2, 3)),
     Box(offsets=(3, 0), sizes=(1, 1))]
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box((start,), (stop - start,)) if shape else Box((), ())
        return
    row = math.prod(shape[1:])
    head, tail = -(-start // row), stop // row  # the whole rows are [head, tail)
    edges = [(tail, start - tail * row, stop - tail * row)] if head > tail else []
    if head <= tail and start < head * row:
        edges.append((head - 1, start - (head - 1) * row, row))
    for index, low, high in edges:
        for box in range_boxes(shape[1:], low, high):
            yield Box((index, *box.offsets), (1, *box.sizes))
    if head < tail:
        yield Box((head, *(0,) * (len(shape) - 1)), (tail - head, *shape[1:]))
    if head <= tail and stop > tail * row:
        for box in range_boxes(shape[1:], 0, stop - tail * row):
            yield Box((tail, *box.offsets), (1, *box.sizes))


def divide(shapes: Sequence[Sequence[int]], parts: int) -> list[list[tuple[int, Box]]]:
    """Divide the concatenation of tensors evenly: for each part its (tensor index, box) pieces.

    Cuts fall on multiples of a tensor's last dim (any element of a 1-D tensor), so that 2-D
    tensors are cut by rows and every piece of a contiguous tensor is a contiguous view.

    >>> [[(i, box.sizes) for i, box in part] for part in divide([(4, 2), (3,)], 2)]
    [[(0, (3, 2))], [(0, (1, 2)), (1, (3,))]]
    """
    starts = [0, *itertools.accumulate(math.prod(shape) for shape in shapes)]
    total = starts[-1]
    cuts = [0]
    for part in range(1, parts):
        target = part * total // parts
        index = bisect.bisect_right(starts, target) - 1
        unit = shapes[index][-1] if index < len(shapes) and len(shapes[index]) > 1 else 1
        cuts.append(starts[index] + (target - starts[index] + unit // 2) // unit * unit)
    cuts.append(total)
    pieces: list[list[tuple[int, Box]]] = []
    for low, high in itertools.pairwise(cuts):
        part_pieces: list[tuple[int, Box]] = []
        for index in range(max(bisect.bisect_right(starts, low) - 1, 0), len(shapes)):
            if starts[index] >= high:
                break
            start, stop = max(low, starts[index]), min(high, starts[index + 1])
            part_pieces += (
                (index, box)
                for box in range_boxes(shapes[index], start - starts[index], stop - starts[index])
            )
        pieces.append(part_pieces)
    return pieces


def cover_fault(shape: Sequence[int], boxes: Iterable[Box]) -> str | None:
    """Why these boxes do not cover a tensor of this shape exactly once; None if they do.

    Exact cover is proved by volume and by the absence of overlaps, which a sweep along the dim
    with the most distinct offsets finds without comparing all pairs.

    >>> cover_fault((4, 2), [Box((0, 0), (2, 2)), Box((2, 0), (1, 2))])
    '2 of 8 elements are in no box'
    """
    whole, boxes = Box.whole(shape), [box for box in boxes if box.numel]
    if _are_stacked(shape, boxes):
        return None
    for box in boxes:
        if len(box.sizes) != len(shape) or not whole.contains(box):
            return f"the box at {box.offsets} of sizes {box.sizes} is outside the tensor"
    if shape and len(boxes) > 1:
        dim = _sweep_dim(boxes)
        active: list[Box] = []
        for box in sorted(boxes, key=lambda box: box.offsets[dim]):
            start = box.offsets[dim]
            active = [each for each in active if each.offsets[dim] + each.sizes[dim] > start]
            for other in active:
                if common := box.intersect(other):
                    return f"two boxes overlap at {common.offsets} in sizes {common.sizes}"
            active.append(box)
    elif len(boxes) > 1:
        return "two boxes overlap"
    missing = whole.numel - sum(box.numel for box in boxes)
    return f"{missing} of {whole.numel} elements are in no box" if missing else None


class BoxIndex:
    """Boxes of one tensor, among which those that meet another box are found.

    They are sorted along the dim with the most distinct offsets, so that few are looked at.

    >>> BoxIndex([Box((0,), (2,)), Box((2,), (3,)), Box((5,), (1,))]).meeting(Box((1,), (2,)))
    [0, 1]
    """

    def __init__(self, boxes: Sequence[Box]) -> None:
        self._boxes = boxes
        self._order = list(range(len(boxes)))
        self._dim = _sweep_dim(boxes) if boxes and boxes[0].sizes else None
        if self._dim is not None:
            dim = self._dim
            self._order.sort(key=lambda number: boxes[number].offsets[dim])
            self._starts = [boxes[number].offsets[dim] for number in self._order]
            self._longest = max(box.sizes[dim] for box in boxes)

    def meeting(self, box: Box) -> list[int]:
        """The positions of those that share an element with a box, ascending."""
        near = self._order
        if self._dim is not None:
            start, size = box.offsets[self._dim], box.sizes[self._dim]
            low = bisect.bisect_right(self._starts, start - self._longest)
            near = near[low : bisect.bisect_left(self._starts, start + size)]
        return sorted(number for number in near if self._boxes[number].intersect(box))


def _sweep_dim(boxes: Sequence[Box]) -> int:
    """The dim in which these boxes have the most distinct offsets."""
    dims = range(len(boxes[0].offsets))
    return max(dims, key=lambda dim: len({box.offsets[dim] for box in boxes}))


def _are_stacked(shape: Sequence[int], boxes: Iterable[Box]) -> bool:
    """Whether boxes follow one another along the first dim and are whole in the others.

    Most layouts are so, and a large job's checkpoint has very many boxes to look at.
    """
    end, rest = 0, tuple(shape[1:])
    for offsets, sizes in sorted(boxes):
        if offsets[:1] != (end,) or any(offsets[1:]) or sizes[1:] != rest:
            return False
        end += sizes[0]
    return (end, *rest) == tuple(shape)
