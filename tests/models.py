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

import re
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

LAYOUTS = ("plain", "ddp", "fsdp2", "fsdp2-keep")

# The world sizes on which each of the further layouts is tested.
FURTHER_SIZES = {
    "fsdp2-half": (4,),
    "hsdp": (4,),
    "fsdp1": (2, 3, 4),
    "fsdp1-flat": (2, 3),
    "fsdp1-grad-op": (2,),
    "fsdp1-grad-op-flat": (2,),
    "fsdp1-no-shard": (2,),
    "fsdp1-no-shard-flat": (2,),
    "fsdp1-hybrid": (4,),
    "fsdp1-hybrid-flat": (4,),
    "tp": (2, 3),
    "tp-fsdp2": (4,),
}

_Strategy = ShardingStrategy
FSDP1_OPTIONS: dict[str, dict[str, Any]] = {
    "fsdp1": {"use_orig_params": True},
    "fsdp1-flat": {"use_orig_params": False},
    "fsdp1-grad-op": {"use_orig_params": True, "sharding_strategy": _Strategy.SHARD_GRAD_OP},
    "fsdp1-grad-op-flat": {"use_orig_params": False, "sharding_strategy": _Strategy.SHARD_GRAD_OP},
    "fsdp1-no-shard": {"use_orig_params": True, "sharding_strategy": _Strategy.NO_SHARD},
    "fsdp1-no-shard-flat": {"use_orig_params": False, "sharding_strategy": _Strategy.NO_SHARD},
    "fsdp1-hybrid": {"use_orig_params": True, "sharding_strategy": _Strategy.HYBRID_SHARD},
    "fsdp1-hybrid-flat": {"use_orig_params": False, "sharding_strategy": _Strategy.HYBRID_SHARD},
}
FSDP2_OPTIONS: dict[str, dict[str, Any]] = {
    "fsdp2": {},
    "fsdp2-keep": {"reshard_after_forward": False},
    "fsdp2-half": {"reshard_after_forward": 2},  # on 4 ranks: halves after a forward
    "hsdp": {},
}


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
    if layout in FSDP1_OPTIONS:
        return in_fsdp1(model, **FSDP1_OPTIONS[layout])
    if layout in ("tp", "tp-fsdp2"):
        model = in_tensor_parallel(model, data_parallel=2 if layout == "tp-fsdp2" else 1)
        if layout == "tp":
            return model
    if layout not in FSDP2_OPTIONS and layout != "tp-fsdp2":
        raise ValueError(f"layout {layout!r} is not one of {LAYOUTS} and {list(FURTHER_SIZES)}")
    mesh = mesh_of(layout)
    for name in cls.sharded_apart:
        fully_shard(model.get_submodule(name), mesh=mesh, **FSDP2_OPTIONS.get(layout, {}))
    return fully_shard(model, mesh=mesh, **FSDP2_OPTIONS.get(layout, {}))


def mesh_of(layout: str) -> DeviceMesh:
    """All ranks; two replicas of half of them each for HSDP; the data axis next to a TP axis."""
    size = dist.get_world_size()
    if layout in ("hsdp", "fsdp1-hybrid", "fsdp1-hybrid-flat"):
        return init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replica", "shard"))
    if layout == "tp-fsdp2":
        return init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "tensor"))["data"]
    return init_device_mesh("cpu", (size,))


def flat_parameters(model: nn.Module) -> dict[str, Any]:
    """FSDP1's flat parameters, by the number of the unit."""
    units = [m for m in model.modules() if isinstance(m, FullyShardedDataParallel)]
    handles = [unit._handle for unit in units]
    return {f"unit {i}": h.flat_param for i, h in enumerate(handles) if h is not None}


