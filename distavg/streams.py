"""Work beside training: streams next to the current ones, and host memory that they copy to."""

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

__all__ = ["Done", "SideStreams", "are_pinned", "host_tensors", "join_all"]

# PyTorch rounds pinned memory up to powers of two, so tensors share allocations of this size.
_SLAB_BYTES = 2**30
_ALIGNMENT_BYTES = 64
_WITH_STREAMS = {"cuda", "xpu"}  # where `Tensor.record_stream` is known to work


class SideStreams:
    """A stream of its own on each accelerator, for work that training need not wait for.

    Ordered by events on the devices; the host never waits. Without an accelerator there are no
    streams, and the work is done when it is queued.

    Args:
        devices: Where the work's tensors lie.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        accelerators = {device for device in devices if device.type in _WITH_STREAMS}
        self._streams = [torch.Stream(device) for device in sorted(accelerators, key=str)]
        self._events = [torch.Event(stream.device) for stream in self._streams]
        if self._streams:
            _ALL.add(self)

    def __bool__(self) -> bool:
        return bool(self._streams)

    @property
    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured from the current stream."""
        return (
            torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
            and torch.cuda.is_current_stream_capturing()
        )

    @contextmanager
    def forked(self) -> Iterator[None]:
        """What the body queues runs on these streams, after all that is queued on the current."""
        with ExitStack() as stack:
            for stream in self._streams:
                stream.wait_stream(torch.accelerator.current_stream(stream.device))
                stack.enter_context(stream)
            try:
                yield
            finally:
                for stream, event in zip(self._streams, self._events, strict=True):
                    event.record(stream)

    def moment(self) -> "Done":
        """For the host to wait for: all that is queued up to now on the current streams."""
        return Done(torch.accelerator.current_stream(each.device) for each in self._streams)

    def use(self, tensors: Iterable[Tensor]) -> None:
        """Keep the memory of tensors that are freed until the work here is done with it."""
        streams = {stream.device: stream for stream in self._streams}
        for tensor in {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values():
            if tensor.device in streams:
                tensor.record_stream(streams[tensor.device])


# Other averagers' work reads the weights, too.
_ALL: weakref.WeakSet[SideStreams] = weakref.WeakSet()


def join_all() -> None:
    """What is queued from now on, on the current streams, runs after all forked work so far.

    Of all `SideStreams` there are. To wait for what is done already costs next to nothing.
    """
    for streams in _ALL:
        for stream, event in zip(streams._streams, streams._events, strict=True):
            torch.accelerator.current_stream(stream.device).wait_event(event)


class Done:
    """A moment on some streams.

    Args:
        streams: Everything that is queued on them belongs before it.
    """

    def __init__(self, streams: Iterable[torch.Stream]) -> None:
        self._events = [stream.record_event() for stream in streams]

    def wait(self) -> None:
        """Block this thread until then."""
        for event in self._events:
            event.synchronize()


def host_tensors(
    shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype], *, pinned: bool
) -> list[Tensor]:
    """Uninitialised contiguous tensors of these shapes and dtypes in host memory."""
    slabs: list[int] = []  # bytes
    places: list[tuple[int, int, int]] = []  # number of the slab, first byte, last
    for shape, dtype in zip(shapes, dtypes, strict=True):
        nbytes = math.prod(shape) * dtype.itemsize
        if not slabs or slabs[-1] + nbytes > _SLAB_BYTES:
            slabs.append(0)
        places.append((len(slabs) - 1, slabs[-1], slabs[-1] + nbytes))
        slabs[-1] += -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    memory = [
        torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned) for nbytes in slabs
    ]
    return [
        memory[number][begin:end].view(dtype).view(tuple(shape))
        for (number, begin, end), shape, dtype in zip(places, shapes, dtypes, strict=True)
    ]


def are_pinned(lives: Iterable[Tensor]) -> bool:
    """Whether host memory should be pinned for copies from and to these tensors."""
    return any(live.device.type in _WITH_STREAMS for live in lives)
