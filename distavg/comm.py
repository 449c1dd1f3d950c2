"""Collectives that degrade to one process, and errors that every rank raises together.

Averagers coordinate over gloo groups of their own (`Comm`), so that its small messages never
meet a training collective and work without a GPU. Every collective is bounded by the group's
timeout: a rank that does not come ends as a `RankError` on the others, never as a hang.
"""

import atexit
import copy
import functools
import itertools
import pickle
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from distavg.errors import DistavgError, RankError
from distavg.foreach import as_bytes
from distavg.rollcall import LONGEST, RollCall, in_time

__all__ = ["MESSAGE_BYTES", "Comm", "finish"]

T = TypeVar("T")

# Host tensors travel in messages of at most this size: large enough for full speed.
MESSAGE_BYTES = 8 * 2**20

# Tensors of messages that ended in an error: gloo may still use them.
_ABANDONED: list[object] = []

# Small values travel with their length in a record of one size: one message, not two.
_RECORD_BYTES = 512
_LENGTH_BYTES = 8


@dataclass(slots=True)
class Vote:
    """What every rank says at the end of `Comm.together`.

    Attributes:
        answer: This rank's; the body sets it.
        answers: Every rank's, in rank order; only after the `with` statement.
    """

    answer: Any = None
    answers: list[Any] = field(default_factory=list)


