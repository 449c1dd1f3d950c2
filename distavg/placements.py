"""How DTensor cuts a tensor over a mesh: placements -> the box that lies on this rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from distavg.layout import Box, nested_extent

__all__ = ["MeshPlace", "placed_box"]


@dataclass(frozen=True, slots=True)
class MeshPlace:
    """A mesh and this rank's place in it.

    Attributes:
        shape: Of the mesh.
        ranks: Its global ranks, in row-major order.
        members: The same as a set.
        groups: The group of this rank along each mesh dim.
        place: Its coordinates; None if it is not in the mesh.
        is_ascending: Whether those groups number their ranks as the mesh does.
    """

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    members: frozenset[int]
    groups: tuple[dist.ProcessGroup, ...]
    place: tuple[int, ...] | None
    is_ascending: bool

    @classmethod
    def of(cls, mesh: DeviceMesh) -> "MeshPlace":
        """What DTensor's mesh is here."""
        ranks = tuple(mesh.mesh.flatten().tolist())
        groups = tuple(mesh.get_group(axis) for axis in range(mesh.ndim))
        found = mesh.get_coordinate()
        place = None if found is None else tuple(found)
        is_ascending = place is None or place == tuple(map(dist.get_rank, groups))
        return cls(tuple(mesh.shape), ranks, frozenset(ranks), groups, place, is_ascending)


def placed_box(
    placements: Sequence[Placement],
    mesh: MeshPlace,
    shape: tuple[int, ...],
    local_shape: tuple[int, ...],
) -> Box | None:
    """The box of a DTensor of this shape on this rank; None if it is not one contiguous piece."""
    cuts: list[list[tuple[int, int]]] | None = None
    if mesh.place is not None:
        cuts = _cuts(placements, mesh.shape, mesh.place, len(shape))
    if cuts is None:
        return None
    extents = [nested_extent(n, dim_cuts) for n, dim_cuts in zip(shape, cuts, strict=True)]
    box = Box(tuple(offset for offset, _ in extents), tuple(size for _, size in extents))
    is_placed = box.sizes == local_shape or (box.numel == 0 and 0 in local_shape)
    return box if is_placed else None


def _cuts(
    placements: Sequence[Placement],
    mesh_shape: Sequence[int],
    place: Sequence[int],
    num_dims: int,
) -> list[list[tuple[int, int]]] | None:
    """For each tensor dim its cuts, the outermost first; None for placements that cut otherwise.

    Shards of one dim are nested from the left of the mesh to the right, but a `_StridedShard` lies
    within the shards to its right that make up its `split_factor`.
    """
    cuts: list[list[tuple[int, int]]] = [[] for _ in range(num_dims)]
    waiting: list[list[tuple[int, tuple[int, int]]]] = [[] for _ in range(num_dims)]
    for placement, parts, index in zip(placements, mesh_shape, place, strict=True):
        if isinstance(placement, _StridedShard):
            dim = placement.dim
            waiting[dim].append((int(placement.split_factor), (parts, index)))
        elif type(placement) is ShardPlacement:
            dim = placement.dim
            cuts[dim].append((parts, index))
            within = parts
            while waiting[dim] and waiting[dim][-1][0] == within:
                _, cut = waiting[dim].pop()
                cuts[dim].append(cut)
                within *= cut[0]
        elif type(placement) is not Replicate:
            return None
    return None if any(waiting) else cuts