def in_fsdp1(model: TokenModel, **options: Any) -> nn.Module:
    """Nested FSDP1 units; frozen parameters stay outside, as flat parameters need them to."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    options |= {"device_id": torch.device("cpu"), "ignored_states": frozen}
    if options.get("sharding_strategy") is ShardingStrategy.HYBRID_SHARD:
        options["device_mesh"] = mesh_of("hsdp")
    with warnings.catch_warnings():
        # NO_SHARD is deprecated; one rank makes every strategy into it
        warnings.filterwarnings("ignore", message=".*NO_SHARD.*")
        for name in model.sharded_apart:
            parent, _, child = name.rpartition(".")
            unit = FullyShardedDataParallel(model.get_submodule(name), **options)
            setattr(model.get_submodule(parent), child, unit)
        return FullyShardedDataParallel(model, **options)


def in_tensor_parallel(model: TokenModel, data_parallel: int = 1) -> TokenModel:
    """Column- and row-wise linear layers; the tied embedding stays tied."""
    shape = (data_parallel, dist.get_world_size() // data_parallel)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))["tensor"]
    plan: dict[str, Any] = {
        "module": ColwiseParallel(output_layouts=Replicate()),
        "block.narrow": RowwiseParallel(input_layouts=Replicate()),
        "block.inner": ColwiseParallel(output_layouts=Replicate()),
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    model.head.weight = model.embed.weight
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, FSDP1 or torch.compile, or the model itself."""
    model = getattr(model, "_orig_mod", model)
    wrappers = (DistributedDataParallel, FullyShardedDataParallel)
    return model.module if isinstance(model, wrappers) else model


@contextmanager
def whole_parameters(
    model: nn.Module, *, writeback: bool = False
) -> Iterator[dict[str, nn.Parameter]]:
    """Parameters by canonical name; those of FSDP1 are whole inside. Collective under FSDP1.

    `writeback`: whether what is written to FSDP1's reaches its shards.
    """
    reshard(model)
    with ExitStack() as stack:
        wrapped = getattr(model, "_orig_mod", model)
        if isinstance(wrapped, FullyShardedDataParallel):
            summoned = FullyShardedDataParallel.summon_full_params(wrapped, writeback=writeback)
            stack.enter_context(summoned)
        named = unwrapped(model).named_parameters(remove_duplicate=False)
        levels = re.compile("_fsdp_wrapped_module\\.|_orig_mod\\.")
        yield {levels.sub("", name): parameter for name, parameter in named}


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
    if isinstance(model_or_shapes, FullyShardedDataParallel):
        dtype = next(model_or_shapes.parameters()).dtype
        with torch.random.fork_rng(devices=()):
            plain = type(model)().to(dtype)
        return weights_at(plain, step, frozen=frozen, buffers=buffers)
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
    with whole_parameters(model, writeback=True) as parameters:
        targets = {**dict(floating_buffers(unwrapped(model))), **parameters}
        for name, weight in weights.items():
            target = targets[name]
            if target.shape != weight.shape:
                raise ValueError(f"{name}: {tuple(target.shape)} in the model, not {weight.shape}")
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
    # FSDP2 shards what tensor parallelism has sharded already: the tensor axis comes first.
    axes = list(enumerate(like.placements))
    for axis, placement in reversed(axes) if like.device_mesh.ndim == 2 else axes:
        if not isinstance(placement, Replicate):
            assert isinstance(placement, (Shard, _StridedShard))
            chunks = whole.chunk(like.device_mesh.size(axis), placement.dim)
            index = coordinate[axis]
            empty = whole.narrow(placement.dim, 0, 0)
            whole = chunks[index] if index < len(chunks) else empty
    return whole


def reshard(model: nn.Module) -> None:
    """Let every FSDP2 module give up its gathered parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Clones of the model's parameters as whole tensors, by canonical name. Collective."""
    with whole_parameters(model) as parameters:
        first: dict[int, str] = {}
        for name, parameter in parameters.items():
            first.setdefault(id(parameter), name)
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in parameters.items()
            if first[id(p)] == name
        }


def floating_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that may be averaged."""
    return (
        (name.replace("_fsdp_wrapped_module.", ""), buffer)
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point()
    )


def integer_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that are never averaged: counters and masks."""
    return ((name, b) for name, b in model.named_buffers() if not b.is_floating_point())
