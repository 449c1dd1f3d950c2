"""Averages in host memory: live tensors are copied out, and a thread averages the copies.

A copy goes through a bounded buffer on the device, so that it is a few long transfers however many
tensors there are, into host memory that is taken beforehand. There are two such host copies: one
update can be copied out while the one before is averaged. An update that finds both in use waits
for the older one, and is counted.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from distavg.foreach import Blend, Lerp, Table, chunk_elements, laid_out, packed
from distavg.streams import Done, SideStreams, host_memory

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
        self._free = deque(_Copy(messages) for _ in range(_NUM_COPIES))
        self._under_way: deque[tuple[Future[None], _Copy]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="distavg-offload")
        streams.use(message.flat for each in messages for message in each)

    def run(self, blends: Sequence[Sequence[Blend | None]]) -> None:
        """Copy the live tensors out, and update the averages from there later.

        The copy is queued on the current streams; without an accelerator it is made at once.

        Args:
            blends: For each table what its averages' update does.

        Raises:
            Exception: What an earlier update failed with, as from `join`.
        """
        while self._under_way and self._under_way[0][0].done():
            self._finish_oldest()
        if not self._free:
            self.num_waits += 1
            self._finish_oldest()
        copy = self._free[0]  # in use from below on: what comes before can be interrupted
        copy.fill()
        moment = self._streams.moment()
        self._free.popleft()
        self._under_way.append((self._thread.submit(copy.average, moment, blends), copy))

    def join(self) -> None:
        """Wait until every update is made.

        Raises:
            Exception: What a custom rule's function raised in the thread.
        """
        while self._under_way:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        update, copy = self._under_way[0]
        wait([update])  # an interrupt leaves all as it is
        self._under_way.popleft()
        self._free.append(copy)
        update.result()


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
        self._ways: list[tuple[_Message, Tensor]] = []
        self._lerps: list[Lerp] = []
        for messages in tables:
            hosts = [host_memory(each.flat.numel(), each.flat.dtype) for each in messages]
            self._ways += zip(messages, hosts, strict=True)
            copies = [
                part
                for message, host in zip(messages, hosts, strict=True)
                for part in laid_out(message.lives, host)
            ]
            columns = zip(*(each.averages for each in messages), strict=True)
            averages = [[part for parts in column for part in parts] for column in columns]
            self._lerps.append(Lerp(averages, copies))

    @torch.no_grad()
    def fill(self) -> None:
        """Queue the copies."""
        for message, host in self._ways:
            torch._foreach_copy_(message.parts, message.lives)
            host.copy_(message.flat, non_blocking=True)

    def average(self, copied: Done, blends: Sequence[Sequence[Blend | None]]) -> None:
        """Update the averages, when the copies are there."""
        copied.wait()
        for lerp, each in zip(self._lerps, blends, strict=True):
            lerp(each)


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
