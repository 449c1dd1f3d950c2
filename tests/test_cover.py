"""The ranks' work on boxes: each hears of the saved boxes that it needs, and of no other."""

from __future__ import annotations

import itertools
import random

import pytest
from checks import error_of
from ranks import run_ranks

from distavg.checkpoint.cover import Key, find_boxes, prove_cover
from distavg.checkpoint.manifest import SavedTensor
from distavg.checkpoint.records import SavedBox, SavedFile
from distavg.comm import Comm
from distavg.errors import CheckpointError
from distavg.layout import Box, range_boxes

SHAPES = {"a": (7, 3), "b": (40,), "c": (), "d": (0, 2), "e": (4, 5, 3), "f": (2, 2)}
TENSORS = {
    name: {fqn: SavedTensor(fqn, shape, "float32", ()) for fqn, shape in SHAPES.items()}
    for name in ("ema", "swa")
}
NUM_FILES = 6


def pieces(seed: str, fqn: str) -> list[Box]:
    """A tensor cut at random places, as FSDP1 and replicas cut it."""
    shape = SHAPES[fqn]
    total = TENSORS["ema"][fqn].nbytes // 4
    cuts = sorted(random.Random(f"{seed} {fqn}").choices(range(total + 1), k=5))
    return [
        box
        for low, high in itertools.pairwise([0, *cuts, total])
        for box in range_boxes(shape, low, high)
    ]


def saved_files(name: str) -> list[SavedFile]:
    """Those of a checkpoint, its boxes spread at random."""
    rng = random.Random(name)
    boxes: list[list[SavedBox]] = [[] for _ in range(NUM_FILES)]
    for fqn in SHAPES:
        for number, box in enumerate(pieces(name, fqn)):
            rng.choice(boxes).append(SavedBox(fqn, box, number, ""))
    return [SavedFile(f"{name}/{i}", i, "", tuple(each)) for i, each in enumerate(boxes)]


def wanted_by(rank: int, size: int) -> list[tuple[Key, Box]]:
    """The last rank wants nothing, unless it is alone; the others tensors that are cut anew."""
    if 0 < rank == size - 1:
        return []
    return [
        ((name, fqn), box)
        for name in TENSORS
        for fqn in SHAPES
        for box in pieces(f"{rank}", fqn)[rank::2]
    ]


def refusal(name: str, fault: str) -> CheckpointError:
    return CheckpointError(f"{name}: {fault}")


def found_boxes() -> dict[Key, list[tuple[str, Box]]]:
    comm = Comm()
    known = {name: saved_files(name)[comm.rank :: comm.size] for name in TENSORS}
    wanted = wanted_by(comm.rank, comm.size)
    found = find_boxes(TENSORS, known, wanted, comm, "testing", refusal)
    for (name, fqn), places in found.items():
        for file, box in places:
            assert (file.boxes, box.fqn) == ((), fqn)
            assert SavedFile(file.name, file.nbytes, "", ()) == file
            assert box in next(each.boxes for each in saved_files(name) if each.name == file.name)
    return {key: [(f.name, b.box) for f, b in places] for key, places in found.items()}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_each_rank_is_told_of_what_it_needs(world_size: int) -> None:
    for rank, found in enumerate(run_ranks(found_boxes, world_size)):
        needed: dict[Key, list[tuple[str, Box]]] = {}
        for key, wish in wanted_by(rank, world_size):
            places = needed.setdefault(key, [])
            for file in saved_files(key[0]):
                for box in file.boxes:
                    place = (file.name, box.box)
                    if box.fqn == key[1] and box.box.intersect(wish) and place not in places:
                        places.append(place)
        assert any(needed.values()) is not (0 < rank == world_size - 1)
        assert {key: sorted(each) for key, each in found.items() if each} == {
            key: sorted(each) for key, each in needed.items() if each
        }


def faults_without_each_file() -> list[list[str]]:
    """What this rank hears of a save and of a load, if a file is lost, and if none is."""
    comm = Comm()
    heard = []
    for lost in [None, *range(NUM_FILES)]:
        mine = {name: saved_files(name)[comm.rank :: comm.size] for name in TENSORS}
        mine["swa"] = [file for file in mine["swa"] if file.nbytes != lost]
        heard.append(
            [
                error_of(prove_cover, TENSORS, mine, comm, "testing", refusal),
                error_of(find_boxes, TENSORS, mine, [], comm, "testing", refusal),
            ]
        )
    return heard


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_hears_of_each_ranks_first_fault(world_size: int) -> None:
    results = run_ranks(faults_without_each_file, world_size)
    for rank, (whole, *without) in enumerate(results):
        assert whole == ["nothing"] * 2
        for lost, texts in zip(saved_files("swa"), without, strict=True):
            sizes = dict.fromkeys(SHAPES, 0)
            for box in lost.boxes:
                sizes[box.fqn] += box.box.numel
            faults = {}
            for keeper in range(world_size):
                kept = sorted(SHAPES)[keeper::world_size]
                if fqn := next((fqn for fqn in kept if sizes[fqn]), None):
                    total = TENSORS["swa"][fqn].nbytes // 4
                    faults[keeper] = f"swa: {fqn}: {sizes[fqn]} of {total} elements are in no box"
            lines = [f"rank {keeper}: {fault}" for keeper, fault in faults.items()]
            expected = f"testing failed. {chr(10).join(lines)}"
            if list(faults) == [rank]:
                expected = faults[rank]
            assert texts == [f"CheckpointError: {expected}"] * 2
