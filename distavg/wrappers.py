"""How each kind of wrapper holds a model's tensors: each tensor -> the boxes that this rank has.

The only module that knows wrappers' private ways. Every wrapper ends here, as boxes of global
tensors and plain local views of the storage that lasts:

* plain and DDP: the whole tensor.
* DTensor (FSDP2, HSDP, tensor parallelism, and any two of them): the box that its placements cut,
  `_StridedShard` included. FSDP2 keeps unsharded copies of some modules' parameters after a forward
  (the root's, and wherever `reshard_after_forward=False`).
* FSDP1: a flat range of each parameter, as boxes. It, too, keeps unsharded copies, and then
  ignores a write to its shards.

`Wrapped.reshard` drops the unsharded copies, so that names lead to the sharded storage and no stale
copy outlives a write to it.

Private attributes used here, seen in torch 2.10 and 2.13 (tests/test_wrappers.py says if a release
moves them):

* FSDP2: `FSDPModule._get_fsdp_state()`, its `_fsdp_param_groups` (2.10: `_fsdp_param_group`), a
  group's `fsdp_params` and `_to_sharded()`, a parameter's `sharded_param`, `_module_info` and
  `_unsharded_param`.
* FSDP1: `_handle` with its `flat_param`, `uses_sharded_strategy`, `reshard()`, `_prefetched`,
  `_training_state`; of the flat parameter `_local_shard`, `_full_param_padded`,
  `_full_prec_full_param_padded`, `_param_infos`, `_shared_param_infos`, `_shard_param_infos`,
  `_params`, `_tensors`, `_shapes`, `_strides`, `_contiguities`, `_numels_with_padding`,
  `_sharded_size`, `_param_extensions`.
* FSDP1's mark on parameters, `_fsdp_flattened`.
* `torch.nn.utils.parametrize._cache`.
* DTensor: `_local_tensor`, which `to_local()` returns after 1 µs of checks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from distavg.errors import ConfigError, StateError, UnsupportedError
from distavg.layout import Box, range_boxes
from distavg.names import Flattened, NamedTensor, named_tensors
from distavg.placements import MeshPlace, placed_box
from distavg.tensors import Anchor, LiveTensor, Shard

__all__ = ["Face", "Model", "Wrapped", "class_name", "is_sharded", "ranks_of", "stays"]

Model = nn.Module | Mapping[str, nn.Module]


class Wrapped:
    """A model and its wrappers as they are now.

    Attributes:
        modules: All modules, each once.

    Args:
        model: A module, or a mapping of prefix to module (pipeline stages).
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        roots = list(model.values()) if isinstance(model, Mapping) else [model]
        for root in roots:
            if not isinstance(root, nn.Module):
                raise ConfigError(f"Averager: a {type(root).__name__} is not a torch.nn.Module")
        self._roots = roots
        self.modules = list(dict.fromkeys(m for root in roots for m in root.modules()))
        self._groups = [
            group for m in self.modules if isinstance(m, FSDPModule) for group in _groups_of(m)
        ]
        self._meshes: dict[DeviceMesh, MeshPlace] = {}
        self._handles = [
            m._handle
            for m in self.modules
            if isinstance(m, FullyShardedDataParallel) and m._handle is not None
        ]
        self._gathered = {
            (info.module, info.param_name): param
            for group in self._groups
            for param in group.fsdp_params
            for info in [param._module_info]
        }

    @torch.no_grad()
    def reshard(self) -> None:
        """Drop unsharded copies, so that parameters are their sharded storage again.

        Raises StateError inside FSDP1's `summon_full_params`, which would then write what is freed.
        No communication. `FSDPModule.reshard` would not do: it is not recursive, and does nothing
        where `reshard_after_forward` is off and a forward was left by an exception, since FSDP2
        still takes itself to be inside it.
        """
        for group in self._groups:
            try:  # what was gathered ahead for a forward that never came
                group.wait_for_unshard()
            except RuntimeError as error:
                # With one shard only, FSDP2 fails in inference mode: there was no forward.
                if "Inference tensors" not in str(error):
                    raise
            group._to_sharded()
        for handle in self._handles:
            flat = handle.flat_param
            if handle._training_state.name == "SUMMON_FULL_PARAMS":
                raise StateError(
                    "inside FullyShardedDataParallel.summon_full_params the shards cannot be read "
                    "or replaced: leave it first"
                )
            if not hasattr(flat, "_local_shard"):
                continue  # before its first forward it has only the shard
            handle.reshard(free_unsharded_flat_param=handle.uses_sharded_strategy)
            handle._prefetched = False
            for name in ("_full_param_padded", "_full_prec_full_param_padded"):
                if hasattr(flat, name):  # of the two, reshard frees the one that is in use
                    padded = getattr(flat, name)
                    if padded.device.type == "cuda":
                        padded.record_stream(torch.cuda.current_stream(padded.device))
                    padded.untyped_storage().resize_(0)

    def break_graphs(self) -> None:
        """Make autograd refuse graphs that hold unsharded copies, which follow the shards' values.

        A backward gathers the shards' new values into the copies that the forward saved, behind
        their version counters.
        """
        for group in self._groups:
            for param in group.fsdp_params:
                if getattr(param, "_unsharded_param", None) is not None:
                    torch.autograd.graph.increment_version(param._unsharded_param)
        for handle in self._handles:
            flat = handle.flat_param
            torch.autograd.graph.increment_version(flat)
            for tensor in getattr(flat, "_tensors", None) or ():
                if tensor is not None:
                    torch.autograd.graph.increment_version(tensor)

    def guard_graphs(self) -> None:
        """From now on, make a backward raise if its forward saw other weights.

        Autograd compares the versions of what a forward saved. Activation checkpoints save no
        weights, and would silently compute with those of another side of a swap.
        """
        for module in [
            *self._roots,
            *(m for m in self.modules if isinstance(m, CheckpointWrapper)),
        ]:
            if _remember_face not in module._forward_hooks.values():
                # Before FSDP2's own hook, whose hook on the output would gather parameters first.
                module.register_forward_hook(_remember_face, prepend=True)

    @property
    def communicates(self) -> bool:
        """Whether a forward of the model communicates, so that all ranks must run it together."""
        parameters = (p for module in self.modules for p in module._parameters.values())
        return bool(self._groups or self._handles) or any(
            isinstance(p, DTensor) for p in parameters
        )

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Within it no DDP wrapper gives its buffers to other ranks in a forward."""
        wrappers = [m for m in self.modules if isinstance(m, DistributedDataParallel)]
        before = [wrapper.require_forward_param_sync for wrapper in wrappers]
        for wrapper in wrappers:
            wrapper.require_forward_param_sync = False
        try:
            yield
        finally:
            for wrapper, value in zip(wrappers, before, strict=True):
                wrapper.require_forward_param_sync = value

    @property
    def face(self) -> "Face | None":
        """What stands in place of the model's weights at present; None: what training left."""
        if not _FACES:  # looked at in each step
            return None
        return next(filter(None, map(_FACES.get, self.modules)), None)

    @face.setter
    def face(self, face: "Face | None") -> None:
        for module in self.modules:
            if face is None:
                _FACES.pop(module, None)
            else:
                _FACES[module] = face
        # What PyTorch has derived from the weights that were there before.
        torch.clear_autocast_cache()
        parametrize._cache.clear()

    def named_tensors(self) -> list[NamedTensor]:
        """Every parameter and persistent buffer, after `reshard`."""
        elsewhere: dict[nn.Module, dict[str, Flattened]] = {}
        for handle in self._handles:
            flat = handle.flat_param
            kept = flat._params or [flat] * len(flat._param_infos)
            first: dict[tuple[nn.Module, str], Flattened] = {}
            for index, (name, module, _) in enumerate(flat._param_infos):
                first[module, name] = Flattened(flat, index, kept[index])
            for name, module, _, prim_name, prim_module, _ in flat._shared_param_infos:
                first[module, name] = first[prim_module, prim_name]
            for (module, name), place in first.items():
                elsewhere.setdefault(module, {})[name] = place
        return named_tensors(self._model, elsewhere)

    def locate(
        self,
        named: NamedTensor,
        ranks: Sequence[int] = (0,),
        replicas: dist.ProcessGroup | None = None,
    ) -> LiveTensor:
        """What this rank has of a tensor.

        Args:
            named: One of `named_tensors`.
            ranks: The global ranks that may hold parts of the model.
            replicas: The ranks that hold the same plain parameters; None if not known.

        Raises:
            ConfigError: It is on the meta device or lazy, or on ranks that are not among `ranks`.
            UnsupportedError: Placements, meshes or tensors that are not understood.
        """
        if is_lazy(named.tensor):
            raise ConfigError(
                f"{named.fqn} of a lazy module has no shape yet: run a forward before building an "
                "Averager"
            )
        if named.tensor.layout != torch.strided or named.tensor.is_quantized:
            raise UnsupportedError(
                f"{named.fqn} is a sparse or quantized tensor, which distavg does not understand: "
                "register it with persistent=False, if it is a buffer"
            )
        if named.tensor.is_meta:
            raise ConfigError(
                f"{named.fqn} is on the meta device: materialise the model (to_empty, then its "
                "weights) before building an Averager"
            )
        if named.flattened is not None:
            groups = {id(each.flat_param): each.process_group for each in self._handles}
            return _flattened(named, named.flattened, groups[id(named.flattened.flat)])
        if isinstance(named.tensor, DTensor):
            return self._sharded(named, named.tensor, ranks)
        tensor = named.tensor.detach()
        ddp = named.ddp
        group = replicas if ddp is None else ddp.process_group
        # Buffers may differ between replicas (BatchNorm statistics do): each rank keeps its own.
        is_alike = group is not None and not named.is_buffer and not _is_ignored(named)
        shape = tuple(tensor.shape)
        table = named.owner._buffers if named.is_buffer else named.owner._parameters
        return LiveTensor(
            named,
            (Shard(named.fqn, Box.whole(shape), shape, tensor),),
            shape,
            tensor.dtype,
            (shape,),
            is_alike,
            frozenset(ranks_of(group)) if group is not None and is_alike else frozenset(),
            (group,) if group is not None else (),
            Anchor(table, named.key, tensor.data_ptr()),
        )

    def _sharded(self, named: NamedTensor, tensor: DTensor, ranks: Sequence[int]) -> LiveTensor:
        mesh = self._meshes.get(tensor.device_mesh)
        if mesh is None:  # looked at once: it costs more than all that follows
            mesh = self._meshes[tensor.device_mesh] = MeshPlace.of(tensor.device_mesh)
        placements, shape = tensor.placements, tuple(tensor.shape)
        if not mesh.members <= set(ranks):
            raise ConfigError(
                f"{named.fqn} is sharded over the ranks {list(mesh.ranks)}, of which the Averager "
                f"has only {list(ranks)}: pass process_group= a group of all ranks of the model"
            )
        if not mesh.is_ascending:
            raise UnsupportedError(
                f"{named.fqn} is on a mesh of the ranks {list(mesh.ranks)}, which are not in "
                "ascending order: fully_shard and full_tensor() would order its shards "
                "differently. Build the mesh in ascending order"
            )
        local = local_tensor(tensor)
        box = placed_box(placements, mesh, shape, tuple(local.shape))
        if box is None:
            raise UnsupportedError(
                f"{named.fqn} of shape {shape} has placements {placements} on a mesh of shape "
                f"{mesh.shape} and a local shard of shape {tuple(local.shape)}: these are not the "
                "contiguous pieces that Shard, _StridedShard (FSDP2 over tensor parallelism) and "
                "Replicate give"
            )
        gathered = self._gathered.get((named.owner, named.key))
        if gathered is None:
            table = named.owner._buffers if named.is_buffer else named.owner._parameters
            anchor = Anchor(table, named.key, local.data_ptr(), within="_local_tensor")
        else:
            anchor = Anchor(
                vars(gathered), "sharded_param", local.data_ptr(), within="_local_tensor"
            )
        return LiveTensor(
            named,
            (Shard(named.fqn, box, shape, local),) if box.numel or 0 in shape else (),
            shape,
            tensor.dtype,
            (shape, placements, mesh.shape, mesh.ranks),
            not named.is_buffer,
            frozenset().union(
                *(
                    ranks_of(group)
                    for group, placement in zip(mesh.groups, placements, strict=True)
                    if type(placement) is Replicate and not named.is_buffer
                )
            ),
            mesh.groups,
            anchor,
        )


