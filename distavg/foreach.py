"""Fused in-place arithmetic over lists of tensors, grouped by device and dtype.

Everything here writes in place under `no_grad`, so that version counters advance and autograd
notices. The arithmetic is elementwise: its result does not depend on how a tensor was cut.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distavg.layout import range_boxes

__all__ = [
    "Blend",
    "Exchange",
    "Lerp",
    "Table",
    "as_bytes",
    "checksum",
    "chunk_elements",
    "chunks",
    "laid_out",
    "packed",
]

# Size of one chunk where data passes through a temporary. On a CPU the temporary should stay in
# a core's L2 cache; on an accelerator a chunk must run well past the launch of its kernels.
_CPU_CHUNK_BYTES = 2**20
# Live weights that all averages take on a CPU before the next are read: they should stay in the
# last level cache. Smaller blocks cost a single average more than they spare several.
_CPU_BLOCK_BYTES = 2**23
_ACCELERATOR_CHUNK_BYTES = 2**25


# What an update does to an average: the weight of the live tensors, or a function that changes the
# tensors of its first list in place by those of its second.
Blend = float | Callable[[list[Tensor], list[Tensor]], object]


class Table(NamedTuple):
    """Tensors that are averaged alike.

    Attributes:
        averages: For each average, tensors of the shapes of `lives`.
        lives: The live tensors, of any dtype.
    """

    averages: Sequence[Sequence[Tensor]]
    lives: Sequence[Tensor]


class Lerp:
    """`average += weight * (live - average)` for several averages in one pass over their lives.

    Prepared once for fixed lists of tensors. On a CPU the pass goes block by block, so that a block
    of the live tensors is read from memory once, whatever the number of averages; on an accelerator
    each average takes one fused kernel per dtype. Where an average has another dtype than a live
    tensor, the values pass through a temporary of a bounded size, once for all such averages.

    Args:
        averages: For each average, tensors of the shapes and devices of `lives`.
        lives: The live tensors, of any dtype.
    """

    def __init__(self, averages: Sequence[Sequence[Tensor]], lives: Sequence[Tensor]) -> None:
        alike: dict[object, list[tuple[Tensor, ...]]] = {}
        for tensors in zip(lives, *averages, strict=True):
            key = tensors[0].device, *(tensor.dtype for tensor in tensors)
            alike.setdefault(key, []).append(tensors)
        self._blocks = [block for rows in alike.values() for block in _blocks(rows)]

    @property
    def temporaries(self) -> list[Tensor]:
        """The memory that values of another dtype pass through."""
        return [
            part for block in self._blocks for parts in block.buffers.values() for part in parts
        ]

    @torch.no_grad()
    def __call__(self, blends: Sequence[Blend | None]) -> None:
        """Update every average whose blend is not None.

        A weight of 1 copies, so that old NaNs do not survive.
        """
        for block in self._blocks:
            converted: set[torch.dtype] = set()
            for blend, averages in zip(blends, block.averages, strict=True):
                if blend is None:
                    continue
                if blend == 1:
                    torch._foreach_copy_(averages, block.lives)
                    continue
                lives = block.lives
                if (dtype := averages[0].dtype) in block.buffers:
                    lives = block.buffers[dtype]
                    if dtype not in converted:
                        torch._foreach_copy_(lives, block.lives)
                        converted.add(dtype)
                if callable(blend):
                    blend(averages, lives)
                else:
                    torch._foreach_lerp_(averages, lives, blend)


@dataclass(frozen=True, slots=True)
class _Block:
    """Parts of tensors that are updated together: all on one device, each list of one dtype."""

    lives: list[Tensor]
    averages: list[list[Tensor]]
    buffers: dict[torch.dtype, list[Tensor]]


def _blocks(rows: Sequence[tuple[Tensor, ...]]) -> Iterator[_Block]:
    live = rows[0][0]
    others = {average.dtype for average in rows[0][1:]} - {live.dtype}
    if others:  # the buffer should stay in the cache until the averages have read it
        limit = min(chunk_elements(live.device, dtype) for dtype in others)
    elif live.device.type == "cpu" and len(rows[0]) > 2:  # several averages
        limit = _CPU_BLOCK_BYTES // live.itemsize
    else:
        limit = sum(row[0].numel() for row in rows)
    limit = max(limit, 1)
    buffers = {dtype: torch.empty(limit, dtype=dtype, device=live.device) for dtype in others}
    for bucket in packed(rows, limit):
        yield _block(bucket, buffers)


def _block(rows: Sequence[tuple[Tensor, ...]], buffers: Mapping[torch.dtype, Tensor]) -> _Block:
    lives, *averages = (list(column) for column in zip(*rows, strict=True))
    return _Block(
        lives, averages, {dtype: laid_out(lives, flat) for dtype, flat in buffers.items()}
    )


class Exchange:
    """The values of pairs of tensors, exchanged in place and back through one bounded buffer.

    Both ways can be interrupted at any instant (Ctrl-C) and taken up again: each of a batch's three
    copies may be repeated, because none writes its own source, and counts only when it is done. The
    way back takes the batches in reverse, so that tensors that share memory come back, too.

    Args:
        pairs: Tensors of equal shapes and one dtype, the first of each all on one device, where
            the buffer is, and the second all on one device.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._num_copies = 0
        self._batches: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []
        if not pairs:
            return
        limit = chunk_elements(pairs[0][0].device, pairs[0][0].dtype)
        buffer = pairs[0][0].new_empty(min(limit, sum(a.numel() for a, _ in pairs)))
        for batch in packed(pairs, limit):
            a, b = (list(column) for column in zip(*batch, strict=True))
            self._batches.append((laid_out(a, buffer), a, b))

    def go(self) -> None:
        """Do what is left of the way there."""
        self._run(1)

    def come_back(self) -> None:
        """Do what is left of the way there and back."""
        self._run(2)

    @torch.no_grad()
    def _run(self, times: int) -> None:
        while self._num_copies < 3 * len(self._batches) * times:
            number, phase = divmod(self._num_copies, 3)
            is_back = number >= len(self._batches)
            saved, a, b = self._batches[-1 - number % len(self._batches) if is_back else number]
            target, source = ((saved, a), (a, b), (b, saved))[phase]
            torch._foreach_copy_(target, source)
            self._num_copies += 1


