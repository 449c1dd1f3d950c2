"""Averages in host memory: live tensors are copied out, and a thread averages the copies.

A copy goes through a bounded buffer on the device, so that it is a few long transfers however many
tensors there are, into host memory that is taken beforehand. There are two such host copies: one
update can be copied out while the one before is averaged. An update that finds both in use waits
for the older one, and is counted.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from distavg.errors import StateError
from distavg.foreach import Blend, Lerp, Table, chunk_elements, laid_out, packed
from distavg.streams import Done, SideStreams, are_pinned, host_tensors

__all__ = ["Offload"]

_NUM_COPIES = 2


class Offload:
    """Updates averages in host memory, one update after another, off the training's thread.

    Takes two copies of the live tensors in host memory, and a buffer of at most 32 MiB for each
    device and dtype (1 MiB on a CPU).

    Args:
        tables: What is averaged; the averages in host memory, the live tensors anywhere.
        streams: Those of the live tensors' devices.

    Attributes:
        num_waits: How many updates have waited for one before them.
    """

    def __init__(self, tables: Sequence[Table], streams: SideStreams) -> None:
        self.num_waits = 0
        self._streams = streams
        messages = [list(_messages(table)) for table in tables]
        self._copies = [_Copy(messages) for _ in range(_NUM_COPIES)]
        self._next = 0  # they take turns, so that it is the one that was used longest ago
        self._thread = ThreadPoolExecutor(1, "distavg-offload")
        streams.use(message.flat for each in messages for message in each)

    def run(self, blends: Sequence[Sequence[Blend | None]]) -> None:
        """Copy the live tensors out, and update the averages from there later.

        The copy is queued on the current streams; without an accelerator it is made at once.

        Args:
            blends: For each table what its averages' update does.

        Raises:
            StateError: An earlier update has failed, as from `join`.
        """
        self._refuse_thread()
        copy = self._copies[self._next]
        if copy.update is not None and not copy.update.done():
            self.num_waits += 1
            wait([copy.update])
        if any(each.has_failed for each in self._copies):
            self.join()
        copy.fill()
        copy.update = self._thread.submit(copy.average, self._streams.moment(), blends)
        self._next = (self._next + 1) % _NUM_COPIES

    def join(self) -> None:
        """Wait until every update is made.

        Raises:
            StateError: A custom rule's function raised in the thread.
        """
        self._refuse_thread()
        wait([copy.update for copy in self._copies if copy.update is not None])
        failed = [copy for copy in self._copies if copy.has_failed]
        errors = [copy.update.exception() for copy in failed if copy.update is not None]
        for copy in failed:
            copy.update = None  # heard of
        if errors:
            raise StateError(
                f"an update in host memory failed ({type(errors[0]).__name__}: {errors[0]})"
            ) from errors[0]

    def _refuse_thread(self) -> None:
        if any(copy.thread == threading.get_ident() for copy in self._copies):
            raise StateError(
                "a rule's function called its own averager, which waits for that function to end"
            )


@dataclass(frozen=True, slots=True)
class _Message:
    """Parts of live tensors that are copied out together.

    Attributes:
        lives: The parts.
        averages: For each average its corresponding parts.
        parts: Views of `flat`, in the parts' shapes.
        flat: On the device, where they lie one after another on their way.
    """

    lives: list[Tensor]
    averages: list[list[Tensor]]
    parts: list[Tensor]
    flat: Tensor


class _Copy:
    """The live tensors in host memory, and the way of their values through it."""

    def __init__(self, tables: Sequence[Sequence[_Message]]) -> None:
        self.update: Future[None] | None = None  # that reads from here, or has done so
        self.thread: int | None = None  # in which one does so at present
        self._ways: list[tuple[_Message, Tensor]] = []
        self._lerps: list[Lerp] = []
        for messages in tables:
            flats = [message.flat for message in messages]
            hosts = host_tensors(
                [flat.shape for flat in flats],
                [flat.dtype for flat in flats],
                pinned=are_pinned(flats),
            )
            self._ways += zip(messages, hosts, strict=True)
            copies = [
                part
                for message, host in zip(messages, hosts, strict=True)
                for part in laid_out(message.lives, host)
            ]
            columns = zip(*(each.averages for each in messages), strict=True)
            averages = [[part for parts in column for part in parts] for column in columns]
            self._lerps.append(Lerp(averages, copies))

    @property
    def has_failed(self) -> bool:
        """Whether an update has ended in an exception."""
        update = self.update
        return update is not None and update.done() and update.exception() is not None

    @torch.no_grad()
    def fill(self) -> None:
        """Queue the copies."""
        for message, host in self._ways:
            torch._foreach_copy_(message.parts, message.lives)
            host.copy_(message.flat, non_blocking=True)

    def average(self, copied: Done, blends: Sequence[Sequence[Blend | None]]) -> None:
        """Update the averages, when the copies are there."""
        self.thread = threading.get_ident()
        try:
            copied.wait()
            for lerp, each in zip(self._lerps, blends, strict=True):
                lerp(each)
        finally:
            self.thread = None


def _messages(table: Table) -> Iterator[_Message]:
    alike: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]] = {}
    for live, *averages in zip(table.lives, *table.averages, strict=True):
        alike.setdefault((live.device, live.dtype), []).append((live, *averages))
    for (device, dtype), rows in alike.items():
        limit = min(chunk_elements(device, dtype), sum(row[0].numel() for row in rows))
        buffer = torch.empty(limit, dtype=dtype, device=device)
        for batch in packed(rows, limit):
            lives, *columns = (list(column) for column in zip(*batch, strict=True))
            flat = buffer[: sum(live.numel() for live in lives)]
            yield _Message(lives, columns, laid_out(lives, flat), flat)
