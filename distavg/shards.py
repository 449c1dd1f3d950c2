"""Who holds what of a model, and which rank averages it.

Each rank knows what it has itself (`distavg.wrappers`); one all-gather when an Averager is built
says which ranks have the same boxes of each tensor. Where those are known to be replicas (DDP,
the replicate axes of HSDP and of tensor parallelism, data-parallel replicas of a pipeline stage,
plain parameters with `replicas=`), they divide them evenly, so that every element is owned by one
rank. Otherwise every rank averages what it has, and the first one's counts: plain parameters of
which nothing is known, and buffers.
"""

import fnmatch
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from distavg.comm import Comm
from distavg.errors import ConfigError, ModelMismatch, ReplicaMismatch, UnsupportedError
from distavg.foreach import checksum
from distavg.layout import divide
from distavg.names import NamedTensor
from distavg.replicas import ReplicaGroup
from distavg.tensors import LiveTensor, Shard, Watch
from distavg.wrappers import Face, Model, Wrapped, ranks_of, stays

__all__ = ["GlobalTensor", "ModelShards", "check_equal"]

# What PyTorch computes with and safetensors files hold.
_AVERAGED_DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16} | {
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool
}  # fmt: skip


class GlobalTensor(NamedTuple):
    """A tensor of the whole model, whichever ranks have it; the same on every rank.

    Attributes:
        fqn: Canonical name.
        aliases: Its other names.
        shape: Of the whole tensor.
        dtype: Of the live tensor.
        is_buffer: Whether it is a buffer.
        is_held: Whether averages hold it.
    """

    fqn: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_buffer: bool
    is_held: bool