def chunks(tensors: tuple[Tensor, ...], max_elements: int) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding views of tensors of one shape, of at most `max_elements` elements each."""
    first = tensors[0]
    if first.numel() <= max_elements:
        yield tensors
    elif all(tensor.is_contiguous() for tensor in tensors):
        yield from zip(
            *(torch.split(tensor.view(-1), max_elements) for tensor in tensors), strict=True
        )
    else:
        for start in range(0, first.numel(), max_elements):
            stop = min(start + max_elements, first.numel())
            for box in range_boxes(first.shape, start, stop):
                yield tuple(tensor[box.slices()] for tensor in tensors)


def packed(
    rows: Sequence[tuple[Tensor, ...]], max_elements: int
) -> Iterator[list[tuple[Tensor, ...]]]:
    """Rows of corresponding tensors, cut where need be, in batches of at most `max_elements`."""
    batch: list[tuple[Tensor, ...]] = []
    used = 0
    for row in rows:
        for part in chunks(row, max_elements):
            if batch and used + part[0].numel() > max_elements:
                yield batch
                batch, used = [], 0
            batch.append(part)
            used += part[0].numel()
    if batch:
        yield batch


def laid_out(tensors: Sequence[Tensor], flat: Tensor) -> list[Tensor]:
    """Views of a flat tensor, one after another, in the shapes of tensors that fit in there."""
    sizes = [tensor.numel() for tensor in tensors]
    parts = torch.split(flat[: sum(sizes)], sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def checksum(tensor: Tensor) -> int:
    """A 64-bit sum over a tensor's bits, computed where the tensor lies: equal bits, equal sum.

    It finds replicas that have drifted apart. It is not made to resist an adversary: values that
    only changed places have the same sum.
    """
    flat = as_bytes(tensor.detach().contiguous())
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = flat.numel() // 8 * 8  # 64-bit lanes are summed at memory speed, bytes are not
    return int(flat[:whole].view(torch.int64).sum()) + int(flat[whole:].sum(dtype=torch.int64))


def as_bytes(tensor: Tensor) -> Tensor:
    """A flat view of a contiguous tensor's memory."""
    # Not view(-1): what has one element or none is contiguous under any strides, and keeps them.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def chunk_elements(device: torch.device, dtype: torch.dtype) -> int:
    """How many elements pass through a temporary at once."""
    limit = _CPU_CHUNK_BYTES if device.type == "cpu" else _ACCELERATOR_CHUNK_BYTES
    return max(limit // dtype.itemsize, 1)
