"""Which bytes to read for a wanted box, and where they go: a pure function of boxes.

A plan covers whole checksum blocks, so that every byte that is read can be verified, and touches
a saved box's blocks only where they hold wanted elements.
"""

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from distavg.checkpoint.manifest import BLOCK_BYTES
from distavg.layout import Box, range_boxes

__all__ = ["Copy", "Read", "plan_reads", "runs"]


@dataclass(frozen=True, slots=True)
class Copy:
    """A rectangle that goes from a read's buffer to the wanted tensor.

    Attributes:
        start: The element of the buffer at which a contiguous array begins.
        sizes: Shape of that array.
        source: The wanted part of the array.
        target: Where it goes in the wanted box.
    """

    start: int
    sizes: tuple[int, ...]
    source: Box
    target: Box


@dataclass(frozen=True, slots=True)
class Read:
    """A contiguous run of whole blocks of one saved box (the last block may be short).

    Attributes:
        first_block: Its first block within the saved box.
        begin: Its first byte within the saved box.
        nbytes: Its length.
        copies: What goes where, by way of a buffer.
        direct: Where all of it goes in one piece, as an element of the wanted box in row-major
            order; None if it does not.
    """

    first_block: int
    begin: int
    nbytes: int
    copies: tuple[Copy, ...]
    direct: int | None = None


def plan_reads(
    saved: Box, wanted: Box, item_bytes: int, buffer_bytes: int, *, is_flat: bool = False
) -> list[Read]:
    """The reads that bring what `saved` has of `wanted`, each of at most `buffer_bytes`.

    Args:
        saved: A box that lies contiguously in a file, in row-major order.
        wanted: A box of the same tensor that is to be filled.
        item_bytes: Bytes of an element.
        buffer_bytes: A multiple of the block size.
        is_flat: Whether the wanted box lies contiguously in memory: then whole blocks that do so,
            too, are read straight into it.
    """
    common = saved.intersect(wanted)
    if common is None:
        return []
    local = common.relative_to(saved)
    block = BLOCK_BYTES // item_bytes
    per_read = buffer_bytes // BLOCK_BYTES
    straight, shift = range(0), 0
    extent = _flat_extent(saved.sizes, local) if is_flat else None
    place = _flat_extent(wanted.sizes, common.relative_to(wanted)) if is_flat else None
    if extent is not None and place is not None:
        begin, end = extent
        last = end // block if end < saved.numel else -(-end // block)
        straight, shift = range(-(-begin // block), last), place[0] - begin
    reads = []
    for first, stop in runs(_wanted_blocks(saved.sizes, local, block), per_read):
        for low, high in _split(first, stop, straight):
            start, end = low * block, min(high * block, saved.numel)
            is_direct = low in straight
            copies = () if is_direct else _copies(saved, wanted, local, start, end)
            direct = start + shift if is_direct else None
            nbytes = (end - start) * item_bytes
            reads.append(Read(low, start * item_bytes, nbytes, copies, direct))
    return reads


def _split(first: int, stop: int, middle: range) -> Iterator[tuple[int, int]]:
    """The run [first, stop) in up to three: before, within and after the middle."""
    edges = [first, *(edge for edge in (middle.start, middle.stop) if first < edge < stop), stop]
    return itertools.pairwise(edges) if middle else iter([(first, stop)])


def _copies(saved: Box, wanted: Box, local: Box, low: int, high: int) -> tuple[Copy, ...]:
    """Where elements [low, high) of a saved box go, as far as they are wanted."""
    copies = []
    start = 0
    for box in range_boxes(saved.sizes, low, high):
        if part := box.intersect(local):
            target = part.shifted(saved.offsets).relative_to(wanted)
            copies.append(Copy(start, box.sizes, part.relative_to(box), target))
        start += box.numel
    return tuple(copies)


def _flat_extent(sizes: Sequence[int], local: Box) -> tuple[int, int] | None:
    """Where a part of an array lies in row-major order, if that is one piece."""
    first = _flat_index(sizes, local.offsets)
    last = _flat_index(sizes, [end - 1 for end in local.ends])
    return (first, last + 1) if last - first + 1 == local.numel else None


def _wanted_blocks(sizes: Sequence[int], local: Box, block: int) -> Iterator[int]:
    """The blocks of an array of these sizes that hold an element of the box `local`."""
    first = _flat_index(sizes, local.offsets)
    last = _flat_index(sizes, [end - 1 for end in local.ends])
    is_contiguous = last - first + 1 == local.numel
    total = Box.whole(sizes).numel
    for index in range(first // block, last // block + 1):
        low, high = index * block, min((index + 1) * block, total)
        if is_contiguous or any(box.intersect(local) for box in range_boxes(sizes, low, high)):
            yield index


def runs(blocks: Iterable[int], longest: int | None = None) -> Iterator[tuple[int, int]]:
    """Group ascending numbers into runs [first, stop) of consecutive ones, up to a length."""
    first: int | None = None
    stop = 0
    for block in blocks:
        if first is not None and (block != stop or stop - first == longest):
            yield first, stop
            first = None
        first = block if first is None else first
        stop = block + 1
    if first is not None:
        yield first, stop


def _flat_index(sizes: Sequence[int], index: Sequence[int]) -> int:
    strides = itertools.accumulate(reversed(sizes[1:]), operator.mul, initial=1)
    pairs = zip(reversed(index), strides, strict=bool(index))
    return sum(i * stride for i, stride in pairs)