@dataclass(frozen=True, eq=False)
class Face:
    """What stands in place of the weights that training left: equal only to itself.

    Attributes:
        average: The name of the average of any Averager that stands there for a while; None: an
            average has become the live weights.
    """

    average: str | None


_FACES: WeakKeyDictionary[nn.Module, Face] = WeakKeyDictionary()


def _remember_face(module: nn.Module, args: object, output: object) -> None:
    """A forward hook: the backward of this output needs the weights that are there now."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    face = _FACES.get(module)

    def check(gradient: object) -> None:
        if _is_another(_FACES.get(module), face):
            raise StateError(
                "backward() on the other side of an applied() or copy_to() than its forward, so "
                "that the weights are others: run both before it, inside, or after it"
            )

    for tensor in tree_leaves(output):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(check)  # type: ignore[no-untyped-call]


def _is_another(face: Face | None, other: Face | None) -> bool:
    return face is not other


def _is_ignored(named: NamedTensor) -> bool:
    """Whether DDP was told to leave a parameter alone, so that the ranks' may differ."""
    if named.ddp is None or not named.ddp.parameters_to_ignore:
        return False
    inner = named.ddp.module.named_parameters()
    return any(p is named.tensor and n in named.ddp.parameters_to_ignore for n, p in inner)


def class_name(module: nn.Module) -> str:
    """The name of a module's class; `fully_shard` puts one of its own before it."""
    return type(module).__name__.removeprefix("FSDP" if isinstance(module, FSDPModule) else "")


