"""An averager's state for `torch.distributed.checkpoint`: live references, as DTensors.

DCP writes and reads the tensors in place. Pieces of replicas are boxes that no DTensor placement
describes; DCP understands them as a DTensor over a `LocalShardsWrapper`, a private class (seen in
torch 2.6 to 2.13) that is used here only. Counters are 1-D float64 tensors: DCP's safetensors
storage corrupts files that hold Python ints, and its consolidation turns zero-dim tensors to 0.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from distavg.average import Average
from distavg.batchnorm import batchnorm_buffers
from distavg.comm import Comm
from distavg.errors import CheckpointMismatch
from distavg.schedule import Position
from distavg.shards import ModelShards
from distavg.tensors import LiveTensor, Shard

__all__ = ["load_state", "state"]


class _Pieces(LocalShardsWrapper):
    """Pieces of any number of dims, which `dcp.async_save` can copy.

    DTensor views them in their own shape, which the base class refuses for several pieces of three
    dims or more. Staging makes zeros like what has no memory of its own, and copies into them; of
    other tensors it would make a plain one.
    """

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.zeros_like.default:
            return args[0]._mapped(lambda piece: torch.zeros_like(piece, device="cpu"))
        if func is torch.ops.aten.copy_.default:
            for target, source in zip(args[0]._local_shards, args[1]._local_shards, strict=True):
                target.copy_(source)
            return args[0]
        return super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]

    @staticmethod
    def handle_view(args: Any, kwargs: Any) -> "_Pieces":
        """Themselves."""
        pieces: _Pieces = args[0]
        return pieces._mapped(lambda piece: piece)

    def data_ptr(self) -> int:
        """None of its own."""
        return 0

    def __deepcopy__(self, memo: Any) -> "_Pieces":
        return self._mapped(torch.clone)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "_Pieces":
        offsets = [tuple(each) for each in self.local_offsets()]
        return _Pieces(list(map(function, self._local_shards)), offsets)


def state(
    averages: Sequence[Average], model_shards: ModelShards, comm: Comm, position: Position
) -> "OrderedDict[str, Any]":
    """The averages' tensors and counters, by reference."""
    clock = [position.steps, position.epochs.numerator, position.epochs.denominator]
    content: OrderedDict[str, Any] = OrderedDict(
        clock=torch.tensor(clock, dtype=torch.float64, device="cpu"), averages={}
    )
    mesh = DeviceMesh.from_group(comm.group, "cpu") if comm.group is not None else None
    for average in averages:
        by_name: dict[str, list[Shard]] = {}
        for shard in average.shards():
            by_name.setdefault(shard.fqn, []).append(shard)
        content["averages"][average.name] = {
            "num_updates": torch.tensor([average.num_updates], dtype=torch.float64, device="cpu"),
            "tensors": {
                fqn: _global_tensor(tensor, by_name.get(fqn, []), average.dtypes[fqn], mesh)
                for fqn, tensor in model_shards.by_name.items()
                if tensor.is_held and (fqn in by_name or not _is_piece(tensor))
            },
            **_statistics_state(average, model_shards),
        }
    # Like a module's, so that it survives torch.save; DCP does not see it.
    content._metadata = _layout(model_shards)  # type: ignore[attr-defined]
    return content


def load_state(
    content: Mapping[str, Any], averages: Sequence[Average], model_shards: ModelShards
) -> Position:
    """Take the state back, after DCP filled it in place or from a copy of this rank's own.

    Returns:
        The position of the clock.

    Raises:
        CheckpointMismatch: It lacks an average or a tensor, or a copy was made of another rank's
            state or under another layout.
    """
    if lacking := [key for key in ("clock", "averages") if key not in content]:
        raise CheckpointMismatch(f"this is not the state of an Averager: it has no {lacking}")
    saved = content["averages"]
    copies: list[tuple[Tensor, Tensor]] = []
    for average in averages:
        if average.name not in saved:
            raise CheckpointMismatch(
                f"the state has no average {average.name!r}, only {sorted(saved)}"
            )
        given = _given_shards(saved[average.name]["tensors"], model_shards)
        for shard in average.own_shards():
            value = given.get((shard.fqn, shard.box))
            if value is None:
                raise CheckpointMismatch(
                    f"{shard.fqn}: the state of average {average.name!r} has no box at "
                    f"{shard.box.offsets} of sizes {shard.box.sizes}, which this rank holds. State "
                    "is loaded by the rank that saved it; to reshard, use Averager.save and load, "
                    "or torch.distributed.checkpoint"
                )
            if value.dtype != shard.tensor.dtype:
                raise CheckpointMismatch(
                    f"{shard.fqn}: the state of average {average.name!r} holds {value.dtype}, the "
                    f"average is {shard.tensor.dtype}: build the Averager with dtype={value.dtype}"
                )
            if value.data_ptr() != shard.tensor.data_ptr():
                copies.append((shard.tensor, value))
    if copies:
        _check_own(content, model_shards)
    with torch.no_grad():
        for tensor, value in copies:
            tensor.copy_(value)
    for average in averages:
        average.num_updates = int(saved[average.name]["num_updates"][0])
        _load_statistics(average, saved[average.name], model_shards)
    steps, numerator, denominator = (int(value) for value in content["clock"])
    return Position(steps, Fraction(numerator, denominator))