class ModelShards:
    """The tensors of a model on this rank, and which parts of them it owns. Collective to build.

    One all-gather of 64 bits for each tensor of this rank, and of the tensors' names where ranks
    have different ones (pipeline stages).

    Attributes:
        tensors: Every parameter and persistent buffer of this rank, in the model's order.
        by_name: The same, by canonical name.
        catalogue: Those of all ranks.
        owned: What this rank averages: views of live tensors, in the model's order.
        pieces: Of the tensors that a group of replicas divides from one moment on, every rank's
            pieces, by rank within the group.
        has_stages: Whether ranks have different tensors.
        is_divided: Whether any ranks divide replicas, be it others than this one.
        rank: This process's global rank.
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
        self.lost: str | None = None
        self._comm = comm
        self.rank = comm.ranks[comm.rank]
        self._replicas = replicas if comm.is_parallel else None
        with comm.together("building an Averager"):
            self._wrapped = Wrapped(model)
            self._wrapped.reshard()
            named = self._wrapped.named_tensors()
            admitted, unmatched = _admitted(named, include, exclude)
            parameters = [n for n in named if n.fqn in admitted and not n.is_buffer]
            self._frozen = {n.fqn for n in parameters if not _is_trainable(n.tensor)}
            held = {n.fqn for n in parameters} - self._frozen
            if hold_buffers:
                held |= {n.fqn for n in named if n.fqn in admitted and n.is_buffer}
            self.tensors = [self._wrapped.locate(n, comm.ranks, self._replicas) for n in named]
            for tensor in self.tensors:
                tensor.is_held = tensor.fqn in held
                tensor.is_copied = not (tensor.is_alike and shard_replicas)
                _check_held(tensor)
        self._find_holders(unmatched)
        with comm.together("building an Averager"):
            for tensor in self.tensors:
                _check_holders(tensor)
        self._wrapped.guard_graphs()
        self.catalogue: list[GlobalTensor] = []
        self.catalogue_everywhere(comm.gather(self.digest, "building an Averager"))
        # Tensors that are held from the same moment on are divided together.
        self._generations = [held]
        self._make_groups()
        self._own()

    @property
    def modules(self) -> list[nn.Module]:
        """All modules of the model on this rank, each once."""
        return self._wrapped.modules

    @property
    def face(self) -> Face | None:
        """What is in place of the live weights; see `Wrapped.face`."""
        return self._wrapped.face

    @face.setter
    def face(self, face: Face | None) -> None:
        self._wrapped.face = face

    def parameters(self) -> Iterator[Tensor]:
        """What an optimizer of this model has: the model's parameters, sharded or not just now."""
        for module in self.modules:
            yield from module.parameters(recurse=False)
        for tensor in self.tensors:
            yield tensor.named.tensor

    def reshard(self) -> None:
        """Drop the wrappers' unsharded copies; see `Wrapped.reshard`. No communication."""
        self._wrapped.reshard()

    def break_graphs(self) -> None:
        """Make autograd refuse graphs across a write; see `Wrapped.break_graphs`."""
        self._wrapped.break_graphs()

    def _find_holders(self, unmatched: set[str]) -> None:
        """Learn which ranks have the same boxes of each tensor. Collective.

        Raises:
            ConfigError: A pattern that no rank has a match for.
        """
        mine = {
            tensor.fqn: xxhash.xxh3_64_intdigest(
                repr((tensor.fqn, tensor.global_shape, tensor.boxes)).encode()
            )
            for tensor in self.tensors
            if tensor.parts
        }
        shared = [mine[t.fqn] for t in self.tensors if t.parts and not t.is_copied]
        content = (list(mine.values()), shared, unmatched)
        gathered = self._comm.gather(content, "building an Averager")
        if nowhere := set.intersection(*(theirs for _, _, theirs in gathered)):
            raise ConfigError(
                f"include or exclude: {min(nowhere)!r} matches no parameter or buffer"
            )
        ranks: dict[int, list[int]] = {}
        for rank, (theirs, _, _) in zip(self._comm.ranks, gathered, strict=True):
            for digest in theirs:
                ranks.setdefault(digest, []).append(rank)
        self.is_divided = any(len(ranks[each]) > 1 for _, some, _ in gathered for each in some)
        for tensor in self.tensors:
            tensor.holders = tuple(ranks[mine[tensor.fqn]]) if tensor.parts else (self.rank,)

    @property
    def digest(self) -> int:
        """64 bits that tell this rank's tensors from other names, shapes, dtypes and kinds."""
        return xxhash.xxh3_64_intdigest(repr(self._own_catalogue()).encode())

    def _own_catalogue(self) -> list[GlobalTensor]:
        return [
            GlobalTensor(
                t.fqn, t.named.aliases, t.global_shape, t.dtype, t.named.is_buffer, t.is_held
            )
            for t in self.tensors
        ]

    def catalogue_everywhere(self, digests: Sequence[int]) -> None:
        """Bring `catalogue` up to date. Collective.

        One all-gather of all names where ranks have different tensors.

        Args:
            digests: Every rank's `digest`.

        Raises:
            ConfigError: Ranks have a tensor of one name with different shapes or dtypes.
        """
        doing = "comparing the ranks' tensors"
        mine = self._own_catalogue()
        self.has_stages = len(set(digests)) > 1
        if not self.has_stages:
            self.catalogue = mine
            return
        merged: dict[str, tuple[int, GlobalTensor]] = {}
        for rank, theirs in zip(self._comm.ranks, self._comm.gather(mine, doing), strict=True):
            for tensor in theirs:
                first, known = merged.setdefault(tensor.fqn, (rank, tensor))
                if known._replace(aliases=()) != tensor._replace(aliases=()):
                    raise ConfigError(
                        f"{tensor.fqn} is not the same on all ranks: on rank {first} {known}, on "
                        f"rank {rank} {tensor}. Build the model, and freeze its parameters, alike"
                    )
        self.catalogue = [tensor for _, tensor in merged.values()]

    def _make_groups(self) -> None:
        """The groups of replicas. Not collective."""
        self._groups: dict[tuple[tuple[int, ...], str], ReplicaGroup] = {}
        known = {
            tuple(ranks_of(group)): group for tensor in self.tensors for group in tensor.groups
        }
        wanted = {
            (tensor.holders, part.tensor.device.type)
            for tensor in self.tensors
            for part in tensor.parts
            if tensor.is_divided
        }
        for ranks, device_type in sorted(wanted):
            group = ReplicaGroup(self._comm, ranks, device_type, known.get(ranks))
            self._groups[ranks, device_type] = group

    def _own(self) -> None:
        """Find out what this rank averages. Not collective."""
        self.by_name = {tensor.fqn: tensor for tensor in self.tensors}
        self.pieces: list[tuple[ReplicaGroup, list[list[Shard]]]] = []
        owned: dict[str, list[Shard]] = {}
        for tensor in self.tensors:
            if tensor.is_held and not tensor.is_divided:
                owned[tensor.fqn] = list(tensor.parts)
        for names in self._generations:
            for (ranks, device_type), group in self._groups.items():
                whole = [  # by name, since the ranks' models may have other orders
                    part
                    for tensor in sorted(self.tensors, key=operator.attrgetter("fqn"))
                    if tensor.fqn in names and tensor.is_divided and tensor.holders == ranks
                    for part in tensor.parts
                    if part.tensor.device.type == device_type
                ]
                pieces = [
                    [whole[i].part(box.shifted(whole[i].box.offsets)) for i, box in piece]
                    for piece in divide([part.box.sizes for part in whole], len(ranks))
                ]
                if whole:
                    self.pieces.append((group, pieces))
                for shard in pieces[group.rank]:
                    owned.setdefault(shard.fqn, []).append(shard)
        self.owned = [shard for tensor in self.tensors for shard in owned.get(tensor.fqn, ())]
        # Where a frozen one is registered; FSDP1 registers elsewhere, and keeps its own.
        frozen = [tensor for tensor in self.tensors if tensor.fqn in self._frozen]
        self._frozen_places = [
            ({"": t.named.tensor}, "") if t.named.flattened else (t.anchor.table, t.anchor.key)
            for t in frozen
        ]
        held = [tensor.anchor for tensor in self.tensors if tensor.is_held]
        self._watch = Watch(held, self.modules)
        self._watch_storage = Watch(held)
        self._watch_all = Watch(tensor.anchor for tensor in self.tensors)

    @property
    def has_batchnorm(self) -> bool:
        """Whether this rank's part of the model keeps BatchNorm statistics."""
        return any(
            isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.track_running_stats
            for module in self.modules
        )

    @property
    def has_unknown_replicas(self) -> bool:
        """Whether averages are held whole for want of knowing which ranks hold replicas."""
        return any(
            t.is_held and not t.is_alike and len(t.holders) > 1
            for t in self.tensors
            if not t.named.is_buffer
        )

    def is_counted(self, fqn: str) -> bool:
        """Whether what this rank has of a tensor, or its average, counts: of copies one does."""
        tensor = self.by_name[fqn]
        return self.rank == tensor.holders[0] or (tensor.is_held and not tensor.is_copied)

    @property
    def is_current(self) -> bool:
        """Whether what is averaged has its storage and the modules are those there were.

        And whether what was frozen still is. Little enough work to be done at every update.
        """
        return self._watch.is_current() and not (
            self._frozen_places
            and any(getattr(t.get(k), "requires_grad", False) for t, k in self._frozen_places)
        )

    @property
    def has_same_storage(self) -> bool:
        """Whether what is averaged still has its storage."""
        return self._watch_storage.is_current()

    @property
    def is_unchanged(self) -> bool:
        """The same of all tensors, buffers and frozen ones included."""
        return self.is_current and self._watch_all.is_current()

    def follow(self, *, thaw: bool = True) -> bool:
        """Take up what has changed since: storage, dtypes, devices, unfrozen parameters.

        Not collective. A tensor that was frozen and is trainable now is held from now on.

        Args:
            thaw: Whether unfrozen parameters are taken up.

        Returns:
            Whether anything that is averaged has changed.

        Raises:
            ModelMismatch: A tensor was added or removed, or has another shape or other boxes.
        """
        wrapped = Wrapped(self.model)
        wrapped.reshard()
        now = {each.fqn: each for each in wrapped.named_tensors()}
        for name in sorted(now.keys() ^ self.by_name.keys()):
            change = "added to" if name in now else "removed from"
            for tensor in self.tensors:
                if name in tensor.named.aliases:  # load_state_dict(assign=True) unties
                    change = f"untied from {tensor.fqn} in"
            raise ModelMismatch(
                f"{name} was {change} the model after its Averager was built: build a new one"
            )
        wrapped.guard_graphs()
        self._wrapped = wrapped
        thawed = {name for name in self._frozen if thaw and now[name].tensor.requires_grad}
        # Nothing is thawed then either: `is_current` looks at what was frozen.
        if self.is_unchanged and all(stays(old, now[old.fqn]) for old in self.tensors):
            return False
        tensors = []
        has_changed = bool(thawed)
        for old in self.tensors:
            new = wrapped.locate(now[old.fqn], self._comm.ranks, self._replicas)
            is_held = old.is_held or old.fqn in thawed
            if is_held and (new.global_shape, new.boxes) != (old.global_shape, old.boxes):
                raise ModelMismatch(
                    f"{old.fqn} has shape {new.global_shape} and lies here in the boxes "
                    f"{new.boxes}; when its Averager was built it had shape {old.global_shape} and "
                    f"lay in {old.boxes}: build a new one"
                )
            new.is_held, new.holders, new.is_copied = is_held, old.holders, old.is_copied
            _check_held(new)
            has_changed |= new.is_held and _storage(new) != _storage(old)
            tensors.append(new)
        self.tensors = tensors
        self._frozen -= thawed
        if thawed:
            self._generations.append(thawed)
        self._make_groups()  # tensors may be on another kind of device
        self._own()
        return has_changed

    def check_replicas(self, doing: str) -> None:
        """Compare the live replicas over the ranks. Collective.

        One all-gather of a 64-bit checksum per replicated parameter.

        Raises:
            ReplicaMismatch: Names the first tensor that differs, and the ranks.
        """
        check_equal(
            self._comm,
            {
                tensor.fqn: (tensor.holders, [part.tensor for part in tensor.parts])
                for tensor in self.tensors
                if tensor.is_alike and len(tensor.holders) > 1 and tensor.is_held
            },
            doing,
        )