class Comm:
    """The ranks that hold parts of one model, and a gloo group of their own.

    Without an initialised process group this is one process of rank 0, and no method
    communicates. Otherwise creating it is collective over `process_group`.

    Attributes:
        rank: This process's rank within the group.
        size: The number of ranks.
        ranks: Their global ranks.
        group: The gloo group; None without a process group.
        timeout: How long its collectives wait for a rank; None for PyTorch's default.

    Args:
        process_group: The ranks; None for all.
        timeout: When an error must have told of a rank that does not come, and which it is.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | None = None, timeout: timedelta | None = None
    ) -> None:
        self.group: dist.ProcessGroup | None = None
        self._roll: RollCall | None = None
        self.timeout = timeout and max(timeout - LONGEST, timeout / 2)
        self._announced: object = None
        self.ranks: tuple[int, ...] = (0,)
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.ranks = tuple(dist.get_process_group_ranks(process_group or dist.group.WORLD))
            self.group, self._roll = _GROUPS.get(self.ranks, self.timeout)
            _let_gloo_finish_at_exit()
            self.rank, self.size = dist.get_rank(self.group), len(self.ranks)

    def waiting(
        self, doing: str, others: Sequence[int] | None = None
    ) -> AbstractContextManager[None]:
        """Around a collective over these ranks: if it fails, the error says who did not come.

        Args:
            doing: What for, in an error's words; the same on all ranks.
            others: The global ranks that take part, besides this one; None for all.
        """
        return nullcontext() if self._roll is None else self._roll.waiting(doing, others)

    def for_a_thread(self) -> "Comm":
        """The same ranks over another group, for a thread. Collective when it is first called."""
        other = copy.copy(self)
        if self.group is not None:
            other.group, other._roll = _GROUPS.get(self.ranks, self.timeout, purpose="a thread")
        return other

    @property
    def is_parallel(self) -> bool:
        """Whether there is a process group, be it of one rank."""
        return self.group is not None

    def gather(self, value: T, doing: str) -> list[T]:
        """Every rank's small picklable value, in rank order, on every rank. Collective.

        One all-gather of the pickled values; two if one of them is longer than half a KiB.
        """
        if self.size == 1:
            return [value]
        mine = pickle.dumps(value)
        records = self._gather_bytes(_record_of(mine), _RECORD_BYTES, doing)
        longest = max(int.from_bytes(each[:_LENGTH_BYTES], "little") for each in records)
        if longest <= _RECORD_BYTES - _LENGTH_BYTES:
            return [pickle.loads(each[_LENGTH_BYTES:]) for each in records]
        return [pickle.loads(each) for each in self._gather_bytes(mine, longest, doing)]

    def _gather_bytes(self, mine: bytes, length: int, doing: str) -> list[bytes]:
        """Every rank's bytes, filled up to a common length."""
        sent = torch.frombuffer(bytearray(mine.ljust(length)), dtype=torch.uint8)
        received = [torch.empty_like(sent) for _ in range(self.size)]
        with self.waiting(doing):
            dist.all_gather(received, sent, group=self.group)
        return [each.numpy().tobytes() for each in received]

    def gather_to_first(self, value: T, doing: str) -> list[T] | None:
        """Every rank's picklable value on rank 0, None elsewhere. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self.waiting(doing):
            dist.gather_object(value, values, group=self.group, group_dst=0)
        return values

    def exchange(self, values: Sequence[T], doing: str) -> list[T]:
        """From every rank, in rank order, the picklable value that it has for this one. Collective.

        Value i goes to rank i, by way of others: in step k each rank passes what has an odd number
        of 2^k ranks to go to the rank 2^k further, so that it talks to log2(size) others only
        (Bruck et al., IEEE TPDS 8(11), 1997), and a value travels at most as often.
        """
        others = [(to, value) for to, value in enumerate(values) if to != self.rank]
        parcels = [(to, self.rank, pickle.dumps(value)) for to, value in others]
        reach = 1
        while reach < self.size:
            away = [bool((to - self.rank) % self.size & reach) for to, _, _ in parcels]
            leave = list(itertools.compress(parcels, away))
            stay = [each for each, goes in zip(parcels, away, strict=True) if not goes]
            target, source = (self.rank + reach) % self.size, (self.rank - reach) % self.size
            parcels = stay + pickle.loads(self._pass(pickle.dumps(leave), target, source, doing))
            reach *= 2
        received = {source: pickle.loads(content) for _, source, content in parcels}
        return [received.get(rank, values[self.rank]) for rank in range(self.size)]

    def _pass(self, content: bytes, target: int, source: int, doing: str) -> bytes:
        """Send bytes to one rank, and receive what another sends, at the same time."""
        length = torch.zeros(1, dtype=torch.int64, device="cpu")
        sent = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self._pass_tensor(torch.tensor([len(content)], device="cpu"), target, length, source, doing)
        received = torch.empty(int(length), dtype=torch.uint8, device="cpu")
        self._pass_tensor(sent, target, received, source, doing)
        return received.numpy().tobytes()

    def _pass_tensor(
        self, sent: Tensor, target: int, received: Tensor, source: int, doing: str
    ) -> None:
        with self.waiting(doing):  # who waits for one waits for all
            coming = dist.irecv(received, group=self.group, group_src=source)
            going = dist.isend(sent, group=self.group, group_dst=target)
            finish([(coming, received), (going, sent)])

    def broadcast(self, value: T, doing: str, source: int = 0) -> T:
        """The picklable value of one rank, by default the first, on every rank. Collective."""
        if self.size == 1:
            return value
        box = [value]
        with self.waiting(doing):
            dist.broadcast_object_list(box, group=self.group, group_src=source)
        return box[0]

    def add_up(self, tensor: Tensor, doing: str) -> None:
        """Overwrite a contiguous host tensor by the sum over all ranks. Collective.

        One all-reduce, after which all ranks have the same bits: gloo sums each part in one place.
        """
        if self.size > 1:
            with self.waiting(doing):
                dist.all_reduce(tensor, group=self.group)

    def broadcast_tensor(self, tensor: Tensor, doing: str) -> None:
        """Overwrite a contiguous host tensor by rank 0's. Collective; `tensor.nbytes` bytes."""
        for part in self._messages(tensor):
            with self.waiting(doing):
                dist.broadcast(part, group=self.group, group_src=0)

    def send(self, tensor: Tensor, rank: int, doing: str) -> None:
        """Send a contiguous host tensor to a rank, which must `receive` it."""
        for part in self._messages(tensor):
            with self.waiting(doing, [self.ranks[rank]]):
                dist.send(part, group=self.group, group_dst=rank)

    def receive(self, tensor: Tensor, rank: int, doing: str) -> None:
        """Receive into a contiguous host tensor what a rank `send`s."""
        for part in self._messages(tensor):
            with self.waiting(doing, [self.ranks[rank]]):
                dist.recv(part, group=self.group, group_src=rank)

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
        with self.waiting(doing):
            work = dist.all_gather(codes, mine, group=self.group, async_op=True)
            if code:
                self._announced = (work, mine, codes)  # the tensors must outlive the message
                return {}
            work.wait()
        return {rank: int(each) for rank, each in zip(self.ranks, codes, strict=True) if each}

    @contextmanager
    def together(self, doing: str) -> Iterator["Vote"]:
        """Run the body on every rank; if it raises on one rank, raise on all. Collective.

        One all-gather of each rank's error and of what its body left in `vote.answer`, small and
        picklable. A rank whose body raised re-raises its own error, unless several ranks failed in
        different ways; the others raise the same type, or `RankError` if it is not one of
        distavg's. The body must not communicate, or else end on every rank in spite of a failure
        elsewhere.
        """
        error: Exception | None = None
        vote = Vote()
        try:
            yield vote
        except Exception as caught:
            error = caught
        except BaseException as interrupt:  # Ctrl-C: it surfaces at once, and the others hear of it
            self._tell(f"{type(interrupt).__name__}: interrupted")
            raise
        vote.answers = self._raise_together(error, vote.answer, doing)

    def _tell(self, message: str) -> None:
        """Take part in a vote with an error, without waiting for the others."""
        if self.size == 1:
            return
        content = pickle.dumps(((RankError, message), None))
        record = torch.frombuffer(bytearray(_record_of(content)), dtype=torch.uint8)
        received = [torch.empty_like(record) for _ in range(self.size)]
        with suppress(RuntimeError):  # a rank that was lost learns nothing
            work = dist.all_gather(received, record, group=self.group, async_op=True)
            self._announced = (work, record, received)  # the tensors must outlive the message

    def raise_together(self, error: Exception | None, doing: str) -> None:
        """The collective half of `together`, for an error that was caught already."""
        self._raise_together(error, None, doing)

    def _raise_together(self, error: Exception | None, answer: object, doing: str) -> list[Any]:
        if self.size == 1:
            if error is not None:
                raise error
            return [answer]
        failure = None if error is None else (_exported_type(error), _message(error))
        gathered = self.gather((failure, answer), doing)
        failures = {
            rank: failed
            for rank, (failed, _) in zip(self.ranks, gathered, strict=True)
            if failed is not None
        }
        if not failures:
            return [each for _, each in gathered]
        if error is not None and len(set(failures.values())) == 1:
            raise error
        kind = next(iter(failures.values()))[0]
        lines = [f"rank {rank}: {message}" for rank, (_, message) in failures.items()]
        raise kind(f"{doing} failed. " + "\n".join(lines)) from error

    @staticmethod
    def _messages(tensor: Tensor) -> Sequence[Tensor]:
        return torch.split(as_bytes(tensor), MESSAGE_BYTES) if tensor.numel() else ()