def _statistics_state(average: Average, model_shards: ModelShards) -> dict[str, Any]:
    """BatchNorm statistics: the average's own, and memory for others that a checkpoint may have.

    Nothing for a model without BatchNorm, or whose averages hold its buffers themselves. They are
    copies, of one dim, since DCP's safetensors files lose zero-dim ones.
    """
    live = {t.fqn: t for t in batchnorm_buffers(model_shards) if not t.is_held}
    if not live:
        return {}
    at = -1 if average.statistics_at is None else average.statistics_at
    own = [float(fqn in average.statistics) for fqn in live]
    return {
        "statistics_at": torch.tensor([at], dtype=torch.float64, device="cpu"),
        "statistics_own": torch.tensor(own, dtype=torch.float64, device="cpu"),
        "statistics": {
            fqn: average.statistics.get(fqn, tensor.parts[0].tensor)
            .detach()
            .to(tensor.dtype, copy=True)
            .reshape(-1)
            for fqn, tensor in live.items()
        },
    }


def _load_statistics(average: Average, saved: Mapping[str, Any], model_shards: ModelShards) -> None:
    average.is_warned_of = False
    average.statistics, average.statistics_at = {}, None
    if "statistics_at" in saved and (at := int(saved["statistics_at"][0])) >= 0:
        average.statistics_at = at
        for (fqn, value), is_own in zip(
            saved["statistics"].items(), saved["statistics_own"].tolist(), strict=True
        ):
            if is_own:
                shape = model_shards.by_name[fqn].global_shape
                average.statistics[fqn] = value.clone().view(shape)


def _check_own(content: Mapping[str, Any], model_shards: ModelShards) -> None:
    found = getattr(content, "_metadata", None)
    if found != _layout(model_shards):
        raise CheckpointMismatch(
            "this state is a copy of another rank's, or was made under another layout; a copy "
            "can only be loaded by the rank that made it. To reshard, use Averager.save and "
            "load, or torch.distributed.checkpoint"
        )


def _layout(model_shards: ModelShards) -> dict[str, Any]:
    """Which part of which tensor this rank holds, as plain data."""
    return {
        "rank": model_shards.rank,
        "boxes": [(shard.fqn, shard.box.offsets, shard.box.sizes) for shard in model_shards.owned],
    }


def _is_piece(tensor: LiveTensor) -> bool:
    """Whether only the owner of a divided tensor has it in its state: no DTensor has zero dims."""
    return tensor.is_divided and not tensor.global_shape


def _global_tensor(
    tensor: LiveTensor, shards: Sequence[Shard], dtype: torch.dtype, mesh: DeviceMesh | None
) -> Tensor:
    """This rank's part of one tensor of an average in the form that DCP understands."""
    live, shape = tensor.named.tensor, tensor.global_shape
    if isinstance(live, DTensor) and not tensor.is_divided:
        local = shards[0].tensor if shards else torch.empty_like(live.to_local(), dtype=dtype)
        return DTensor.from_local(
            local,
            live.device_mesh,
            live.placements,
            run_check=False,
            shape=live.shape,
            stride=live.stride(),
        )
    if mesh is None or _is_piece(tensor) or not (tensor.is_divided or tensor.named.flattened):
        return shards[0].tensor
    pieces, offsets = [s.tensor for s in shards], [s.box.offsets for s in shards]
    if not pieces:  # DCP wants one box from every rank: an empty one past the last row
        pieces = [torch.empty((0, *shape[1:]), dtype=dtype, device=live.device)]
        offsets = [(shape[0], *(0,) * (len(shape) - 1))]
    return DTensor.from_local(
        _Pieces(pieces, offsets),
        mesh,
        [ShardPlacement(0)],
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )


def _given_shards(
    tensors: Mapping[str, Tensor], model_shards: ModelShards
) -> dict[tuple[str, Any], Tensor]:
    """The boxes in a state: the inverse of `_global_tensor`."""
    given: dict[tuple[str, Any], Tensor] = {}
    owned: dict[str, list[Shard]] = {}
    for shard in model_shards.owned:
        owned.setdefault(shard.fqn, []).append(shard)
    with torch.no_grad():
        for fqn, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            pieces = local.local_shards() if hasattr(local, "local_shards") else [local]
            expected = owned.get(fqn, [])
            if [tuple(p.shape) for p in pieces] == [shard.box.sizes for shard in expected]:
                given.update(
                    ((fqn, shard.box), piece) for shard, piece in zip(expected, pieces, strict=True)
                )
    return given
