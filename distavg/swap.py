"""An average in place of the live weights, and back, without a trace.

Going in, each rank exchanges the shards that it owns: in place where average and live weights
have one dtype, so that the live values wait in the average's memory. Where replicas divide the
average, each owner then sends its part to the others. Coming back is the same exchange, and
the same messages with the live values. Where nothing is replicated the weights need no
communication; the ranks only tell each other that all went well.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from distavg.average import Average, is_exchanged
from distavg.comm import Comm
from distavg.errors import DistavgError, RankError, StateError
from distavg.foreach import Exchange
from distavg.shards import ModelShards
from distavg.tensors import LiveTensor
from distavg.wrappers import Face

__all__ = ["applied", "make_permanent", "undisturbed"]

logger = logging.getLogger("distavg")

# What a rank announces when it leaves the body of `applied()`: the sum of what happened.
_WELL, _RAISED, _WROTE, _DAMAGED, _MOVED = 0, 1, 2, 4, 8
_HAPPENED = {
    _RAISED: "raised an exception",
    _WROTE: "wrote to weights",
    _RAISED | _WROTE: "wrote to weights and raised an exception",
}


@contextmanager
def applied(average: Average, model_shards: ModelShards, comm: Comm) -> Iterator[None]:
    """The body runs with the average in place of the live weights. Collective at both ends.

    Going in: a vote of all ranks, then, where replicas divide the average, a checksum of them
    and every piece from its owner. Coming back: an all-gather of one integer, then the live
    pieces. A rank whose body raised does not wait for the others,
    unless they need its pieces.

    Before the average's first update no weight is moved; all else is the same.

    Raises:
        StateError: A weight was written to inside the body.
        RankError: Another rank's body raised, or a rank was lost; an exception of this rank's
            own body goes first.
    """
    swap = _Swap(average, model_shards, comm)
    swap.enter()
    code = _WELL
    try:
        with undisturbed(model_shards.modules, _devices(model_shards)):
            put_statistics(average, model_shards)
            yield
    except BaseException:
        code = _RAISED
        raise
    finally:
        swap.leave(code)


class _Swap:
    """The exchange behind `applied`, and what must be remembered to undo it."""

    def __init__(self, average: Average, model_shards: ModelShards, comm: Comm) -> None:
        self._average = average
        self._shards = model_shards
        self._comm = comm
        self._doing = f"applied({average.name!r})"
        self._moves: list[_Move] = []  # those begun
        self._is_moved = average.num_updates > 0  # before that, it reads as the live weights
        self._is_shared = self._is_moved and model_shards.is_divided
        self._face = model_shards.face
        self._versions: list[tuple[LiveTensor, Tensor, int]] = []

    def enter(self) -> None:
        """Put the average in place; on a failure of any rank put the live weights back on all."""
        if self._is_shared:
            self._shards.check_replicas(self._doing)
        error: Exception | None = None
        try:
            try:
                self._put_average()
            except Exception as caught:
                error = caught
            self._comm.raise_together(error, self._doing)
        except BaseException:  # Ctrl-C, too: then the other ranks see that this one does not come
            self._put_live()
            raise
        try:
            self._share_pieces()
        except BaseException as caught:
            self._put_live()
            self._mark_lost(caught)
            raise
        self._average.is_applied = True
        self._shards.face = Face(self._average.name)
        self._versions = [
            (tensor, each, each._version)
            for tensor in self._shards.tensors
            if not tensor.named.is_buffer
            for each in tensor.versioned
        ]

    def leave(self, code: int) -> None:
        """Put the live weights back, whatever happened; raise unless the body did."""
        has_moved = not self._shards.has_same_storage
        written = [tensor for tensor, each, version in self._versions if each._version != version]
        interrupt = self._put_live()
        self._average.is_applied = False
        self._shards.face = self._face
        error: DistavgError | None = None
        if has_moved:
            self._shards.lost = (
                f"weights moved to other storage inside {self._doing} (model.to(), or "
                "load_state_dict(assign=True)?), so the live ones cannot be put back there. Resume "
                "from a checkpoint"
            )
            error = StateError(self._shards.lost)
            logger.error(error)
            code |= _MOVED
        elif written:
            error = self._mark_written(written)
            code |= _WROTE | (_DAMAGED if self._average.damaged else 0)
        others: dict[int, int] = {}
        try:
            others = self._comm.announce(code, self._doing)
            self._share_pieces()
        except BaseException as lost:
            if self._is_shared:
                self._mark_lost(lost)
            if not isinstance(lost, RankError):
                raise
            error = error or lost
        if interrupt is not None:
            raise interrupt
        if others:
            causes = ", ".join(
                f"rank {rank} "
                + ("moved weights" if c & _MOVED else _HAPPENED[c & (_RAISED | _WROTE)])
                for rank, c in others.items()
            )
            error = RankError(
                f"{self._doing}: {causes} inside the body; see its own output. The live weights "
                "are back in place on this rank"
            )
            if any(c & _DAMAGED for c in others.values()):
                self._average.damaged = str(error)
        if error is not None and not code & _RAISED:
            raise error

    def _mark_written(self, written: Sequence[LiveTensor]) -> StateError:
        """Say what became of values that the body wrote to weights."""
        damaged = [
            tensor
            for tensor in written
            if self._is_moved
            and tensor.is_held
            and self._average.dtypes[tensor.fqn] == tensor.dtype
        ]
        tensor = (damaged or written)[0]
        text = f"{tensor.fqn} was written to inside {self._doing}, where the average lies"
        if tensor.named.flattened is not None:
            text += " (summon_full_params(writeback=True) does so, too)"
        text += ". "
        if damaged:
            text += (
                "The live weights are restored, and what was written is now in the average: load "
                "a checkpoint, or build a new Averager"
            )
            self._average.damaged = text
        elif tensor.is_held and self._is_moved:
            text += "The live weights are restored, and what was written is lost"
        elif tensor.is_held:
            text += "The average had no update yet, so the weight stays as it was written"
        else:
            text += "It is not averaged, so it stays as it was written"
        logger.error(text)  # the body's own exception, if there is one, hides the StateError
        return StateError(text)

    def _mark_lost(self, cause: BaseException) -> None:
        self._shards.lost = (
            f"{self._doing} lost a rank before it could restore the live weights that replicas "
            f"share, so this rank's live weights are not restored. Resume from a checkpoint. "
            f"({cause})"
        )
        logger.error(self._shards.lost)

    def _share_pieces(self) -> None:
        if self._is_shared:
            _share_pieces(self._shards, self._doing)

    def _put_average(self) -> None:
        self._shards.reshard()
        if not self._is_moved:
            return
        self._shards.break_graphs()
        exchanged: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        kept: list[tuple[Tensor, Tensor]] = []
        for live, average in zip(self._average.live, self._average.tensors, strict=True):
            if is_exchanged(live.tensor, average):
                key = live.tensor.device, average.dtype
                exchanged.setdefault(key, []).append((live.tensor, average))
            else:
                kept.append((live.tensor, average))
        if kept:
            self._begin(_Kept(kept))
        for pairs in exchanged.values():
            self._begin(Exchange(pairs))

    def _begin(self, move: "_Move") -> None:
        self._moves.append(move)
        move.go()

    def _put_live(self) -> BaseException | None:
        """Undo what was begun, to the end; return the interrupt (Ctrl-C) that came meanwhile."""
        interrupt: BaseException | None = None
        while True:
            try:
                self._shards.reshard()
                self._shards.break_graphs()
                for move in self._moves:
                    move.go()
                    move.come_back()
                return interrupt
            except Exception as error:  # noqa: PERF203 -- the device failed; no second try
                self._mark_lost(error)
                raise
            except BaseException as caught:
                interrupt = caught


class _Move(Protocol):
    """The way of some shards there and back. Both can be interrupted and called again."""

    def go(self) -> None: ...

    def come_back(self) -> None: ...


class _Kept:
    """The live values wait in copies, beside their averages, which have another dtype."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._lives, self._averages = [live for live, _ in pairs], [each for _, each in pairs]
        self._copies = [live.to(average.device, copy=True) for live, average in pairs]

    def go(self) -> None:
        self._copy(self._averages)

    def come_back(self) -> None:
        self._copy(self._copies)

    @torch.no_grad()
    def _copy(self, sources: list[Tensor]) -> None:
        torch._foreach_copy_(self._lives, sources)


