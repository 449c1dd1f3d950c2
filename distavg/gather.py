"""Whole tensors, one at a time: shards travel to rank 0 in host memory.

Rank 0 never holds more than the tensor under way and what the caller keeps of those before.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from distavg.average import Average
from distavg.comm import Comm
from distavg.errors import ModelMismatch
from distavg.foreach import chunks
from distavg.layout import Box
from distavg.shards import ModelShards
from distavg.tensors import LiveTensor, Shard

__all__ = ["copy_into", "iter_whole_tensors", "squared_distance"]

_DISTANCE_CHUNK = 2**20  # elements; two fp64 temporaries of 8 MiB


def iter_whole_tensors(
    average: Average, model_shards: ModelShards, comm: Comm, *, all_ranks: bool
) -> Iterator[tuple[str, Tensor | None]]:
    """Every tensor of a model whole, in the model's order, with an average's values. Collective.

    Per tensor: one gather of the boxes, then each rank sends its boxes to rank 0 over gloo
    (the tensor's bytes, once), and with `all_ranks` one broadcast of it. On one process nothing
    is sent. Every rank must run the iterator to its end.

    Args:
        average: The average.
        model_shards: The live tensors; those that the average does not hold are read from there.
        comm: The ranks.
        all_ranks: Whether every rank gets the whole tensors, or only rank 0.

    Yields:
        Canonical name and host tensor (None on the other ranks), tied names one after another.
    """
    contents = average.contents(model_shards)
    for tensor in model_shards.catalogue:
        mine = contents.get(tensor.fqn, [])
        if mine and not model_shards.is_counted(tensor.fqn):
            mine = []
        dtype = mine[0].tensor.dtype if mine else None
        whole = _assemble(mine, tensor.shape, dtype, tensor.dtype, comm, tensor.fqn)
        if all_ranks and comm.size > 1:
            whole = _spread(whole, tensor.shape, comm, tensor.fqn)
        for name in (tensor.fqn, *tensor.aliases):
            yield name, whole


def _assemble(
    mine: Sequence[Shard],
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    default: torch.dtype,
    comm: Comm,
    fqn: str,
) -> Tensor | None:
    doing = f"gathering {fqn}"
    held: list[tuple[torch.dtype | None, list[Box]]] | None
    held = comm.gather_to_first((dtype, [shard.box for shard in mine]), doing)
    if held is None:
        for shard in mine:
            comm.send(shard.tensor.detach().cpu().contiguous(), 0, doing)
        return None
    dtype = next((dtype for dtype, _ in held if dtype is not None), default)
    whole = torch.empty(shape, dtype=dtype, device="cpu")
    for shard in mine:
        whole[shard.box.slices()].copy_(shard.tensor)
    for rank, (_, boxes) in enumerate(held[1:], start=1):
        for box in boxes:
            part = torch.empty(box.sizes, dtype=whole.dtype, device="cpu")
            comm.receive(part, rank, doing)
            whole[box.slices()].copy_(part)
    return whole


def _spread(whole: Tensor | None, shape: tuple[int, ...], comm: Comm, fqn: str) -> Tensor:
    doing = f"broadcasting {fqn}"
    dtype = comm.broadcast(whole.dtype if whole is not None else None, doing)
    if whole is None:
        whole = torch.empty(shape, dtype=dtype, device="cpu")
    comm.broadcast_tensor(whole, doing)
    return whole


@torch.no_grad()
def copy_into(
    average: Average, source: ModelShards, target: Mapping[str, LiveTensor], comm: Comm
) -> None:
    """Copy an average, and the tensors that it does not hold, into another module. Collective.

    Nothing is communicated where each rank has what its part of the target needs: on one
    process, between equal layouts whose replicas do not divide the average, from whole copies to
    whole copies. Otherwise all ranks vote whether the modules fit, and whole tensors travel, one
    at a time, to every rank.

    Args:
        average: The average.
        source: The averaged model.
        target: The tensors of the other module, by canonical name.
        comm: The ranks.

    Raises:
        ModelMismatch: The modules' tensors differ in name or shape.
    """
    ours = source.by_name
    theirs = {name: tensor for tensor in target.values() for name in tensor.names}
    # All ranks must decide alike: who divides is known everywhere, layouts are equal on all ranks
    # or on none, and where ranks have different tensors they vote.
    is_local = not source.is_divided and all(
        tensor.layout == theirs[name].layout
        for tensor in ours.values()
        for name in tensor.names
        if name in theirs
    )
    if source.has_stages:
        is_local = all(comm.gather(is_local, "copy_to()"))
    if is_local:
        _check_same_tensors(source, target)
        parts = {(name, part.box): part.tensor for name, t in theirs.items() for part in t.parts}
        copies = {
            id(place): (place, shard.tensor)
            for shard in itertools.chain.from_iterable(average.contents(source).values())
            for name in ours[shard.fqn].names
            for place in [parts[name, shard.box]]
        }
        if copies:
            places, values = (list(column) for column in zip(*copies.values(), strict=True))
            torch._foreach_copy_(places, values)
        return
    source.catalogue_everywhere(comm.gather(source.digest, "copy_to()"))
    with comm.together("copy_to()"):
        _check_same_tensors(source, target)
    for fqn, whole in iter_whole_tensors(average, source, comm, all_ranks=True):
        if whole is not None and fqn in theirs:
            for part in theirs[fqn].parts:
                part.tensor.copy_(whole[part.box.slices()])


def _check_same_tensors(source: ModelShards, target: Mapping[str, LiveTensor]) -> None:
    """Whether an average of one model may be copied into another. Not collective.

    Raises:
        ModelMismatch: The modules' tensors differ in name or shape.
    """
    ours, theirs = _shapes(source.by_name.values()), _shapes(target.values())
    for fqn in sorted(ours.keys() ^ theirs.keys()):
        where = "the averaged model" if fqn in ours else "the target"
        raise ModelMismatch(f"copy_to: only {where} has a tensor {fqn}")
    for fqn, shape in ours.items():
        if shape != theirs[fqn]:
            raise ModelMismatch(
                f"copy_to: {fqn} has shape {shape} in the averaged model and {theirs[fqn]} in the "
                "target"
            )


def _shapes(tensors: Iterable[LiveTensor]) -> dict[str, tuple[int, ...]]:
    """By every name, those of tied tensors included."""
    return {name: tensor.global_shape for tensor in tensors for name in tensor.names}


@torch.no_grad()
def squared_distance(average: Average, model_shards: ModelShards) -> tuple[float, float]:
    """This rank's part of |live - average|^2 and |live|^2, summed in fp64 chunk by chunk."""
    apart = norm = 0.0
    for live, shard in zip(average.live, average.shards(), strict=True):
        if model_shards.is_counted(live.fqn) and live.tensor.is_floating_point():
            for part, other in chunks((live.tensor, shard.tensor), _DISTANCE_CHUNK):
                wide = part.double()
                apart += (wide - other.to(wide.device)).square().sum().item()
                norm += wide.square().sum().item()
    return apart, norm