def check_equal(
    comm: Comm, replicas: Mapping[str, tuple[tuple[int, ...], Iterable[Tensor]]], doing: str
) -> None:
    """Compare replicas, given as fqn -> (global ranks that hold it, tensors). Collective.

    Raises:
        ReplicaMismatch: Names the first tensor that differs, and the ranks.
    """
    if comm.size == 1:
        return
    mine = [
        (fqn, ranks, [(tuple(t.shape), str(t.dtype), checksum(t)) for t in tensors])
        for fqn, (ranks, tensors) in replicas.items()
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
) -> tuple[set[str], set[str]]:
    """The names that `include` and `exclude` let through, and the patterns that match nothing."""
    for option, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise ConfigError(f"{option}={patterns!r}: give a list of patterns, not a string")
    wanted = include if include is not None else ["*"]
    unwanted = exclude or []
    admitted = {n.fqn for n in named if _matches(n, wanted) and not _matches(n, unwanted)}
    given = {*(include or []), *unwanted}
    return admitted, {p for p in given if not any(_matches(each, [p]) for each in named)}


def _is_trainable(tensor: Tensor) -> bool:
    return tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex())


def _matches(named: NamedTensor, patterns: Sequence[str]) -> bool:
    names = (named.fqn, *named.aliases)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check_held(tensor: LiveTensor) -> None:
    """Whether a tensor that is held can be averaged and saved."""
    if not tensor.is_held:
        return
    leave_out = f"leave it out with exclude=[{tensor.fqn!r}]"
    if tensor.dtype not in _AVERAGED_DTYPES:
        raise UnsupportedError(
            f"{tensor.fqn} is {tensor.dtype}, which cannot be averaged or saved; {leave_out}"
        )
    for part in tensor.parts:
        if any(
            n > 1 and step == 0
            for n, step in zip(part.box.sizes, part.tensor.stride(), strict=True)
        ):
            raise UnsupportedError(
                f"{tensor.fqn} is an expanded tensor: several of its elements are one in memory, "
                f"so that none can be written alone; clone() it, or {leave_out}"
            )


def _check_holders(tensor: LiveTensor) -> None:
    """Whether all ranks that must have the same boxes of a tensor have them."""
    if tensor.parts and not tensor.alike_on <= set(tensor.holders):
        raise ReplicaMismatch(
            f"{tensor.fqn} of shape {tensor.global_shape} is on ranks {list(tensor.holders)} "
            f"only, of {sorted(tensor.alike_on)}: these ranks should hold replicas. Build the "
            "model alike on them"
        )


def _storage(tensor: LiveTensor) -> object:
    views = [part.tensor for part in tensor.parts]
    return tensor.dtype, [(view.device, view.data_ptr(), view.stride()) for view in views]
