"""An accelerator of pretence: streams that only keep clocks, and a detector of races between them.

Every tensor counts as being on the device. An operation belongs to the stream that is current when
it is called; it races with an earlier one if they touch the same storage, one of them writes, and
no chain of events leads from the earlier one's stream to this one (vector clocks, as in Mattern,
"Virtual Time and Global States of Distributed Systems", 1988).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distavg import streams

Clock = dict[int, int]


class Stream:
    """In place of `torch.Stream`; `with` makes it the current one."""

    current: Stream
    made: int = 0

    def __init__(self, device: torch.device) -> None:
        Stream.made += 1
        self.device = device
        self.number = Stream.made
        self.clock: Clock = {self.number: 0}
        self._before: list[Stream] = []

    def __enter__(self) -> None:
        self._before.append(Stream.current)
        Stream.current = self

    def __exit__(self, *_: object) -> None:
        Stream.current = self._before.pop()

    def wait_stream(self, other: Stream) -> None:
        self._see(other.clock)

    def wait_event(self, event: Event) -> None:
        self._see(event.clock)

    def record_event(self) -> Event:
        event = Event(self.device)
        event.record(self)
        return event

    def _see(self, clock: Clock) -> None:
        for number, time in clock.items():
            self.clock[number] = max(time, self.clock.get(number, 0))


class Event:
    """In place of `torch.Event`."""

    waited_for = 0

    def __init__(self, device: torch.device) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)

    def synchronize(self) -> None:
        Event.waited_for += 1


class Races(TorchDispatchMode):
    """Notes every access to a storage in this thread, and which race."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._writes: dict[int, tuple[int, int]] = {}
        self._reads: dict[int, list[tuple[int, int]]] = {}
        self._alive: list[Any] = []  # no address may be used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        stream = Stream.current
        stream.clock[stream.number] += 1
        for argument, value in zip(func._schema.arguments, args, strict=False):
            is_write = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor):
                    self._touch(tensor, func, stream, is_write=is_write)
        return result

    def _touch(self, tensor: Tensor, func: Any, stream: Stream, *, is_write: bool) -> None:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        address = storage.data_ptr()
        earlier = [self._writes[address]] if address in self._writes else []
        if is_write:
            earlier += self._reads.get(address, [])
        for number, time in earlier:
            if stream.clock.get(number, 0) < time:
                self.found.append(f"{func} on stream {stream.number} races with {number}")
        now = stream.number, stream.clock[stream.number]
        if is_write:
            self._writes[address] = now
            self._reads[address] = []
        else:
            self._reads.setdefault(address, []).append(now)


@contextmanager
def pretended_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Races]:
    """The CPU counts as a device with streams; yields what finds the races."""
    monkeypatch.setattr(streams, "_WITH_STREAMS", {"cpu"})
    monkeypatch.setattr(streams, "_ALL", weakref.WeakSet())
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device=None: Stream.current)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: None)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **kw: empty(*a, **kw))
    Stream.made = Event.waited_for = 0
    Stream.current = Stream(torch.device("cpu"))
    with Races() as races:
        yield races
