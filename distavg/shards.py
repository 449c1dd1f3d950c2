"""A model on this rank -> its shards. The only module that knows how wrappers hold parameters.

Every wrapper ends here: a parameter becomes the box of the global tensor that this rank holds and
a plain local view of its storage, and where ranks hold replicas these divide them among
themselves, so that every element is owned by exactly one rank.

* plain, one process: the whole tensor.
* DTensor with one `Shard` placement on a one-dim mesh (FSDP2): the local tensor. Its box follows
  `torch.chunk`. FSDP2 keeps an unsharded copy of some modules' parameters after a forward (the
  root's, and wherever `reshard_after_forward=False`); `ModelShards.reshard` drops those, so that
  names lead to the sharded storage and no stale copy outlives a write to it.
* DDP, or plain with `replicas=`: equal on every rank of the group, divided by `layout.divide`.
* plain under a process group without `replicas=`: whole on every rank, rank 0's is saved.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from distavg.comm import Comm, ReplicaGroup
from distavg.errors import ConfigError, ModelMismatch, ReplicaMismatch, UnsupportedError
from distavg.foreach import checksum
from distavg.layout import Box, chunk_extent, divide
from distavg.names import NamedTensor, named_tensors

__all__ = ["LiveTensor", "ModelShards", "Shard"]

# What PyTorch computes with and safetensors files hold.
_AVERAGED_DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16} | {
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool
}  # fmt: skip

Model = nn.Module | Mapping[str, nn.Module]


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of one global tensor and where it lies.

    Attributes:
        fqn: Canonical name.
        box: The rectangle of the global tensor.
        global_shape: Shape of the whole tensor.
        tensor: The local view that holds the box, of shape `box.sizes`.
    """

    fqn: str
    box: Box
    global_shape: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A parameter or buffer of the model as this rank holds it.

    Attributes:
        named: Its registration in the model.
        local: Plain detached view of this rank's storage of it.
        box: What of the global tensor `local` is.
        global_shape: Shape of the whole tensor.
        is_held: Whether averages hold it; frozen, excluded and live-buffer tensors are not held.
        replicas: The ranks that hold the same `local`, where it is known that they do.
        is_copied: Whether every rank has a whole one of its own, of which rank 0's counts.
    """

    named: NamedTensor
    local: Tensor
    box: Box
    global_shape: tuple[int, ...]
    is_held: bool
    replicas: ReplicaGroup | None
    is_copied: bool

    @property
    def fqn(self) -> str:
        """Canonical name."""
        return self.named.fqn

    def part(self, box: Box) -> Shard:
        """The shard of this tensor at a box in global coordinates that `local` contains."""
        view = self.local[box.relative_to(self.box).slices()]
        return Shard(self.fqn, box, self.global_shape, view)

    @property
    def is_divided(self) -> bool:
        """Whether replicas divide it, so that no rank has all of its average."""
        return self.replicas is not None and not self.is_copied

    @property
    def layout(self) -> tuple[object, ...]:
        """How the global tensor is spread: equal on all ranks if it is equal on one."""
        tensor = self.named.tensor
        if isinstance(tensor, DTensor):
            return (self.global_shape, tensor.placements, tensor.device_mesh.size())
        return (self.global_shape, self.replicas is not None)


class ModelShards:
    """The tensors of a model on this rank, and which parts of them it owns.

    Attributes:
        tensors: Every parameter and persistent buffer, in the model's order.
        owned: What this rank averages: views of live tensors, in the model's order.
        pieces: For each group of replicas, every rank's pieces, by rank within the group.
        lost: Why the live weights are not what training left; None as long as they are.

    Args:
        model: A module, or a mapping of prefix to module.
        comm: The ranks that hold parts of the model.
        replicas: The ranks that hold the same plain parameters; None if not known.
        shard_replicas: Whether replicas divide the average; otherwise each keeps a whole one.
        include: Patterns of canonical names (`fnmatch`); None for all.
        exclude: Patterns of canonical names that are not averaged.
        hold_buffers: Whether averages hold the persistent buffers.
    """

    def __init__(
        self,
        model: Model,
        comm: Comm,
        *,
        replicas: dist.ProcessGroup | None = None,
        shard_replicas: bool = True,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        hold_buffers: bool = False,
    ) -> None:
        self.model = model
        self.rank = comm.rank
        self.lost: str | None = None
        self._comm = comm
        self._shard_replicas = shard_replicas
        roots = list(model.values()) if isinstance(model, Mapping) else [model]
        for root in roots:
            if not isinstance(root, nn.Module):
                raise ConfigError(f"Averager: a {type(root).__name__} is not a torch.nn.Module")
        self.modules = list(dict.fromkeys(m for root in roots for m in root.modules()))
        self._fsdp_modules = [m for m in self.modules if isinstance(m, FSDPModule)]
        if any(isinstance(m, FullyShardedDataParallel) for m in self.modules):
            raise UnsupportedError(
                "FullyShardedDataParallel (FSDP1) is not supported yet; "
                "torch.distributed.fsdp.fully_shard (FSDP2) is"
            )
        self.reshard()
        named = named_tensors(model)
        admitted = _admitted(named, include, exclude)
        self._frozen = {
            each.fqn
            for each in named
            if each.fqn in admitted and not (each.is_buffer or _is_trainable(each.tensor))
        }
        self._groups: dict[tuple[tuple[int, ...], str], ReplicaGroup] = {}
        self.tensors = [
            self._locate(
                each,
                is_held=each.fqn in admitted - self._frozen
                and (hold_buffers or not each.is_buffer),
                replicas=replicas,
            )
            for each in named
        ]
        self.by_name = {tensor.fqn: tensor for tensor in self.tensors}
        self._divide()

    def reshard(self) -> None:
        """Drop FSDP2's unsharded copies, so that parameters are their sharded storage again.

        `FSDPModule.reshard` is not recursive, and does nothing where `reshard_after_forward` is
        off and a forward was left by an exception: FSDP2 still takes itself to be inside it. No
        communication.
        """
        for module in self._fsdp_modules:
            module.reshard()
            for group in _fsdp_groups(module):
                group.wait_for_unshard()  # what was gathered ahead for a forward that never came
                group._to_sharded()

    def _locate(
        self, named: NamedTensor, *, is_held: bool, replicas: dist.ProcessGroup | None
    ) -> LiveTensor:
        tensor = named.tensor
        if tensor.is_meta:
            raise ConfigError(
                f"{named.fqn} is on the meta device: materialise the model (to_empty, then its "
                "weights) before building an Averager"
            )
        if is_held and (tensor.is_complex() or tensor.dtype not in _AVERAGED_DTYPES):
            raise UnsupportedError(
                f"{named.fqn} is {tensor.dtype}, which cannot be averaged or saved; "
                f"leave it out with exclude=[{named.fqn!r}]"
            )
        if isinstance(tensor, DTensor):
            mesh_ranks = tuple(tensor.device_mesh.mesh.flatten().tolist())
            if mesh_ranks != self._comm.ranks:
                raise UnsupportedError(
                    f"{named.fqn} is sharded over the ranks {mesh_ranks} of {self._comm.ranks}: "
                    "pass process_group= the group of its mesh. Replicas of sharded models (HSDP) "
                    "are not supported yet"
                )
            return LiveTensor(
                named, *_dtensor_part(named.fqn, tensor), is_held, None, is_copied=False
            )
        group = named.ddp.process_group if named.ddp is not None else replicas
        # Buffers may differ between replicas (BatchNorm statistics do): each rank keeps its own.
        group = None if named.is_buffer or not self._comm.is_parallel else group
        box = Box.whole(tensor.shape)
        return LiveTensor(
            named,
            tensor.detach(),
            box,
            box.sizes,
            is_held,
            self._replica_group(group, tensor.device) if group is not None else None,
            is_copied=group is None or not self._shard_replicas,
        )

    def _replica_group(self, group: dist.ProcessGroup, device: torch.device) -> ReplicaGroup:
        key = tuple(dist.get_process_group_ranks(group)), device.type
        if key not in self._groups:
            self._groups[key] = self._comm.replica_group(group, device)
        return self._groups[key]

    def _divide(self) -> None:
        self.pieces: list[tuple[ReplicaGroup, list[list[Shard]]]] = []
        owned: dict[str, list[Shard]] = {}
        for group in self._groups.values():
            members = [
                tensor
                for tensor in self.tensors
                if tensor.is_held and tensor.is_divided and tensor.replicas is group
            ]
            parts = [
                [
                    members[index].part(box.shifted(members[index].box.offsets))
                    for index, box in part
                ]
                for part in divide([tensor.local.shape for tensor in members], group.size)
            ]
            if members:
                self.pieces.append((group, parts))
                for shard in parts[group.rank]:
                    owned.setdefault(shard.fqn, []).append(shard)
        for tensor in self.tensors:
            if 0 in tensor.global_shape:  # a tensor without elements is rank 0's
                mine = self._comm.rank == 0
            else:
                mine = bool(tensor.box.numel) and not tensor.is_divided
            if tensor.is_held and mine:
                owned[tensor.fqn] = [tensor.part(tensor.box)]
        self.owned = [shard for tensor in self.tensors for shard in owned.get(tensor.fqn, ())]

    @property
    def has_unknown_replicas(self) -> bool:
        """Whether averages are held whole for want of knowing which ranks hold replicas."""
        return any(
            tensor.is_held and tensor.is_copied and tensor.replicas is None
            for tensor in self.tensors
            if not tensor.named.is_buffer
        )

    def is_counted(self, fqn: str) -> bool:
        """Whether this rank's shards of a tensor count: of whole copies, only rank 0's do."""
        return self._comm.rank == 0 or not self.by_name[fqn].is_copied

    def check_current(self) -> None:
        """Find tensors that were replaced since, whose old memory would be averaged.

        Tensors that are not held are followed: a forward may rebind a buffer.

        Raises:
            ModelMismatch: A tensor was added or removed, moved to other storage, or unfrozen.
        """
        self.reshard()
        now = {each.fqn: each for each in named_tensors(self.model)}
        for name in sorted(now.keys() ^ self.by_name.keys()):
            change = "added to" if name in now else "removed from"
            raise ModelMismatch(
                f"{name} was {change} the model after its Averager was built: build a new one"
            )
        for i, tensor in enumerate(self.tensors):
            current = now[tensor.fqn]
            if tensor.fqn in self._frozen and current.tensor.requires_grad:
                raise ModelMismatch(
                    f"{tensor.fqn} was frozen when the Averager was built, and is trainable now: "
                    "it is not averaged. Build a new Averager"
                )
            local = _local_storage(current.tensor)
            if not local.numel() or local.data_ptr() == tensor.local.data_ptr():
                continue
            if tensor.is_held or local.shape != tensor.local.shape:
                raise ModelMismatch(
                    f"{tensor.fqn} has other storage than when the Averager was built "
                    "(model.to(), or load_state_dict(assign=True)?): build a new Averager after "
                    "such a change"
                )
            self.tensors[i] = self.by_name[tensor.fqn] = replace(tensor, named=current, local=local)

    def check_replicas(self, doing: str) -> None:
        """Compare the live replicas over the ranks. Collective.

        One all-gather of a 64-bit checksum per replicated parameter.

        Raises:
            ReplicaMismatch: Names the first tensor that differs, and the ranks.
        """
        check_equal(
            self._comm,
            {
                tensor.fqn: (tensor.replicas.ranks, tensor.local)
                for tensor in self.tensors
                if tensor.replicas is not None and tensor.is_held
            },
            doing,
        )


def check_equal(
    comm: Comm, replicas: Mapping[str, tuple[tuple[int, ...], Tensor]], doing: str
) -> None:
    """Compare replicas, given as fqn -> (ranks that hold it, tensor). Collective.

    Raises:
        ReplicaMismatch: Names the first tensor that differs, and the ranks.
    """
    if comm.size == 1:
        return
    mine = [
        (fqn, ranks, (tuple(tensor.shape), str(tensor.dtype), checksum(tensor)))
        for fqn, (ranks, tensor) in replicas.items()
    ]
    seen: dict[tuple[str, tuple[int, ...]], dict[int, object]] = {}
    for rank, theirs in zip(comm.ranks, comm.gather(mine, doing), strict=True):
        for fqn, ranks, value in theirs:
            seen.setdefault((fqn, ranks), {})[rank] = value
    for (fqn, ranks), values in seen.items():
        first_rank, first = next(iter(values.items()))
        differing = [rank for rank, value in values.items() if value != first]
        if differing or len(values) < len(ranks):
            raise ReplicaMismatch(
                f"{doing}: {fqn} "
                + (
                    f"on ranks {differing} differs from rank {first_rank}'s"
                    if differing
                    else f"is on ranks {list(values)} only, of {list(ranks)}"
                )
                + ": these ranks should hold replicas. Broadcast the weights from one rank before "
                "they are averaged (DDP does so when it is built), and step them alike"
            )


def _admitted(
    named: Sequence[NamedTensor], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> set[str]:
    """The names that the patterns admit."""
    for option, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise ConfigError(f"{option}={patterns!r}: give a list of patterns, not a string")
        for pattern in patterns or ():
            if not any(_matches(each, [pattern]) for each in named):
                raise ConfigError(f"{option}: {pattern!r} matches no parameter or buffer")
    return {
        each.fqn
        for each in named
        if (include is None or _matches(each, include)) and not _matches(each, exclude or ())
    }


def _is_trainable(tensor: Tensor) -> bool:
    return tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex())


def _matches(named: NamedTensor, patterns: Sequence[str]) -> bool:
    names = (named.fqn, *named.aliases)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _fsdp_groups(module: FSDPModule) -> list[Any]:
    """The groups of parameters that FSDP2 gathers together for a module."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):  # several since torch 2.12 or so
        return list(state._fsdp_param_groups)
    return [group for group in [state._fsdp_param_group] if group is not None]


