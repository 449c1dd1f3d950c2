"""What the ranks work out together from boxes: that they cover every tensor, and who needs which.

Each tensor has one rank as its keeper, to which the others send what they know of it: of tensor
number t of an average, by name, that is rank t modulo the number of ranks. So no rank ever has all
boxes, unless it is alone.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from distavg.checkpoint.manifest import SavedTensor
from distavg.checkpoint.records import Place, SavedFile
from distavg.comm import Comm
from distavg.errors import CheckpointError
from distavg.layout import Box, BoxIndex, cover_fault

__all__ = ["Key", "Refusal", "Tensors", "find_boxes", "prove_cover"]

# The name of an average, and of a tensor of it.
Key = tuple[str, str]
# Every tensor of each average; the same on all ranks.
Tensors = Mapping[str, Mapping[str, SavedTensor]]
# Makes an error of an average's name and of what is wrong with it.
Refusal = Callable[[str, str], CheckpointError]


def prove_cover(
    tensors: Tensors,
    written: Mapping[str, Iterable[SavedFile]],
    comm: Comm,
    doing: str,
    refusal: Refusal,
) -> None:
    """Prove that what all ranks wrote covers every tensor exactly once.

    Collective: an exchange and a vote.

    Args:
        tensors: Those of each average.
        written: What this rank wrote of each.
        comm: The ranks.
        doing: What for, in an error's words.
        refusal: Makes the error that is raised where it does not.
    """
    keepers = _keepers(tensors, comm.size)
    parts: list[list[tuple[Key, Box]]] = [[] for _ in range(comm.size)]
    for name, files in written.items():
        for box in itertools.chain(*(file.boxes for file in files)):
            parts[keepers[name, box.fqn]].append(((name, box.fqn), box.box))
    received = comm.exchange(parts, doing)
    with comm.together(doing):
        boxes: dict[Key, list[Box]] = {}
        for key, part in itertools.chain(*received):
            boxes.setdefault(key, []).append(part)
        _check_kept(tensors, keepers, comm.rank, boxes, refusal)


def find_boxes(
    tensors: Tensors,
    known: Mapping[str, Iterable[SavedFile]],
    wanted: Iterable[tuple[Key, Box]],
    comm: Comm,
    doing: str,
    refusal: Refusal,
) -> dict[Key, list[Place]]:
    """Prove that the saved boxes cover every tensor exactly once, and find those this rank needs.

    Collective: an exchange, a vote and another exchange.

    Args:
        tensors: Those of each average.
        known: Files of each that are known to this rank, and to no other.
        wanted: Boxes that this rank is to fill.
        comm: The ranks.
        doing: What for, in an error's words.
        refusal: Makes the error that is raised where a tensor is not covered.

    Returns:
        The saved boxes that have an element of a wanted one, each with its file alone.
    """
    keepers = _keepers(tensors, comm.size)
    parts: list[tuple[list[tuple[Key, Place]], list[tuple[Key, Box]]]]
    parts = [([], []) for _ in range(comm.size)]
    for name, files in known.items():
        for file in files:
            alone = replace(file, boxes=())
            for box in file.boxes:
                parts[keepers[name, box.fqn]][0].append(((name, box.fqn), (alone, box)))
    for key, wish in wanted:
        parts[keepers[key]][1].append((key, wish))
    received = comm.exchange(parts, doing)
    with comm.together(doing):
        places: dict[Key, list[Place]] = {}
        for key, place in itertools.chain(*(saved for saved, _ in received)):
            places.setdefault(key, []).append(place)
        boxes = {key: [box.box for _, box in found] for key, found in places.items()}
        _check_kept(tensors, keepers, comm.rank, boxes, refusal)
        indexes = {key: BoxIndex(each) for key, each in boxes.items()}
        answers = []
        for _, wishes in received:
            needed: dict[Key, set[int]] = {}
            for key, wish in wishes:
                if key in indexes:  # else the tensor has no elements
                    needed.setdefault(key, set()).update(indexes[key].meeting(wish))
            answers.append(
                {key: [places[key][i] for i in sorted(each)] for key, each in needed.items()}
            )
    return {key: found for answer in comm.exchange(answers, doing) for key, found in answer.items()}


def _keepers(tensors: Tensors, size: int) -> dict[Key, int]:
    return {
        (name, fqn): number % size
        for name, each in tensors.items()
        for number, fqn in enumerate(sorted(each))
    }


def _check_kept(
    tensors: Tensors,
    keepers: Mapping[Key, int],
    rank: int,
    boxes: Mapping[Key, Sequence[Box]],
    refusal: Refusal,
) -> None:
    """Raise if boxes do not cover exactly once a tensor that a rank keeps."""
    for (name, fqn), keeper in keepers.items():
        if keeper == rank:
            found = boxes.get((name, fqn), ())
            if fault := cover_fault(tensors[name][fqn].shape, found):
                raise refusal(name, f"{fqn}: {fault}")
