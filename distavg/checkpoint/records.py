"""Record files of a checkpoint: what one rank wrote of an average, and what lies where in it.

`ema/shard-00001.json` stands beside the data files of the rank whose number it has, ends in its own
checksum, and is sealed by the manifest. All that is read from it is validated before use: names are
those of data files of this rank in this folder, byte ranges lie in their files, and boxes lie in
their tensors and have the size of their bytes.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from distavg.checkpoint.manifest import (
    BLOCK_BYTES,
    Manifest,
    SavedAverage,
    SavedRecord,
    SavedTensor,
)
from distavg.checkpoint.seal import count, decode, encode, text
from distavg.errors import CheckpointCorrupt, CheckpointError
from distavg.layout import Box, cover_fault

__all__ = [
    "Place",
    "Record",
    "SavedBox",
    "SavedFile",
    "read_record",
    "read_records",
    "shard_name",
    "uncovered",
    "write_record",
]

HASH_DIGITS = 16
_DATA_SUFFIX = r"-model-[0-9]{5,}-of-[0-9]{5,}\.safetensors"


class SavedBox(NamedTuple):
    """A box of a tensor in a file.

    Attributes:
        fqn: The tensor's name.
        box: Where it lies in the whole tensor.
        begin: Where its bytes begin in the file; they are contiguous, in row-major order.
        checksums: xxh3-64 of each block of its bytes, 16 hexadecimal digits each.
    """

    fqn: str
    box: Box
    begin: int
    checksums: str


@dataclass(frozen=True, slots=True)
class SavedFile:
    """One safetensors file: its name relative to the checkpoint, size, header and boxes."""

    name: str
    nbytes: int
    header_checksum: str
    boxes: tuple[SavedBox, ...]


# A box, and the file that it is in.
Place = tuple[SavedFile, SavedBox]


def shard_name(folder: str, rank: int) -> str:
    """What the names of a rank's files in an average's folder begin with."""
    return f"{folder}/shard-{rank + 1:05d}"


@dataclass(frozen=True, slots=True)
class Record:
    """What a rank wrote of an average: the id of the save, and the rank's data files."""

    save_id: str
    files: tuple[SavedFile, ...]

    def to_bytes(self) -> bytes:
        """The file's content: the inverse of `from_bytes`."""
        return encode(
            {
                "save_id": self.save_id,
                "files": {
                    Path(file.name).name: {
                        "nbytes": file.nbytes,
                        "header": file.header_checksum,
                        "boxes": [
                            [b.fqn, b.box.offsets, b.box.sizes, b.begin, b.checksums]
                            for b in file.boxes
                        ],
                    }
                    for file in self.files
                },
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes, shard: str, tensors: Mapping[str, SavedTensor]) -> "Record":
        """Read and validate: the inverse of `to_bytes`.

        Args:
            content: All of the file.
            shard: The rank's `shard_name`.
            tensors: Those of the average.

        Raises:
            CheckpointCorrupt: Says whether it is torn or spoiled, or invalid.
        """

        def read(data: Mapping[str, Any]) -> Record:
            files = (_file_from(name, file, shard, tensors) for name, file in data["files"].items())
            return cls(text(data["save_id"]), tuple(files))

        return decode(content, f"{shard}.json", read)


def write_record(
    root: Path,
    folder: str,
    rank: int,
    tensors: Mapping[str, SavedTensor],
    files: Sequence[SavedFile],
    save_id: str,
) -> SavedRecord | None:
    """Write and flush the record of a rank's data files and return what the manifest says of it.

    Raises:
        OSError: It cannot be written.
    """
    if not files:
        return None
    shard = shard_name(folder, rank)
    content = Record(save_id, tuple(files)).to_bytes()
    Record.from_bytes(content, shard, tensors)  # what cannot be read back must not be committed
    with (root / f"{shard}.json").open("xb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    return SavedRecord(len(content), xxhash.xxh3_128_hexdigest(content))


def read_record(
    path: Path, manifest: Manifest, average: SavedAverage, rank: int
) -> tuple[SavedFile, ...]:
    """The data files that a rank wrote of an average in the checkpoint at a path.

    Raises:
        CheckpointCorrupt: The rank's record is missing, torn, another save's or spoiled.
        CheckpointError: It cannot be read, for want of permission or the like.
    """
    expected = average.records[rank]
    if expected is None:
        return ()
    shard = shard_name(average.folder, rank)
    file = path / f"{shard}.json"
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointCorrupt(f"{file} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if (len(content), xxhash.xxh3_128_hexdigest(content)) != expected:
        if (other := _save_id(content)) not in (None, manifest.save_id):
            raise CheckpointCorrupt(
                f"{file} belongs to another save: its id is {other}, the manifest's "
                f"{manifest.save_id}"
            )
        if len(content) != expected.nbytes:
            raise CheckpointCorrupt(
                f"{file} is torn: it has {len(content)} bytes, the manifest says {expected.nbytes}"
            )
        raise CheckpointCorrupt(f"{file}: its checksum is wrong")
    try:
        return Record.from_bytes(content, shard, average.tensors).files
    except CheckpointCorrupt as error:
        raise CheckpointCorrupt(f"{path}: {error}") from error


def read_records(path: Path, manifest: Manifest, average: SavedAverage) -> list[SavedFile]:
    """The data files that all ranks wrote of an average.

    Raises:
        CheckpointError: What `read_record` raises.
    """
    ranks = range(len(average.records))
    return [file for rank in ranks for file in read_record(path, manifest, average, rank)]


def uncovered(average: SavedAverage, files: Iterable[SavedFile]) -> str | None:
    """Why these files do not hold every tensor exactly once; None if they do."""
    boxes: dict[str, list[Box]] = {fqn: [] for fqn in average.tensors}
    for file in files:
        for box in file.boxes:
            boxes[box.fqn].append(box.box)
    for fqn, each in boxes.items():
        if fault := cover_fault(average.tensors[fqn].shape, each):
            return f"{fqn}: {fault}"
    return None


def _save_id(content: bytes) -> str | None:
    """The id in a record that is whole in itself."""
    with suppress(CheckpointCorrupt):
        return decode(content, "", lambda data: text(data["save_id"]))
    return None


def _file_from(
    name: str, data: Mapping[str, Any], shard: str, tensors: Mapping[str, SavedTensor]
) -> SavedFile:
    folder, _, start = shard.rpartition("/")
    nbytes = count(data["nbytes"])
    return SavedFile(
        name=f"{folder}/{text(name, start + _DATA_SUFFIX)}",
        nbytes=nbytes,
        header_checksum=text(data["header"]),
        boxes=tuple(_box_from(box, tensors, nbytes) for box in data["boxes"]),
    )


def _box_from(data: Any, tensors: Mapping[str, SavedTensor], file_bytes: int) -> SavedBox:
    fqn, offsets, sizes, begin, checksums = data
    tensor = tensors[fqn]
    nbytes = tensor.item_bytes
    for value in (*offsets, *sizes, begin):
        if type(value) is not int or value < 0:
            raise ValueError(f"count: {value!r}")
    for offset, size, length in zip(offsets, sizes, tensor.shape, strict=True):
        if offset + size > length:
            raise ValueError(f"box: {offsets}, {sizes}")
        nbytes *= size
    if begin + nbytes > file_bytes:
        raise ValueError(f"byte range: {(begin, nbytes)!r}")
    if type(checksums) is not str or len(checksums) != -(-nbytes // BLOCK_BYTES) * HASH_DIGITS:
        raise ValueError(f"checksums: {checksums!r:.32}")
    return SavedBox(tensor.fqn, Box(tuple(offsets), tuple(sizes)), begin, checksums)
