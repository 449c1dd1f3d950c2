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
        copies: What goes where.
    """

    first_block: int
    begin: int
    nbytes: int
    copies: tuple[Copy, ...]


def plan_reads(saved: Box, wanted: Box, item_bytes: int, buffer_bytes: int) -> list[Read]:
    """The reads that bring what `saved` has of `wanted`, each of at most `buffer_bytes`.

    Args:
        saved: A box that lies contiguously in a file, in row-major order.
        wanted: A box of the same tensor that is to be filled.
        item_bytes: Bytes of an element.
        buffer_bytes: A multiple of the block size.
    """
    common = saved.intersect(wanted)
    if common is None:
        return []
    local = common.relative_to(saved)
    block = BLOCK_BYTES // item_bytes
    per_read = buffer_bytes // BLOCK_BYTES
    reads = []
    for first, stop in runs(_wanted_blocks(saved.sizes, local, block), per_read):
        low, high = first * block, min(stop * block, saved.numel)
        copies = []
        start = 0
        for box in range_boxes(saved.sizes, low, high):
            if part := box.intersect(local):
                target = part.shifted(saved.offsets).relative_to(wanted)
                copies.append(Copy(start, box.sizes, part.relative_to(box), target))
            start += box.numel
        reads.append(Read(first, low * item_bytes, (high - low) * item_bytes, tuple(copies)))
    return reads


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
