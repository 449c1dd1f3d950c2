"""The manifest of a checkpoint, format version 1: what is saved, by which ranks.

`manifest.json` is written last and renamed into place, so its presence is the commit. Its last
key is a checksum of everything before it, and of each rank's record file, which says what lies
where (`distavg.checkpoint.records`), it holds size and checksum: so it seals the whole checkpoint,
and grows with the number of tensors and of ranks, not with their product. All that is read from it
is validated before use: names cannot lead out of the checkpoint.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from distavg.checkpoint.seal import count, decode, encode, expect, text
from distavg.errors import CheckpointCorrupt, CheckpointError, CheckpointNotFound

__all__ = ["Manifest", "SavedAverage", "SavedRecord", "SavedTensor", "read_manifest"]

MANIFEST_NAME = "manifest.json"
FORMAT_NAME = "distavg"
FORMAT_VERSION = 1

# Data is checksummed in blocks, so that a rank that reads a part verifies only that part. At 256
# KiB partial reads were measured to read 1.00 to 1.15 times the bytes needed; at 1 MiB up to 1.5.
BLOCK_BYTES = 2**18

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
# What a model may have besides, and an export writes; averages never hold it.
_OTHER_ITEM_BYTES = {
    "complex64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
}
FOLDER_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_CHECKSUM_PATTERN = "[0-9a-f]{32}"
_YEAR_10000 = 253_402_300_800  # in seconds since the epoch; datetime ends there


class SavedRecord(NamedTuple):
    """A rank's record file: its size, and the xxh3-128 of its content."""

    nbytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor of an average: its names, global shape and dtype."""

    fqn: str
    shape: tuple[int, ...]
    dtype: str
    aliases: tuple[str, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of an element."""
        return ITEM_BYTES.get(self.dtype) or _OTHER_ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.item_bytes


@dataclass(frozen=True, slots=True)
class SavedAverage:
    """One average: its folder, rule, counter, tensors, and the ranks' records.

    Where `statistics_at` is not None, buffers among the tensors are BatchNorm statistics that were
    measured for it, after so many updates. A rank that wrote nothing of it has no record.
    """

    folder: str
    rule: dict[str, Any]
    num_updates: int
    statistics_at: int | None
    tensors: dict[str, SavedTensor]
    records: tuple[SavedRecord | None, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole average."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Manifest:
    """A committed checkpoint.

    Attributes:
        save_id: Random, one for each save; every file's header carries it.
        averager_id: Random, one for each run; kept over resumes.
        committed_at: Seconds since the epoch.
        steps: Optimizer steps seen.
        epochs: Epochs done, exactly.
        averages: By name.
        extra_folder: Folder of what `also=` wrote, if anything.
    """

    save_id: str
    averager_id: str
    committed_at: float
    steps: int
    epochs: Fraction
    averages: dict[str, SavedAverage]
    extra_folder: str | None

    @property
    def folders(self) -> list[str]:
        """Every folder of the checkpoint."""
        extra = [self.extra_folder] if self.extra_folder is not None else []
        return [average.folder for average in self.averages.values()] + extra

    def to_bytes(self) -> bytes:
        """The file's content: the inverse of `from_bytes`."""
        body = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "save_id": self.save_id,
            "averager_id": self.averager_id,
            "committed_at": self.committed_at,
            "steps": self.steps,
            "epochs": [self.epochs.numerator, self.epochs.denominator],
            "block_bytes": BLOCK_BYTES,
            "extra_folder": self.extra_folder,
            "averages": {
                name: {
                    "folder": average.folder,
                    "rule": average.rule,
                    "num_updates": average.num_updates,
                    "statistics_at": average.statistics_at,
                    "tensors": {
                        tensor.fqn: {
                            "shape": tensor.shape,
                            "dtype": tensor.dtype,
                            "aliases": tensor.aliases,
                        }
                        for tensor in average.tensors.values()
                    },
                    "records": average.records,
                }
                for name, average in self.averages.items()
            },
        }
        return encode(body)

    @classmethod
    def from_bytes(cls, content: bytes) -> "Manifest":
        """Read and validate: the inverse of `to_bytes`.

        Raises:
            CheckpointCorrupt: Says whether it is torn or spoiled, of another version, or invalid.
        """
        return decode(content, MANIFEST_NAME, _manifest_from)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at a path.

    Raises:
        CheckpointNotFound: Nothing is there, or a save that was never committed.
        CheckpointCorrupt: The manifest is spoiled.
        CheckpointError: It cannot be read, for want of permission or the like.
    """
    try:
        content = (path / MANIFEST_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_dir():
            why = "has no manifest.json: it is not a checkpoint, or its save was never committed"
        else:
            why = "there is no checkpoint here" if not path.exists() else "is not a folder"
        raise CheckpointNotFound(f"{path}: {why}") from None
    except IsADirectoryError:
        raise CheckpointCorrupt(f"{path}: manifest.json is a folder") from None
    except OSError as error:
        raise CheckpointError(f"{path}: manifest.json cannot be read: {error}") from error
    try:
        return Manifest.from_bytes(content)
    except CheckpointCorrupt as error:
        raise CheckpointCorrupt(f"{path}: {error}") from error


def _manifest_from(data: Mapping[str, Any]) -> Manifest:
    if (data["format"], data["version"]) != (FORMAT_NAME, FORMAT_VERSION):
        raise CheckpointCorrupt(
            f"{MANIFEST_NAME} has format {data['format']!r} version {data['version']!r}; "
            f"this release reads {FORMAT_NAME!r} version {FORMAT_VERSION}"
        )
    expect(data["block_bytes"] == BLOCK_BYTES, "block_bytes", data["block_bytes"])
    extra = data["extra_folder"]
    return Manifest(
        save_id=text(data["save_id"]),
        averager_id=text(data["averager_id"]),
        committed_at=_seconds(data["committed_at"]),
        steps=count(data["steps"]),
        epochs=_epochs(*map(count, data["epochs"])),
        averages={text(n): _average_from(a) for n, a in data["averages"].items()},
        extra_folder=None if extra is None else text(extra, FOLDER_PATTERN),
    )


def _average_from(data: Mapping[str, Any]) -> SavedAverage:
    tensors = {
        fqn: SavedTensor(
            text(fqn),
            tuple(map(count, tensor["shape"])),
            text(tensor["dtype"]),
            tuple(map(text, tensor["aliases"])),
        )
        for fqn, tensor in data["tensors"].items()
    }
    for tensor in tensors.values():
        expect(tensor.dtype in ITEM_BYTES, "dtype", tensor.dtype)
    expect(isinstance(data["rule"], dict), "rule", data["rule"])
    text(json.dumps(data["rule"], ensure_ascii=False))
    return SavedAverage(
        folder=text(data["folder"], FOLDER_PATTERN),
        rule=data["rule"],
        num_updates=count(data["num_updates"]),
        statistics_at=None if data["statistics_at"] is None else count(data["statistics_at"]),
        tensors=tensors,
        records=tuple(map(_record_from, data["records"])),
    )


def _record_from(data: Any) -> SavedRecord | None:
    if data is None:
        return None
    nbytes, checksum = data
    return SavedRecord(count(nbytes), text(checksum, _CHECKSUM_PATTERN))


def _seconds(value: object) -> float:
    expect(type(value) in (int, float) and 0 <= value < _YEAR_10000, "time", value)  # type: ignore[operator]
    return float(value)  # type: ignore[arg-type]  # just proved


def _epochs(numerator: int, denominator: int) -> Fraction:
    epochs = Fraction(numerator, denominator)
    expect(epochs < 2**63, "epochs", epochs)
    return epochs