@torch.no_grad()
def put_statistics(average: Average, model_shards: ModelShards) -> None:
    """Copy an average's own BatchNorm statistics over the live buffers. Not collective."""
    for fqn, value in average.statistics.items():
        for part in model_shards.by_name[fqn].parts:
            part.tensor.copy_(value)


@torch.no_grad()
def make_permanent(average: Average, model_shards: ModelShards) -> None:
    """Copy an average over the live weights. Collective where replicas divide it."""
    model_shards.break_graphs()
    for live, shard in zip(average.live, average.shards(), strict=True):
        live.tensor.copy_(shard.tensor)
    put_statistics(average, model_shards)
    try:
        _share_pieces(model_shards, "copy_to()")
    except BaseException as error:
        model_shards.lost = f"the live weights are a mixture on this rank: {error}"
        raise
    finally:
        model_shards.face = Face(None)


def _share_pieces(model_shards: ModelShards, doing: str) -> None:
    """Give every replica the live pieces that another owns. Collective; see `ReplicaGroup`."""
    for group, parts in model_shards.pieces:
        group.share([[shard.tensor for shard in part] for part in parts], doing)


def _devices(model_shards: ModelShards) -> set[torch.device]:
    return {part.tensor.device for tensor in model_shards.tensors for part in tensor.parts}


@contextmanager
def undisturbed(modules: Sequence[nn.Module], devices: set[torch.device]) -> Iterator[None]:
    """Restore buffers, train/eval modes and PyTorch's RNG states after the body.

    Costs a copy of the buffers, non-persistent ones included.
    """
    modes = [(module, module.training) for module in modules]
    empty = [
        (module, key)
        for module in modules
        for key, buffer in module._buffers.items()
        if buffer is None
    ]
    buffers = [
        (module, key, buffer, buffer.clone())
        for module in modules
        for key, buffer in module.named_buffers(recurse=False)
    ]
    transient = [(module, set(module._non_persistent_buffers_set)) for module in modules]
    accelerators = [device for device in devices if device.type not in ("cpu", "meta")]
    kind = accelerators[0].type if accelerators else "cuda"
    try:
        with torch.random.fork_rng([device.index for device in accelerators], device_type=kind):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, key, buffer, saved in buffers:
            if 0 not in buffer.stride():  # nobody can write to an expanded tensor
                # Always: BatchNorm writes its statistics behind their versions.
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    if buffer.shape != saved.shape:
                        buffer.resize_(saved.shape)
                    buffer.copy_(saved)
            _register(module, key, buffer)
        for module, key in empty:
            _register(module, key, None)
        for module, keys in transient:
            module._non_persistent_buffers_set = keys


def _register(module: nn.Module, key: str, buffer: Tensor | None) -> None:
    """Put a buffer where it was, whatever has become of it."""
    if module._buffers.get(key, module) is not buffer:
        module.__dict__.pop(key, None)
        module._parameters.pop(key, None)
        module._buffers[key] = buffer
