"""Fused in-place arithmetic over lists of tensors, grouped by device and dtype.

Everything here writes in place under `no_grad`, so that version counters advance and autograd
notices. The arithmetic is elementwise: its result does not depend on how a tensor was cut.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distavg.layout import range_boxes

__all__ = ["Exchange", "Lerp", "as_bytes", "checksum", "chunks"]

# Size of one chunk where data passes through a temporary. On a CPU the temporary should stay in
# a core's L2 cache; on an accelerator a chunk must run well past the launch of its kernels.
_CPU_CHUNK_BYTES = 2**20
_ACCELERATOR_CHUNK_BYTES = 2**25


class Lerp:
    """`average += weight * (live - average)`, prepared once for fixed lists of tensors.

    Tensors of one dtype take one `torch._foreach_lerp_` per device and dtype (fused on an
    accelerator). Where the average has another dtype than the live tensor, live values pass
    through one temporary of a bounded size, chunk by chunk.

    Args:
        averages: Tensors to be updated.
        lives: Tensors of the same shapes and devices, of any floating dtype.
    """

    def __init__(self, averages: Sequence[Tensor], lives: Sequence[Tensor]) -> None:
        self._copies = (list(averages), list(lives))
        same: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        self._converted: list[tuple[Tensor, Tensor, Tensor]] = []
        buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for average, live in zip(averages, lives, strict=True):
            key = average.device, average.dtype
            if average.dtype == live.dtype:
                group = same.setdefault(key, ([], []))
                group[0].append(average)
                group[1].append(live)
                continue
            size = _chunk_elements(average)
            if key not in buffers:
                buffers[key] = average.new_empty(size)
            self._converted += (
                (part, live_part, buffers[key][: part.numel()].view(part.shape))
                for part, live_part in chunks((average, live), size)
            )
        self._same = list(same.values())

    @torch.no_grad()
    def __call__(self, weight: float) -> None:
        """Update every average. A weight of 1 copies, so that old NaNs do not survive."""
        if weight == 1:
            torch._foreach_copy_(*self._copies) if self._copies[0] else None
            return
        for averages, lives in self._same:
            torch._foreach_lerp_(averages, lives, weight)
        for average, live, buffer in self._converted:
            average.lerp_(buffer.copy_(live), weight)


class Exchange:
    """The values of pairs of tensors, exchanged in place and back through one bounded buffer.

    Both ways can be interrupted at any instant (Ctrl-C) and taken up again: each of a batch's three
    copies may be repeated, because none writes its own source, and counts only when it is done.

    Args:
        pairs: Tensors of equal shapes, all of one dtype and device.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._num_copies = 0
        self._batches: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []
        if not pairs:
            return
        limit = _chunk_elements(pairs[0][0])
        parts = [part for pair in pairs for part in chunks(pair, limit)]
        buffer = pairs[0][0].new_empty(min(limit, sum(a.numel() for a, _ in parts)))
        used = 0
        for a, b in parts:
            if not self._batches or used + a.numel() > limit:
                self._batches.append(([], [], []))
                used = 0
            saved = buffer[used : used + a.numel()].view(a.shape)
            used += a.numel()
            for tensors, tensor in zip(self._batches[-1], (saved, a, b), strict=True):
                tensors.append(tensor)

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
            saved, a, b = self._batches[number % len(self._batches)]
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


def _chunk_elements(tensor: Tensor) -> int:
    limit = _CPU_CHUNK_BYTES if tensor.device.type == "cpu" else _ACCELERATOR_CHUNK_BYTES
    return limit // tensor.itemsize
