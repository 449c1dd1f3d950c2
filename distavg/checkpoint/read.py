"""Reading checkpoints without a model: every fault of one, tensors piece by piece, two compared.

One process; nothing is held but the pieces under way, and where which box lies.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distavg.checkpoint.files import BUFFER_BYTES, ShardReader, Target
from distavg.checkpoint.folders import reading
from distavg.checkpoint.manifest import Manifest, SavedAverage
from distavg.checkpoint.plan import plan_reads
from distavg.checkpoint.records import (
    Place,
    SavedFile,
    read_record,
    read_records,
    uncovered,
)
from distavg.errors import CheckpointCorrupt, ConfigError
from distavg.foreach import as_bytes
from distavg.layout import Box, BoxIndex, range_boxes

__all__ = ["AverageReader", "Difference", "differences", "verify_checkpoint"]

Progress = Callable[[int], object]

# Files of an average that are open at one time.
_OPEN_FILES = 32
# Pieces of a tensor: large enough for full speed, small beside a model.
_PIECE_ELEMENTS = 2**22


def verify_checkpoint(
    path: Path, progress: Progress = lambda nbytes: None
) -> tuple[int, list[str]]:
    """Read every byte of a checkpoint's averages and compare all checksums.

    Args:
        path: The checkpoint.
        progress: Called with the number of bytes that were dealt with since the last call.

    Returns:
        The bytes that were read, and every fault: files and records that are missing, torn or
        another save's, blocks whose checksum is wrong, tensors that the files do not cover (where
        all records are whole).

    Raises:
        CheckpointNotFound: There is no committed checkpoint.
        CheckpointCorrupt: The manifest itself is spoiled.
    """
    buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, device="cpu")
    total, faults = 0, []
    with reading(path) as manifest:
        for name, average in manifest.averages.items():
            files: list[SavedFile] = []
            lost = []
            for rank in range(len(average.records)):
                try:
                    written = read_record(path, manifest, average, rank)
                except CheckpointCorrupt as error:
                    lost.append(str(error))
                    continue
                files += written
                for file in written:
                    nbytes, found = _check_file(path, manifest, average, file, buffer, progress)
                    total += nbytes
                    faults += found
            faults += lost
            if not lost and (fault := uncovered(average, files)):
                faults.append(f"{path}: average {name!r} is not whole: {fault}")
    return total, faults


def _check_file(
    path: Path,
    manifest: Manifest,
    average: SavedAverage,
    file: SavedFile,
    buffer: Tensor,
    progress: Progress,
) -> tuple[int, list[str]]:
    """The bytes of a data file that could be read, and its faults."""
    reads = [
        (box, part)
        for box in file.boxes
        for item_bytes in [average.tensors[box.fqn].item_bytes]
        for read in plan_reads(box.box, box.box, item_bytes, BUFFER_BYTES, is_flat=True)
        for part, _ in read.split(BUFFER_BYTES, item_bytes)
    ]
    total = 0
    faults: list[str] = []
    try:
        with ShardReader(path, file, manifest.save_id) as reader:
            for box, read in reads:
                faults += reader.faults(box, read, buffer)
                total += read.nbytes
                progress(read.nbytes)
    except CheckpointCorrupt as error:
        faults.append(str(error))
        progress(sum(read.nbytes for _, read in reads))
    return total, faults


class AverageReader:
    """An average in a checkpoint, of which any part can be read, verified.

    Args:
        path: The checkpoint.
        manifest: Its manifest.
        name: The average; None for the only one.

    Raises:
        ConfigError: There is no such average, or there are several.
        CheckpointCorrupt: The average is not whole, or a record of it is missing, torn or spoiled.
    """

    def __init__(self, path: Path, manifest: Manifest, name: str | None = None) -> None:
        if name is None and len(manifest.averages) == 1:
            (name,) = manifest.averages
        if name not in manifest.averages:
            raise ConfigError(f"{path} holds the averages {sorted(manifest.averages)}: name one")
        self.name = name
        self.average = manifest.averages[name]
        files = read_records(path, manifest, self.average)
        if fault := uncovered(self.average, files):
            raise CheckpointCorrupt(f"{path}: average {name!r} is not whole: {fault}")
        self._places: dict[str, list[Place]] = {fqn: [] for fqn in self.average.tensors}
        for file in files:
            for box in file.boxes:
                self._places[box.fqn].append((file, box))
        self._indexes = {
            fqn: BoxIndex([box.box for _, box in each]) for fqn, each in self._places.items()
        }
        self._path = path
        self._save_id = manifest.save_id
        self._buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, device="cpu")
        self._open: OrderedDict[str, ShardReader] = OrderedDict()

    def __enter__(self) -> "AverageReader":
        return self

    def __exit__(self, *error: object) -> None:
        with ExitStack() as stack:
            for reader in self._open.values():
                stack.push(reader)
            self._open.clear()

    def pieces(self, fqn: str) -> Iterator[tuple[Box, Tensor]]:
        """A tensor piece by piece, in row-major order.

        Raises:
            CheckpointCorrupt: A file is missing, torn or spoiled.
        """
        shape = self.average.tensors[fqn].shape
        total = math.prod(shape)
        for start in range(0, total, _PIECE_ELEMENTS):
            for box in range_boxes(shape, start, min(start + _PIECE_ELEMENTS, total)):
                yield box, self.part(fqn, box)

    def part(self, fqn: str, box: Box) -> Tensor:
        """A part of a tensor, in host memory.

        Raises:
            CheckpointCorrupt: A file is missing, torn or spoiled.
        """
        tensor = self.average.tensors[fqn]
        dtype = getattr(torch, tensor.dtype)
        found = torch.empty(box.sizes, dtype=dtype, device="cpu")
        target = Target(found, dtype)
        for number in self._indexes[fqn].meeting(box):
            file, saved = self._places[fqn][number]
            for read in plan_reads(saved.box, box, tensor.item_bytes, BUFFER_BYTES, is_flat=True):
                target.fill(self._file(file), saved, read, self._buffer)
        return found

    def _file(self, file: SavedFile) -> ShardReader:
        if file.name not in self._open:
            if len(self._open) == _OPEN_FILES:
                _, oldest = self._open.popitem(last=False)
                oldest.__exit__(None, None, None)
            self._open[file.name] = ShardReader(self._path, file, self._save_id)
        return self._open[file.name]


@dataclass(frozen=True, slots=True)
class Difference:
    """How two averages differ in one tensor.

    Attributes:
        fqn: The tensor.
        what: Which difference cannot be counted: one of them lacks it, or another shape or dtype;
            else "".
        largest: The largest absolute difference of two elements.
        relative: The Euclidean norm of the difference, relative to that of the first.
    """

    fqn: str
    what: str
    largest: float = math.nan
    relative: float = math.nan


def differences(
    first: AverageReader, second: AverageReader, progress: Progress = lambda nbytes: None
) -> Iterator[Difference]:
    """The tensors of which two averages have other bits, with sizes in fp64; piece by piece.

    Raises:
        CheckpointCorrupt: A file is missing, torn or spoiled.
    """
    ours, theirs = first.average.tensors, second.average.tensors
    for fqn in {**ours, **theirs}:
        if fqn not in ours or fqn not in theirs:
            yield Difference(fqn, f"only in the {'first' if fqn in ours else 'second'}")
        elif ours[fqn].shape != theirs[fqn].shape:
            yield Difference(fqn, f"shapes {ours[fqn].shape} and {theirs[fqn].shape}")
        elif ours[fqn].dtype != theirs[fqn].dtype:
            yield Difference(fqn, f"{ours[fqn].dtype} and {theirs[fqn].dtype}")
        else:
            largest = apart = norm = 0.0
            is_equal = True
            for box, mine in first.pieces(fqn):
                other = second.part(fqn, box)
                if not torch.equal(as_bytes(mine), as_bytes(other)):
                    is_equal = False
                    # Infinities that are equal would be NaN apart.
                    here = (mine.double() - other.double()).abs().masked_fill_(mine == other, 0)
                    candidates = (largest, here.max().item())
                    largest = max(candidates, key=lambda value: (math.isnan(value), value))
                    apart += here.square().sum().item()
                norm += mine.double().square().sum().item()
                progress(mine.nbytes)
            if not is_equal:
                relative = math.sqrt(apart / norm) if norm else math.inf
                yield Difference(fqn, "" if largest else "signs of zero", largest, relative)