def is_sharded(parameter: Tensor) -> bool:
    """Whether a wrapper holds this parameter in parts."""
    return isinstance(parameter, DTensor) or getattr(parameter, "_fsdp_flattened", False)


def ranks_of(group: dist.ProcessGroup) -> list[int]:
    """The global ranks of a group."""
    return dist.get_process_group_ranks(group)


def stays(old: LiveTensor, named: NamedTensor) -> bool:
    """Whether a tensor lies where and as it did, so that `Wrapped.locate` would find the same.

    It costs a tenth of that. FSDP1's tensors are always looked up anew.
    """
    before, tensor = old.named, named.tensor
    if before.flattened is not None or tensor is not before.tensor:
        return False
    found = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if not old.parts:  # a rank that has nothing of it
        return not found.numel() and tensor.shape == old.global_shape
    kept = old.parts[0].tensor
    return (
        found.data_ptr() == kept.data_ptr()
        and found.shape == kept.shape
        and found.stride() == kept.stride()
        and found.dtype == kept.dtype
        and (named.owner, named.key, named.aliases) == (before.owner, before.key, before.aliases)
    )


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's storage of a tensor, plain and detached."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).detach()


def _flattened(named: NamedTensor, place: Flattened, group: dist.ProcessGroup) -> LiveTensor:
    """What this rank's shard of FSDP1's flat parameter has of one of its parameters."""
    flat: Any = place.flat
    index = place.index
    if flat._param_extensions[index] is not None:
        raise UnsupportedError(
            f"{named.fqn} is a DTensor inside FullyShardedDataParallel: shard it with fully_shard "
            "(FSDP2), which understands tensor parallelism"
        )
    base = getattr(flat, "_local_shard", flat).detach()
    shape = tuple(flat._shapes[index])
    # In storage the dims may be in another order: parameters that are not contiguous keep theirs.
    order = list(range(len(shape)))
    if not flat._contiguities[index]:
        order.sort(key=lambda dim: -flat._strides[index][dim])
    info = flat._shard_param_infos[index]
    parts: list[Shard] = []
    if info.in_shard:
        start, stop = info.intra_param_start_idx, info.intra_param_end_idx + 1
        begin = info.offset_in_shard
        for stored in range_boxes([shape[dim] for dim in order], start, stop):
            view = base[begin : begin + stored.numel].view(stored.sizes)
            begin += stored.numel
            back = [order.index(dim) for dim in range(len(shape))]
            box = Box(tuple(stored.offsets[i] for i in back), tuple(stored.sizes[i] for i in back))
            parts.append(Shard(named.fqn, box, shape, view.permute(back)))
    return LiveTensor(
        named,
        tuple(parts),
        shape,
        base.dtype,
        (shape, index, flat._numels_with_padding, flat._sharded_size, tuple(ranks_of(group))),
        True,
        frozenset(),
        (),
        # Before its first forward FSDP1 has the shard in the flat parameter itself.
        Anchor(vars(flat), "_local_shard", base.data_ptr(), before=flat),
    )


def _groups_of(module: FSDPModule) -> Iterator[Any]:
    """The groups of parameters that FSDP2 gathers together for a module."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):  # several since torch 2.12 or so
        yield from state._fsdp_param_groups
    elif state._fsdp_param_group is not None:
        yield state._fsdp_param_group