@torch.no_grad()
def _local_storage(tensor: Tensor) -> Tensor:
    """This rank's plain storage; under `no_grad`, `to_local` is no copy and no new view."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _dtensor_part(fqn: str, tensor: DTensor) -> tuple[Tensor, Box, tuple[int, ...]]:
    """The local view of a sharded DTensor, its box, and the global shape."""
    mesh, placements = tensor.device_mesh, tensor.placements
    if mesh.ndim != 1 or type(placements[0]) is not ShardPlacement:
        raise UnsupportedError(
            f"{fqn} has placements {placements} on a mesh of shape {tuple(mesh.shape)}: HSDP and "
            "tensor parallelism are not supported yet; one Shard placement on a one-dim mesh is"
        )
    local, shape, dim = _local_storage(tensor), tuple(tensor.shape), placements[0].dim
    offset, size = chunk_extent(shape[dim], mesh.size(), mesh.get_local_rank())
    box = Box(
        tuple(offset if d == dim else 0 for d in range(len(shape))),
        tuple(size if d == dim else length for d, length in enumerate(shape)),
    )
    if tuple(local.shape) != box.sizes:
        raise UnsupportedError(
            f"{fqn}: the local shard has shape {tuple(local.shape)}, but {placements} of shape "
            f"{shape} over {mesh.size()} ranks gives {box.sizes}"
        )
    return local, box, shape
