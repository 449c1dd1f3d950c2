"""The ranks that hold replicas of tensors, and how they give each other what each of them owns."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distavg.comm import MESSAGE_BYTES, Comm, finish
from distavg.foreach import chunks

__all__ = ["ReplicaGroup"]


class ReplicaGroup:
    """The ranks that hold replicas of tensors on one kind of device. Not collective to build.

    Host tensors travel over the averager's own gloo group, others where they lie over the `known`
    group of these ranks (NCCL's); where there is none, by way of host memory.

    Attributes:
        ranks: Their global ranks.
        rank: This process's place among them.

    Args:
        comm: The ranks of the model.
        ranks: See above.
        device_type: Where the tensors lie.
        known: A process group of just these ranks, if there is one.
    """

    def __init__(
        self,
        comm: Comm,
        ranks: tuple[int, ...],
        device_type: str,
        known: dist.ProcessGroup | None,
    ) -> None:
        self.ranks = ranks
        self.rank = ranks.index(comm.ranks[comm.rank])
        self._comm = comm
        self._direct = known if device_type != "cpu" else None
        self._timeout = comm.timeout

    @torch.no_grad()
    def share(self, pieces: Sequence[Sequence[Tensor]], doing: str) -> None:
        """Overwrite every rank's tensors by their owner's. Collective over the ranks.

        Each rank receives the bytes that it does not own, once. On hosts all owners send at the
        same time, to every other rank, in rounds of one message each; otherwise one broadcast
        follows another. Parts of large contiguous tensors travel in place, small and strided
        ones gathered in messages.

        Args:
            pieces: For each rank, the tensors that it owns; the same shapes on every rank.
            doing: What for, in an error's words.
        """
        if self._direct is not None:
            for owner, tensors in enumerate(pieces):
                for message in _messages(tensors, MESSAGE_BYTES):
                    self._broadcast(message, owner, doing)
            return
        limit = max(MESSAGE_BYTES * 2 // len(self.ranks), 2**16)
        rounds = itertools.zip_longest(*(_messages(tensors, limit) for tensors in pieces))
        for messages in rounds:
            self._exchange(messages, doing)

    def _exchange(self, messages: Sequence["_Message | None"], doing: str) -> None:
        """One round: each owner's message, if it has one left, to all others."""
        received: list[tuple[_Message, Tensor]] = []
        works: list[tuple[dist.Work | None, Tensor]] = []
        with self._comm.waiting(doing, self.ranks):
            for owner, message in enumerate(messages):
                if message is None:
                    continue
                if owner != self.rank:
                    flat = message.buffer()
                    received.append((message, flat))
                    work = dist.irecv(flat, self.ranks[owner], group=self._comm.group)
                    works.append((work, flat))
                    continue
                flat = message.packed()
                for other in self.ranks:
                    if other != self.ranks[owner]:
                        work = dist.isend(flat, other, group=self._comm.group)
                        works.append((work, flat))
            finish(works)
        for message, flat in received:
            message.unpack(flat)

    def _broadcast(self, message: "_Message", owner: int, doing: str) -> None:
        flat = message.packed(on_host=False)
        with self._comm.waiting(doing, self.ranks):
            work = dist.broadcast(flat, group=self._direct, group_src=owner, async_op=True)
            work.wait(self._timeout) if self._timeout is not None else work.wait()
        if self.rank != owner:
            message.unpack(flat)


@dataclass(frozen=True, slots=True)
class _Message:
    """Tensors of one device and dtype that travel together."""

    tensors: Sequence[Tensor]

    @property
    def _in_place(self) -> Tensor | None:
        """The tensor's own memory, if there is one tensor and it is contiguous."""
        alone = self.tensors[0] if len(self.tensors) == 1 else None
        return alone.view(-1) if alone is not None and alone.is_contiguous() else None

    def packed(self, *, on_host: bool = True) -> Tensor:
        """The values, in a row."""
        flat = self._in_place
        if flat is None:
            flat = torch.cat([tensor.reshape(-1) for tensor in self.tensors])
        return flat.cpu() if on_host else flat

    def buffer(self) -> Tensor:
        """Host memory to receive the values in."""
        flat, first = self._in_place, self.tensors[0]
        if flat is not None and flat.device.type == "cpu":
            return flat
        return torch.empty(
            sum(tensor.numel() for tensor in self.tensors), dtype=first.dtype, device="cpu"
        )

    def unpack(self, flat: Tensor) -> None:
        """Write received values to the tensors, unless they are there."""
        if self._in_place is not None and flat.data_ptr() == self.tensors[0].data_ptr():
            return
        parts = torch.split(flat, [tensor.numel() for tensor in self.tensors])
        for tensor, part in zip(self.tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


def _messages(tensors: Sequence[Tensor], limit: int) -> Iterator[_Message]:
    """Tensors in messages of at most `limit` bytes, the same for the same shapes."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        for (part,) in chunks((tensor,), max(limit // tensor.itemsize, 1)):
            if part.nbytes * 2 > limit and part.is_contiguous():
                yield _Message([part])
            elif part.numel():
                alike.setdefault((part.device, part.dtype), []).append(part)
    for parts in alike.values():
        bucket: list[Tensor] = []
        for part in parts:
            if bucket and sum(t.nbytes for t in bucket) + part.nbytes > limit:
                yield _Message(bucket)
                bucket = []
            bucket.append(part)
        yield _Message(bucket)
