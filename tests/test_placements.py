"""Placements to boxes, without a process group; every wrapper's are in test_wrappers.py."""

from __future__ import annotations

import pytest
from torch.distributed.tensor import Partial, Replicate
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from distavg.layout import Box
from distavg.placements import MeshPlace, placed_box

PLAIN = ShardPlacement(0)
BY_2, BY_4 = _StridedShard(0, split_factor=2), _StridedShard(0, split_factor=4)


def mesh(shape: tuple[int, ...], place: tuple[int, ...] | None) -> MeshPlace:
    return MeshPlace(shape, (), frozenset(), (), place, is_ascending=True)


@pytest.mark.parametrize(
    ("placements", "shape", "place", "expected"),
    [
        ([PLAIN], (2,), (1,), Box((4, 0), (4, 6))),
        ([ShardPlacement(1)], (2,), (1,), Box((0, 3), (8, 3))),
        ([Replicate()], (2,), (1,), Box((0, 0), (8, 6))),
        ([PLAIN, ShardPlacement(1)], (2, 2), (1, 0), Box((4, 0), (4, 3))),
        ([PLAIN, PLAIN], (2, 2), (1, 0), Box((4, 0), (2, 6))),
        # A strided shard lies within those to its right: here the last cut comes first.
        ([BY_2, PLAIN], (2, 2), (1, 0), Box((2, 0), (2, 6))),
        ([BY_4, BY_2, PLAIN], (2, 2, 2), (1, 0, 1), Box((5, 0), (1, 6))),
        ([PLAIN], (9,), (8,), Box((8, 0), (0, 6))),
    ],
)
def test_the_box_of_a_rank(
    placements: list[Placement], shape: tuple[int, ...], place: tuple[int, ...], expected: Box
) -> None:
    assert placed_box(placements, mesh(shape, place), (8, 6), expected.sizes) == expected
    assert placed_box(placements, mesh(shape, place), (8, 6), (3, 3)) is None  # not that shard


@pytest.mark.parametrize(
    ("placements", "shape", "place"),
    [
        ([BY_4, PLAIN, PLAIN], (2, 2, 2), (1, 0, 1)),  # within 2 first, not 4
        ([PLAIN, BY_2], (2, 1), (1, 0)),  # within nothing
        ([Partial()], (2,), (0,)),
        ([PLAIN], (2,), None),  # a rank outside the mesh
    ],
)
def test_what_is_not_one_box(
    placements: list[Placement], shape: tuple[int, ...], place: tuple[int, ...] | None
) -> None:
    for local_shape in [(8, 6), (4, 6), (2, 6), (1, 6)]:
        assert placed_box(placements, mesh(shape, place), (8, 6), local_shape) is None


def test_any_empty_shape_is_an_empty_box() -> None:
    assert placed_box([PLAIN], mesh((9,), (8,)), (8, 6), (0,)) == Box((8, 0), (0, 6))
