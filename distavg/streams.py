"""Work beside training: streams next to the current ones, and host memory that they copy to."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

__all__ = ["Done", "SideStreams", "host_memory", "host_tensors"]

# PyTorch rounds pinned memory up to powers of two, so tensors share allocations of this size.
_SLAB_BYTES = 2**28
_ALIGNMENT_BYTES = 64
_HOSTS = {"cpu", "meta"}  # devices without streams


class SideStreams:
    """A stream of its own on each accelerator, for work that training need not wait for.

    Ordered by events on the devices; the host never waits. Without an accelerator there are no
    streams, and the work is done when it is queued.

    Args:
        devices: Where the work's tensors lie.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        accelerators = {device for device in devices if device.type not in _HOSTS}
        self._streams = [torch.Stream(device) for device in sorted(accelerators, key=str)]
        self._events = [torch.Event(stream.device) for stream in self._streams]
        self._is_ahead = False

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
                self._is_ahead = bool(self._streams)
                for stream, event in zip(self._streams, self._events, strict=True):
                    event.record(stream)

    def join(self) -> None:
        """What is queued from now on, on the current streams, runs after the work so far."""
        if self._is_ahead:
            self._is_ahead = False
            for stream, event in zip(self._streams, self._events, strict=True):
                torch.accelerator.current_stream(stream.device).wait_event(event)

    def moment(self) -> "Done":
        """For the host to wait for: all that is queued up to now on the current streams."""
        return Done(torch.accelerator.current_stream(each.device) for each in self._streams)

    def use(self, tensors: Iterable[Tensor]) -> None:
        """Keep the memory of tensors that are freed until the work here is done with it."""
        streams = {stream.device: stream for stream in self._streams}
        for tensor in {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values():
            if tensor.device in streams:
                tensor.record_stream(streams[tensor.device])


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


def host_memory(num_elements: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised host memory, pinned where there is an accelerator to copy from or to it."""
    return torch.empty(
        num_elements, dtype=dtype, device="cpu", pin_memory=torch.accelerator.is_available()
    )


def host_tensors(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Uninitialised contiguous tensors of these shapes and dtypes in `host_memory`."""
    slabs: list[int] = []  # bytes
    places: list[tuple[int, int, int]] = []  # number of the slab, first byte, last
    for shape, dtype in zip(shapes, dtypes, strict=True):
        nbytes = math.prod(shape) * dtype.itemsize
        if not slabs or slabs[-1] + nbytes > _SLAB_BYTES:
            slabs.append(0)
        places.append((len(slabs) - 1, slabs[-1], slabs[-1] + nbytes))
        slabs[-1] += -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    memory = [host_memory(nbytes, torch.uint8) for nbytes in slabs]
    return [
        memory[number][begin:end].view(dtype).view(tuple(shape))
        for (number, begin, end), shape, dtype in zip(places, shapes, dtypes, strict=True)
    ]