@functools.cache
def _let_gloo_finish_at_exit() -> None:
    """At exit, give gloo's threads a moment to drop the tensors of the last collective.

    They need the GIL for it, after the collective has returned. A process whose interpreter goes
    down meanwhile is aborted by torch ("terminate called without an active exception", seen in
    2.13 on a busy machine, in 1 of 7 runs of a script that ended with a collective).
    """
    atexit.register(time.sleep, 0.05)


def finish(works: Sequence[tuple[dist.Work | None, Tensor]]) -> None:
    """Wait for messages under way, each with its tensor, which outlives it also in an error."""
    try:
        for work, _ in works:
            cast(dist.Work, work).wait()  # None only outside of the group
    except BaseException:
        _ABANDONED.append(works)
        raise


class _Groups:
    """The gloo groups that this process has made, one for each set of ranks, timeout and purpose.

    Averagers share them, and none is given back: PyTorch names a group of some ranks by the number
    of groups that there are, which must not depend on when Python collects its garbage. PyTorch
    holds each until the job's groups are destroyed; held here, their store would outlive that, and
    meet the next job at its port.
    """

    def __init__(self) -> None:
        self._made: weakref.WeakValueDictionary[
            tuple[tuple[int, ...], timedelta | None, str], dist.ProcessGroup
        ] = weakref.WeakValueDictionary()
        self._rolls: weakref.WeakKeyDictionary[dist.ProcessGroup, RollCall] = (
            weakref.WeakKeyDictionary()
        )
        self._world: weakref.ref[dist.ProcessGroup] | None = None

    def get(
        self, ranks: tuple[int, ...], timeout: timedelta | None, purpose: str = ""
    ) -> tuple[dist.ProcessGroup, RollCall]:
        """The group of these ranks. Collective over them when it is asked for first."""
        world = cast(dist.ProcessGroup, dist.group.WORLD)
        if self._world is None or self._world() is not world:  # the job has begun anew
            self._world = weakref.ref(world)
            self._made.clear()
        group = self._made.get((ranks, timeout, purpose))
        if group is None:
            make = functools.partial(
                dist.new_group,
                list(ranks),
                timeout=timeout,
                backend="gloo",
                use_local_synchronization=len(ranks) < dist.get_world_size(),
            )
            with RollCall(world, ranks).waiting("making a group of the ranks"):
                # It connects for five times its timeout, and waits for a store that was cut off.
                group = make() if timeout is None else in_time(make, timeout.total_seconds())
            self._made[ranks, timeout, purpose] = group
            self._rolls[group] = RollCall(group, ranks)
        return group, self._rolls[group]


_GROUPS = _Groups()


def _record_of(content: bytes) -> bytes:
    """The length of something, and as much of it as fits in a record."""
    record = len(content).to_bytes(_LENGTH_BYTES, "little") + content
    return record[:_RECORD_BYTES].ljust(_RECORD_BYTES)


def _exported_type(error: Exception) -> Callable[[str], DistavgError]:
    return type(error) if isinstance(error, DistavgError) else RankError


def _message(error: Exception) -> str:
    text = str(error)
    return text if isinstance(error, DistavgError) else f"{type(error).__name__}: {text}"
