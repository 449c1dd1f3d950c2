"""Which ranks did not come, when a collective fails: the error that it fails with does not say.

A rank that has waited for a second leaves a note in its process group's store, and takes it back
when the others have come. One whose collective has failed leaves a note, too, gives the others a
moment to leave theirs, and names those who have none: they have ended, or are stuck, or elsewhere.
Nothing is sent as long as all ranks come in time.
"""

import atexit
import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from distavg.errors import RankError

__all__ = ["LONGEST", "RollCall", "in_time"]

T = TypeVar("T")

_PATIENCE_SECONDS = 1.0  # before a rank that waits leaves its note
_TICK_SECONDS = 0.25  # between two looks for such ranks
_GRACE_SECONDS = 2.0  # in which the notes of all who wait are there
_STORE_SECONDS = 1.0  # for an answer of the store, whose host may be the one that was lost

LONGEST = timedelta(seconds=_GRACE_SECONDS + _STORE_SECONDS)  # that a roll call takes


class RollCall:
    """The ranks of a process group, as far as they wait for each other. One thread at a time.

    Args:
        group: The process group; its store is used.
        ranks: Its global ranks.
    """

    def __init__(self, group: dist.ProcessGroup, ranks: Sequence[int]) -> None:
        self._store = PrefixStore("distavg", group.get_group_store())
        self._rank, self._ranks = dist.get_rank(), ranks
        self._doing: str | None = None  # what is waited for at present
        self._since = 0.0
        self._is_noted = False
        self._lock = threading.Lock()  # over the note
        self._has_store = True  # that answers
        self._lost: str | None = None  # what was found out: gloo closes all connections then
        _watch(self)

    @contextmanager
    def waiting(self, doing: str, others: Sequence[int] | None = None) -> Iterator[None]:
        """Around a collective: if it fails, say who did not come.

        Args:
            doing: What for, in an error's words; the same on all ranks.
            others: The global ranks that take part, besides this one; None for all.

        Raises:
            RankError: The collective has failed, or its timeout is over; at most `LONGEST` later.
        """
        self._since, self._doing = time.monotonic(), doing
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TimeoutError) as error:  # timeouts and dead peers are reported so
            others = [rank for rank in others or self._ranks if rank != self._rank]
            self._lost = self._lost or self._missing(doing, others)
            raise RankError(
                f"{doing}: lost contact with {self._lost}. The rank that failed "
                f"has the cause in its own output; Averager(timeout=...) is how long ranks wait. "
                f"{error}"
            ) from error
        else:
            self._doing = None
            is_noted = self._is_noted or self._lock.locked()  # or about to be
            if is_noted and self._lost is None and self._has_store:
                self._has_store = self._within(self._take_back) is not None
        finally:
            self._doing = None

    def look(self) -> None:
        """Leave a note, if this rank has waited for long. Called now and then, by a thread."""
        doing = self._doing
        if doing and self._has_store and time.monotonic() - self._since > _PATIENCE_SECONDS:
            with suppress(RuntimeError), self._lock:  # the store may be lost
                if not self._is_noted and self._doing == doing:
                    self._note(doing)

    def _note(self, doing: str) -> None:
        self._is_noted = True
        self._store.set(str(self._rank), doing)

    def _take_back(self) -> bool:
        with self._lock:
            self._is_noted = False
            return self._store.delete_key(str(self._rank))

    def _missing(self, doing: str, others: Sequence[int]) -> str:
        """Who did not come, in words."""

        def ask() -> str:
            with self._lock:
                self._note(doing)
            until = time.monotonic() + _GRACE_SECONDS
            while absent := self._without_note(others):
                if time.monotonic() > until:
                    return _named(absent) + ", which ended or did not come within the timeout"
                time.sleep(0.05)
            for rank in others:
                if (elsewhere := self._store.get(str(rank)).decode()) != doing:
                    return f"rank {rank}, which waits in {elsewhere}"
            return "ranks that have come: a connection between them broke"

        answer = self._within(ask, LONGEST.total_seconds())
        return answer or (
            "other ranks, and with the job's store, on the machine of rank 0 or of torchrun's "
            "rendezvous endpoint"
        )

    def _without_note(self, ranks: Sequence[int]) -> list[int]:
        """Those of some ranks; few questions if few are missing."""
        if not ranks or self._store.check([str(rank) for rank in ranks]):
            return []
        if len(ranks) == 1:
            return list(ranks)
        half = len(ranks) // 2
        return [*self._without_note(ranks[:half]), *self._without_note(ranks[half:])]

    @staticmethod
    def _within(ask: Callable[[], T], seconds: float = _STORE_SECONDS) -> T | None:
        """What a function that uses the store returns; None if the store was lost."""
        try:
            return in_time(ask, seconds)
        except (RuntimeError, TimeoutError):
            return None


def in_time(call: Callable[[], T], seconds: float) -> T:
    """What a function returns or raises, which may wait for the network without a deadline.

    A TCPStore whose host was cut off is waited for until the kernel gives the connection up.

    Raises:
        TimeoutError: It took longer. The thread that called it waits on, alone.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="distavg-in-time", daemon=True).start()
    if not wait([future], seconds).done:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    return future.result()


def _named(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    listed = ", ".join(map(str, ranks[:16]))
    return f"ranks {listed}" + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")


# ------------------------------------------------------------------ the thread that looks

_calls: weakref.WeakSet[RollCall] = weakref.WeakSet()
_calls_lock = threading.Lock()


def _watch(call: RollCall) -> None:
    """Look at it from now on, as long as it is used."""
    with _calls_lock:
        _calls.add(call)
    _start_to_look()


@functools.cache
def _start_to_look() -> None:
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(_TICK_SECONDS):
            with _calls_lock:
                calls = list(_calls)
            for call in calls:
                call.look()
            del calls

    thread = threading.Thread(target=run, name="distavg-rollcall", daemon=True)
    thread.start()

    def stop() -> None:
        ended.set()
        thread.join(_STORE_SECONDS)

    atexit.register(stop)
