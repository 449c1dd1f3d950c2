"""Which bytes to read for a wanted box, and where they go: a pure function of boxes.

A plan covers whole checksum blocks, so that every byte that is read can be verified, and touches
a saved box's blocks only where they hold wanted elements.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from distavg.checkpoint.manifest import BLOCK_BYTES
from distavg.layout import Box, range_boxes

__all__ = ["Copy", "Read", "plan_reads", "runs"]


class Copy(NamedTuple):
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


class Straight(NamedTuple):
    """A range of a read that lies in one piece in the wanted box, too.

    Attributes:
        skip: The element of the read at which it begins.
        numel: Its length.
        place: Where it goes, as an element of the wanted box in row-major order.
    """

    skip: int
    numel: int
    place: int


class Read(NamedTuple):
    """A contiguous run of whole blocks of one saved box (the last block may be short).

    After `narrowed` it is a run of bytes, which cannot be verified.

    Attributes:
        first_block: Its first block within the saved box.
        begin: Its first byte within the saved box.
        nbytes: Its length.
        copies: What goes where, by way of a buffer.
        straight: What goes to one place, of whichever length; None if there are copies.
    """

    first_block: int
    begin: int
    nbytes: int
    copies: tuple[Copy, ...]
    straight: Straight | None = None

    def narrowed(self, item_bytes: int) -> "Read":
        """Only what is wanted of a straight read, whatever the blocks."""
        if self.straight is None or self.nbytes == self.straight.numel * item_bytes:
            return self
        skip, numel, _ = self.straight
        return self._replace(
            begin=self.begin + skip * item_bytes,
            nbytes=numel * item_bytes,
            straight=self.straight._replace(skip=0),
        )

    def split(self, nbytes: int, item_bytes: int) -> "Iterator[tuple[Read, Straight]]":
        """A straight read as reads of at most so many bytes, whole blocks."""
        if self.straight is None:
            return
        skip, numel, place = self.straight
        for start in range(0, self.nbytes, nbytes):
            length = min(nbytes, self.nbytes - start)
            item = start // item_bytes
            low, high = max(skip, item), min(skip + numel, item + length // item_bytes)
            first_block = self.first_block + start // BLOCK_BYTES
            part = Read(first_block, self.begin + start, length, ())
            yield part, Straight(low - item, high - low, place + low - skip)


def plan_reads(
    saved: Box, wanted: Box, item_bytes: int, buffer_bytes: int, *, is_flat: bool = False
) -> list[Read]:
    """The reads that bring what `saved` has of `wanted`.

    Args:
        saved: A box that lies contiguously in a file, in row-major order.
        wanted: A box of the same tensor that is to be filled.
        item_bytes: Bytes of an element.
        buffer_bytes: A multiple of the block size, which no read with copies exceeds.
        is_flat: Whether the wanted box lies contiguously in memory: then what does so in both
            boxes is read straight to its place, if that is on the host and of one dtype.
    """
    common = saved.intersect(wanted)
    if common is None:
        return []
    block = BLOCK_BYTES // item_bytes
    extent = _flat_extent(saved, common)
    place = _flat_extent(wanted, common) if is_flat else None
    if extent is not None and place is not None:
        return _straight_reads(*extent, place[0], saved.numel, item_bytes)
    local = common.relative_to(saved)
    if extent is not None:
        spans: Iterable[tuple[int, int]] = [(extent[0] // block, -(-extent[1] // block))]
    else:
        spans = runs(_wanted_blocks(saved.sizes, local, block))
    longest = buffer_bytes // BLOCK_BYTES
    reads = []
    for low, high in spans:
        for first in range(low, high, longest):
            start = first * block
            end = min(start + longest * block, high * block, saved.numel)
            copies = _copies(saved, wanted, local, start, end)
            reads.append(Read(first, start * item_bytes, (end - start) * item_bytes, copies))
    return reads


def _straight_reads(begin: int, end: int, place: int, total: int, item_bytes: int) -> list[Read]:
    """The same for elements [begin, end) of a saved box of `total`, which lie in one piece.

    Whole blocks are apart from those of which a part is wanted, so that they need no buffer.
    """
    block = BLOCK_BYTES // item_bytes
    first, stop = begin // block, -(-end // block)
    head, tail = -(-begin // block), stop if end == total else end // block
    edges = [first, head, tail, stop] if head < tail else [first, stop]
    reads = []
    for low, high in itertools.pairwise(edges):
        if low < high:
            start, finish = low * block, min(high * block, total)
            wanted = max(start, begin)
            straight = Straight(wanted - start, min(finish, end) - wanted, place + wanted - begin)
            reads.append(Read(low, start * item_bytes, (finish - start) * item_bytes, (), straight))
    return reads


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


def _flat_extent(box: Box, part: Box) -> tuple[int, int] | None:
    """Where a part of a box lies in it in row-major order, if that is one piece."""
    first, stop = _flat_span(box, part)
    return (first, stop) if stop - first == part.numel else None


def _flat_span(box: Box, part: Box) -> tuple[int, int]:
    """Where a part of a box begins in it in row-major order, and where it ends."""
    first, reach, stride = 0, 0, 1
    for dim in range(len(box.sizes) - 1, -1, -1):
        first += (part.offsets[dim] - box.offsets[dim]) * stride
        reach += (part.sizes[dim] - 1) * stride
        stride *= box.sizes[dim]
    return first, first + reach + 1


def _wanted_blocks(sizes: Sequence[int], local: Box, block: int) -> Iterator[int]:
    """The blocks of an array of these sizes that hold an element of the box `local`."""
    whole = Box.whole(sizes)
    first, stop = _flat_span(whole, local)
    for index in range(first // block, -(-stop // block)):
        low, high = index * block, min((index + 1) * block, whole.numel)
        if any(box.intersect(local) for box in range_boxes(sizes, low, high)):
            yield index


def runs(blocks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Group ascending numbers into runs [first, stop) of consecutive ones."""
    first: int | None = None
    stop = 0
    for block in blocks:
        if first is not None and block != stop:
            yield first, stop
            first = None
        first = block if first is None else first
        stop = block + 1
    if first is not None:
        yield first, stop
