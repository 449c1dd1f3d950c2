"""The manifest of a checkpoint, format version 1: what is saved where, as plain records.

`manifest.json` is written last and renamed into place, so its presence is the commit. Its last
key is a checksum of everything before it. All that is read from it is validated before use: names
cannot lead out of the checkpoint, byte ranges lie in their files, and boxes have the size of
their bytes.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from distavg.errors import CheckpointCorrupt, CheckpointError, CheckpointNotFound
from distavg.layout import Box, cover_fault

__all__ = ["Manifest", "SavedAverage", "SavedBox", "SavedFile", "SavedTensor", "read_manifest"]

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
_FILE_PATTERN = FOLDER_PATTERN + r"/shard-\d{5,}-model-\d{5,}-of-\d{5,}\.safetensors"
HASH_DIGITS = 16
_YEAR_10000 = 253_402_300_800  # in seconds since the epoch; datetime ends there


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
    """One average: its folder, rule, counter, tensors and files.

    Where `statistics_at` is not None, buffers among the tensors are BatchNorm statistics that were
    measured for it, after so many updates.
    """

    folder: str
    rule: dict[str, Any]
    num_updates: int
    statistics_at: int | None
    tensors: dict[str, SavedTensor]
    files: tuple[SavedFile, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole average."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def boxes(self) -> dict[str, list[tuple[SavedFile, SavedBox]]]:
        """Where each tensor's boxes are."""
        places: dict[str, list[tuple[SavedFile, SavedBox]]] = {name: [] for name in self.tensors}
        for file in self.files:
            for box in file.boxes:
                places[box.fqn].append((file, box))
        return places

    def fault(self) -> str | None:
        """Why the boxes do not cover every tensor exactly once; None if they do."""
        for fqn, places in self.boxes().items():
            if fault := cover_fault(self.tensors[fqn].shape, [box.box for _, box in places]):
                return f"{fqn}: {fault}"
        return None


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
                    "files": {
                        file.name: {
                            "nbytes": file.nbytes,
                            "header": file.header_checksum,
                            "boxes": [
                                [b.fqn, b.box.offsets, b.box.sizes, b.begin, b.checksums]
                                for b in file.boxes
                            ],
                        }
                        for file in average.files
                    },
                }
                for name, average in self.averages.items()
            },
        }
        text = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return _sealed(text.encode())

    @classmethod
    def from_bytes(cls, content: bytes) -> "Manifest":
        """Read and validate: the inverse of `to_bytes`.

        Raises:
            CheckpointCorrupt: Says whether it is torn or spoiled, of another version, or invalid.
        """
        body, _, _ = content.rpartition(b',"checksum":"')
        if not body or _sealed(body + b"}") != content:
            raise CheckpointCorrupt(
                f"manifest.json is torn or spoiled: {len(content)} bytes that do not end in their "
                "own checksum"
            )
        try:
            data = json.loads(body + b"}")
            if (data["format"], data["version"]) != (FORMAT_NAME, FORMAT_VERSION):
                raise CheckpointCorrupt(
                    f"manifest.json has format {data['format']!r} version {data['version']!r}; "
                    f"this release reads {FORMAT_NAME!r} version {FORMAT_VERSION}"
                )
            _expect(data["block_bytes"] == BLOCK_BYTES, "block_bytes", data["block_bytes"])
            extra = data["extra_folder"]
            return cls(
                save_id=_text(data["save_id"]),
                averager_id=_text(data["averager_id"]),
                committed_at=_seconds(data["committed_at"]),
                steps=_count(data["steps"]),
                epochs=_epochs(*map(_count, data["epochs"])),
                averages={_text(n): _average_from(a) for n, a in data["averages"].items()},
                extra_folder=None if extra is None else _text(extra, FOLDER_PATTERN),
            )
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
            raise CheckpointCorrupt(f"manifest.json is not valid: {error!r}") from error
        except RecursionError as error:
            raise CheckpointCorrupt("manifest.json is not valid: nested too deeply") from error


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
            text = "has no manifest.json: it is not a checkpoint, or its save was never committed"
        else:
            text = "there is no checkpoint here" if not path.exists() else "is not a folder"
        raise CheckpointNotFound(f"{path}: {text}") from None
    except IsADirectoryError:
        raise CheckpointCorrupt(f"{path}: manifest.json is a folder") from None
    except OSError as error:
        raise CheckpointError(f"{path}: manifest.json cannot be read: {error}") from error
    try:
        return Manifest.from_bytes(content)
    except CheckpointCorrupt as error:
        raise CheckpointCorrupt(f"{path}: {error}") from error


def _sealed(body: bytes) -> bytes:
    return body[:-1] + f',"checksum":"{xxhash.xxh3_128_hexdigest(body)}"}}\n'.encode()


def _average_from(data: Mapping[str, Any]) -> SavedAverage:
    tensors = {
        fqn: SavedTensor(
            _text(fqn),
            tuple(map(_count, tensor["shape"])),
            _text(tensor["dtype"]),
            tuple(map(_text, tensor["aliases"])),
        )
        for fqn, tensor in data["tensors"].items()
    }
    for tensor in tensors.values():
        _expect(tensor.dtype in ITEM_BYTES, "dtype", tensor.dtype)
    _expect(isinstance(data["rule"], dict), "rule", data["rule"])
    _text(json.dumps(data["rule"], ensure_ascii=False))
    return SavedAverage(
        folder=_text(data["folder"], FOLDER_PATTERN),
        rule=data["rule"],
        num_updates=_count(data["num_updates"]),
        statistics_at=None if data["statistics_at"] is None else _count(data["statistics_at"]),
        tensors=tensors,
        files=tuple(_file_from(name, file, tensors) for name, file in data["files"].items()),
    )


def _file_from(name: str, data: Mapping[str, Any], tensors: Mapping[str, SavedTensor]) -> SavedFile:
    nbytes = _count(data["nbytes"])
    return SavedFile(
        name=_text(name, _FILE_PATTERN),
        nbytes=nbytes,
        header_checksum=_text(data["header"]),
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


def _count(value: object) -> int:
    _expect(type(value) is int and value >= 0, "count", value)
    return value  # type: ignore[return-value]  # just proved


def _seconds(value: object) -> float:
    _expect(type(value) in (int, float) and 0 <= value < _YEAR_10000, "time", value)  # type: ignore[operator]
    return float(value)  # type: ignore[arg-type]  # just proved


def _epochs(numerator: int, denominator: int) -> Fraction:
    epochs = Fraction(numerator, denominator)
    _expect(epochs < 2**63, "epochs", epochs)
    return epochs


def _text(value: object, pattern: str | None = None) -> str:
    _expect(type(value) is str and (pattern is None or re.fullmatch(pattern, value)), "text", value)
    value.encode()  # type: ignore[attr-defined]  # half a surrogate pair could not be printed
    return value  # type: ignore[return-value]  # just proved


def _expect(condition: object, what: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{what}: {value!r}")
