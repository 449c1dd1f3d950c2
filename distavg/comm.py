"""Collectives that degrade to one process, and errors that every rank raises together.

An averager coordinates over a gloo group of its own (`Comm`), so that its small messages never
meet a training collective and work without a GPU. Every collective is bounded by the group's
timeout: a rank that does not come ends as a `RankError` on the others, never as a hang.
"""

import atexit
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distavg.errors import DistavgError, RankError
from distavg.foreach import as_bytes, chunks

__all__ = ["Comm", "ReplicaGroup"]

T = TypeVar("T")

# Host tensors travel in messages of at most this size: large enough for full speed.
_MESSAGE_BYTES = 8 * 2**20


class Comm:
    """The ranks that hold parts of one model, and a gloo group of their own.

    Without an initialised process group this is one process of rank 0, and no method
    communicates. Otherwise creating it is collective over `process_group`.

    Attributes:
        rank: This process's rank within the group.
        size: The number of ranks.
        ranks: Their global ranks.
        group: The gloo group; None without a process group.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | None = None, timeout: timedelta | None = None
    ) -> None:
        self.group: dist.ProcessGroup | None = None
        self._timeout = timeout
        self._announced: object = None
        self._is_of_all = False
        self.ranks: tuple[int, ...] = (0,)
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            ranks = dist.get_process_group_ranks(process_group or dist.group.WORLD)
            # Groups of some ranks get their names from the ranks alone. A name that comes again
            # finds the addresses of the group before it, so such a group is never given back.
            self._is_of_all = len(ranks) == dist.get_world_size()
            with _lost_rank("making a group of the ranks"):
                self.group = dist.new_group(
                    ranks,
                    timeout=timeout,
                    backend="gloo",
                    use_local_synchronization=not self._is_of_all,
                )
            self.ranks = tuple(ranks)
            _let_gloo_finish_at_exit()
            self.rank, self.size = dist.get_rank(self.group), len(ranks)

    @property
    def is_parallel(self) -> bool:
        """Whether there is a process group, be it of one rank."""
        return self.group is not None

    def close(self) -> None:
        """Give the group's sockets and threads back, if it is a group of all ranks."""
        if self.group is not None and self._is_of_all and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None

    def gather(self, value: T, doing: str) -> list[T]:
        """Every rank's small picklable value, in rank order, on every rank. Collective.

        One all-gather of the pickled values.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _lost_rank(doing):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_to_first(self, value: T, doing: str) -> list[T] | None:
        """Every rank's picklable value on rank 0, None elsewhere. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with _lost_rank(doing):
            dist.gather_object(value, values, group=self.group, group_dst=0)
        return values

    def broadcast(self, value: T, doing: str) -> T:
        """Rank 0's picklable value on every rank. Collective."""
        if self.size == 1:
            return value
        box = [value]
        with _lost_rank(doing):
            dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def broadcast_tensor(self, tensor: Tensor, doing: str) -> None:
        """Overwrite a contiguous host tensor by rank 0's. Collective; `tensor.nbytes` bytes."""
        for part in self._messages(tensor):
            with _lost_rank(doing):
                dist.broadcast(part, group=self.group, group_src=0)

    def send(self, tensor: Tensor, rank: int, doing: str) -> None:
        """Send a contiguous host tensor to a rank, which must `receive` it."""
        for part in self._messages(tensor):
            with _lost_rank(doing):
                dist.send(part, group=self.group, group_dst=rank)

    def receive(self, tensor: Tensor, rank: int, doing: str) -> None:
        """Receive into a contiguous host tensor what a rank `send`s."""
        for part in self._messages(tensor):
            with _lost_rank(doing):
                dist.recv(part, group=self.group, group_src=rank)

    def replica_group(
        self, ranks: tuple[int, ...], device_type: str, known: dist.ProcessGroup | None
    ) -> "ReplicaGroup":
        """The ranks that hold replicas on a kind of device. Collective over these ranks.

        Host tensors travel over gloo with this object's timeout, others over the `known` group of
        these ranks, or one of its own.
        """
        group = self.group if device_type == "cpu" and ranks == self.ranks else known
        if group is None or (device_type == "cpu" and group is not self.group):
            with _lost_rank("making a group of replicas"):
                group = dist.new_group(
                    ranks,
                    timeout=self._timeout,
                    backend="gloo" if device_type == "cpu" else None,
                    use_local_synchronization=True,
                )
        return ReplicaGroup(group, ranks, dist.get_rank(group), self._timeout)

    def announce(self, code: int, doing: str) -> dict[int, int]:
        """Tell every rank how a phase ended here: 0 for well. Collective.

        One all-gather of an integer. A rank whose code is not 0 does not wait for the others, so
        that its own error surfaces at once, and gets an empty answer.

        Returns:
            The ranks whose code is not 0, with their codes.
        """
        if self.size == 1:
            return {}
        mine = torch.tensor([code], device="cpu")
        codes = [torch.zeros_like(mine) for _ in range(self.size)]
        with _lost_rank(doing):
            work = dist.all_gather(codes, mine, group=self.group, async_op=True)
            if code:
                self._announced = (work, mine, codes)  # the tensors must outlive the message
                return {}
            work.wait()
        return {rank: int(each) for rank, each in zip(self.ranks, codes, strict=True) if each}

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Run the body on every rank; if it raises on one rank, raise on all. Collective.

        One all-gather of each rank's error, or None. A rank whose body raised re-raises its own
        error, unless several ranks failed in different ways; the others raise the same type, or
        `RankError` if it is not one of distavg's. The body must not communicate, or else end on
        every rank in spite of a failure elsewhere.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.raise_together(error, doing)

    def raise_together(self, error: Exception | None, doing: str) -> None:
        """The collective half of `together`, for an error that was caught already."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        mine = None if error is None else (_exported_type(error), _message(error))
        failures = {
            rank: failure
            for rank, failure in zip(self.ranks, self.gather(mine, doing), strict=True)
            if failure is not None
        }
        if not failures:
            return
        if error is not None and len(set(failures.values())) == 1:
            raise error
        kind = next(iter(failures.values()))[0]
        lines = [f"rank {rank}: {message}" for rank, (_, message) in failures.items()]
        raise kind(f"{doing} failed. " + "\n".join(lines)) from error

    @staticmethod
    def _messages(tensor: Tensor) -> Sequence[Tensor]:
        return torch.split(as_bytes(tensor), _MESSAGE_BYTES) if tensor.numel() else ()


@functools.cache
def _let_gloo_finish_at_exit() -> None:
    """At exit, give gloo's threads a moment to drop the tensors of the last collective.

    They need the GIL for it, after the collective has returned. A process whose interpreter goes
    down meanwhile is aborted by torch ("terminate called without an active exception", seen in
    2.13 on a busy machine, in 1 of 7 runs of a script that ended with a collective).
    """
    atexit.register(time.sleep, 0.05)


@contextmanager
def _lost_rank(doing: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # timeouts and dead peers are reported so
        raise RankError(
            f"{doing}: lost contact with another rank, which has ended or did not come within the "
            "timeout (Averager(timeout=...)); the rank that failed has the cause in its own "
            f"output. {error}"
        ) from error


@dataclass(frozen=True)
class ReplicaGroup:
    """The ranks that hold replicas of tensors on one kind of device.

    Attributes:
        group: The process group that moves the data.
        ranks: Its global ranks.
        rank: This process's rank within the group.
        timeout: How long a broadcast waits for a rank; None for the group's own timeout.
    """

    group: dist.ProcessGroup
    ranks: tuple[int, ...]
    rank: int
    timeout: timedelta | None

    @property
    def size(self) -> int:
        """The number of replicas."""
        return len(self.ranks)

    @torch.no_grad()
    def share(self, pieces: Sequence[Sequence[Tensor]], doing: str) -> None:
        """Overwrite every rank's tensors by their owner's. Collective over the group.

        One broadcast after another from each owner: a large contiguous tensor in place, small
        and strided ones gathered in messages of at most 8 MiB. Each rank receives the bytes that
        it does not own, once.

        Args:
            pieces: For each rank, the tensors that it owns; the same shapes on every rank.
            doing: What for, in an error's words.
        """
        for owner, tensors in enumerate(pieces):
            packed: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for tensor in tensors:
                if tensor.nbytes >= _MESSAGE_BYTES and tensor.is_contiguous():
                    self._broadcast(tensor, owner, doing)
                else:
                    limit = _MESSAGE_BYTES // tensor.itemsize
                    packed.setdefault((tensor.device, tensor.dtype), []).extend(
                        part for (part,) in chunks((tensor,), limit)
                    )
            for alike in packed.values():
                for bucket in _buckets(alike):
                    self._broadcast_packed(bucket, owner, doing)

    def _broadcast(self, tensor: Tensor, owner: int, doing: str) -> None:
        with _lost_rank(doing):
            work = dist.broadcast(tensor, group=self.group, group_src=owner, async_op=True)
            work.wait(self.timeout) if self.timeout is not None else work.wait()

    def _broadcast_packed(self, tensors: list[Tensor], owner: int, doing: str) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._broadcast(flat, owner, doing)
        if self.rank != owner:
            parts = torch.split(flat, [tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors in groups of at most one message."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > _MESSAGE_BYTES:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _exported_type(error: Exception) -> Callable[[str], DistavgError]:
    return type(error) if isinstance(error, DistavgError) else RankError


def _message(error: Exception) -> str:
    text = str(error)
    return text if isinstance(error, DistavgError) else f"{type(error).__name__}: {text}"
