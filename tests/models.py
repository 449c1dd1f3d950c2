"""Small models of awkward sizes, and sequences of weights that do not depend on the layout.

Every value is a pure function of (name, seed): `weights_at(model, step)` gives the same whole
tensors for a plain model, under DDP and under FSDP2, and `set_weights` writes into each what is its
own. So a test can feed one sequence to any layout, and to an oracle on the unsharded model:

    for step in range(5):
        weights = weights_at(model, step)
        set_weights(model, weights)      # live weights of this layout
        set_weights(reference, weights)  # a plain model, for torch's AveragedModel
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

LAYOUTS = ("plain", "ddp", "fsdp2", "fsdp2-keep")


class TokenModel(nn.Module):
    """What the models share: `forward` takes tokens below `vocabulary`, and returns logits."""

    vocabulary: ClassVar[int] = 5
    sharded_apart: ClassVar[tuple[str, ...]] = ()  # children that fully_shard wraps, inner first

    def reset(self, seed: int = 0) -> None:
        """Set every parameter and buffer to a function of (name, seed); counters to zero."""
        set_weights(self, weights_at(self, seed, frozen=True, buffers=True))
        with torch.no_grad():
            for _, buffer in integer_buffers(self):
                buffer.zero_()


class Awkward(TokenModel):
    """Everything that plain models and DDP may meet and that is easily got wrong.

    Five rows, one element, zero dims, a transposed parameter, tied and frozen ones, integer, bool
    and floating buffers, batch norm, and a real child called `module`. FSDP2 refuses it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(self.vocabulary, 4)
        self.module = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.transposed = nn.Parameter(torch.empty(7, 5).t())  # (5, 7), strides (1, 5)
        self.frozen = nn.Parameter(torch.empty(7), requires_grad=False)
        self.down = nn.Linear(7, 4, bias=False)
        self.one = nn.Parameter(torch.empty(1))
        self.scalar = nn.Parameter(torch.empty(()))
        self.head = nn.Linear(4, self.vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.offset: Tensor
        self.calls: Tensor
        self.mask: Tensor
        self.register_buffer("offset", torch.empty(self.vocabulary))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
        self.reset()

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (batch,) to logits (batch, vocabulary)."""
        if self.training:
            self.calls += 1
        hidden = self.norm(torch.tanh(self.module(self.embed(tokens))))
        hidden = torch.tanh(hidden @ self.transposed + self.frozen)
        hidden = self.down(hidden) * self.one + self.scalar
        logits: Tensor = self.head(hidden) + self.offset
        return logits


class Uneven(TokenModel):
    """As awkward as FSDP2 allows: it refuses zero-dim and non-contiguous parameters.

    Over 2, 3 and 4 ranks the first dims 5, 3 and 1 leave uneven shards and empty ones. `block` and
    `module` are wrapped on their own, so that there is a nested root.
    """

    sharded_apart = ("block.inner", "block", "module")

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(self.vocabulary, 4)
        self.module = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.block = Block(5)
        self.experts = nn.Parameter(torch.empty(3, 5, 4))
        self.frozen = nn.Parameter(torch.empty(7, 1), requires_grad=False)
        self.one = nn.Parameter(torch.empty(1))
        self.head = nn.Linear(4, self.vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.offset: Tensor
        self.calls: Tensor
        self.register_buffer("offset", torch.empty(self.vocabulary))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.reset()

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (batch,) to logits (batch, vocabulary)."""
        if self.training:
            self.calls += 1
        hidden = self.norm(torch.tanh(self.module(self.embed(tokens))))
        hidden = self.block(hidden)
        hidden = torch.einsum("bi,eij->bj", hidden, self.experts) * self.one + self.frozen.sum()
        logits: Tensor = self.head(torch.tanh(hidden)) + self.offset
        return logits


class Block(nn.Module):
    """A residual step through one row: a parameter that only one rank holds a part of."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(width, 1)
        self.inner = nn.Linear(1, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, width) to (batch, width)."""
        step: Tensor = self.inner(torch.tanh(self.narrow(hidden)))
        return hidden + step


def build(
    layout: str, cls: type[TokenModel] = Uneven, dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Module:
    """`cls` with weights of `seed` in one of LAYOUTS; all but "plain" need a process group."""
    model = cls().to(dtype)
    model.reset(seed)
    if layout == "plain":
        return model
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout in ("fsdp2", "fsdp2-keep"):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        options: dict[str, Any] = {"mesh": mesh}
        if layout == "fsdp2-keep":
            options["reshard_after_forward"] = False
        for name in cls.sharded_apart:
            fully_shard(model.get_submodule(name), **options)
        fully_shard(model, **options)
        return model
    raise ValueError(f"layout {layout!r} is not one of {LAYOUTS}")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def batch(seed: int = 0, size: int = 8) -> Tensor:
    """Tokens for a forward pass of any TokenModel."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TokenModel.vocabulary, (size,), generator=generator)


def loss(model: nn.Module, seed: int = 0) -> Tensor:
    """A loss that gives every trainable parameter a gradient."""
    tokens = batch(seed)
    logits = model(tokens)
    return F.cross_entropy(logits.float(), tokens.flip(0))


def backward(model: nn.Module, seed: int = 0) -> None:
    """One forward and backward pass; afterwards an FSDP2 root may hold unsharded parameters."""
    loss(model, seed).backward()  # type: ignore[no-untyped-call]


def whole_tensor(
    name: str, shape: Sequence[int], step: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A contiguous whole tensor, normally distributed, a pure function of (name, step)."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}@{step}".encode()))
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def weights_at(
    model_or_shapes: nn.Module | Mapping[str, Sequence[int]],
    step: int,
    *,
    frozen: bool = False,
    buffers: bool = False,
) -> dict[str, Tensor]:
    """Whole tensors by canonical name, for a model in any layout or for a mapping of shapes.

    Of a model, the trainable parameters in their own dtype, a tied one under its first name only;
    `frozen` adds the frozen ones, `buffers` the floating buffers, which come out positive so that
    they may be variances. Tensors of a mapping are fp32.
    """
    if not isinstance(model_or_shapes, nn.Module):
        return {name: whole_tensor(name, shape, step) for name, shape in model_or_shapes.items()}
    model = unwrapped(model_or_shapes)
    # A parameter that FSDP2 has gathered has the same name, whole shape and dtype.
    weights = {
        name: whole_tensor(name, parameter.shape, step, parameter.dtype)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or frozen
    }
    if buffers:
        for name, buffer in floating_buffers(model):
            weights[name] = whole_tensor(name, buffer.shape, step, buffer.dtype).abs()
    return weights


@torch.no_grad()
def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write whole tensors in place: this rank's part of them, where the model is sharded.

    FSDP2 modules are resharded first, so that what is written is what the next forward gathers.
    """
    reshard(model)
    targets = dict(floating_buffers(unwrapped(model)))
    targets |= dict(unwrapped(model).named_parameters(remove_duplicate=False))
    for name, weight in weights.items():
        target = targets[name]
        if target.shape != weight.shape:
            raise ValueError(f"{name}: {tuple(target.shape)} in the model, {tuple(weight.shape)}")
        if isinstance(target, DTensor):
            target.to_local().copy_(local_part(weight, target))
        else:
            target.copy_(weight)


def local_part(whole: Tensor, like: DTensor) -> Tensor:
    """The part of `whole` that this rank holds of `like`, found with nothing but torch.chunk.

    On purpose not torch's own offset arithmetic: it is what the library itself may use.
    """
    coordinate = like.device_mesh.get_coordinate()
    if coordinate is None:
        raise ValueError("this rank is not in the tensor's mesh")
    for axis, placement in enumerate(like.placements):
        if type(placement) is Shard:
            chunks = whole.chunk(like.device_mesh.size(axis), placement.dim)
            index = coordinate[axis]
            empty = whole.narrow(placement.dim, 0, 0)
            whole = chunks[index] if index < len(chunks) else empty
        elif not isinstance(placement, Replicate):
            raise NotImplementedError(f"{placement} needs its own rule here")
    return whole


def reshard(model: nn.Module) -> None:
    """Let every FSDP2 module give up its gathered parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Clones of the model's parameters as whole tensors, by canonical name. Collective."""
    reshard(model)
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in unwrapped(model).named_parameters()
    }


def floating_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that may be averaged."""
    return ((name, b) for name, b in model.named_buffers() if b.is_floating_point())


def integer_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that are never averaged: counters and masks."""
    return ((name, b) for name, b in model.named_buffers() if not b.is_floating_point())
