"""Shard files: safetensors that PyTorch's distributed reader understands, and verified reads.

The safetensors library writes the files. They are read with `preadv` in whole checksum blocks,
so that what reaches a tensor has been verified; mmap is avoided for the sake of network file
systems.
"""

import json
import math
import os
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors.torch
import torch
import xxhash
from torch import Tensor

from distavg.checkpoint.manifest import BLOCK_BYTES, SavedBox, SavedFile
from distavg.checkpoint.plan import Read, runs
from distavg.errors import CheckpointCorrupt, CheckpointError
from distavg.foreach import as_bytes
from distavg.tensors import Shard

__all__ = ["ShardReader", "fill", "fsync_path", "fsync_tree", "group_boxes", "write_shards"]

# Reads pass through a buffer of this size on the way to their tensors.
BUFFER_BYTES = 32 * BLOCK_BYTES
_SAVE_ID_KEY = "distavg.save_id"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


def group_boxes(shards: Sequence[Shard]) -> list[list[Shard]]:
    """Spread shards over files so that no file holds two boxes of one tensor.

    PyTorch's reader keeps one box per name and file.
    """
    files: list[list[Shard]] = []
    count: dict[str, int] = {}
    for shard in shards:
        index = count.get(shard.fqn, 0)
        count[shard.fqn] = index + 1
        if index == len(files):
            files.append([])
        files[index].append(shard)
    return files


def write_shards(
    root: Path, folder: str, rank: int, shards: Sequence[Shard], save_id: str
) -> list[SavedFile]:
    """Write a rank's shards of one average and return what the manifest says of them.

    Blocks are checksummed while a thread flushes the file to the disk.

    Raises:
        CheckpointError: The file exists already, or cannot be written.
    """
    groups = group_boxes(shards)
    files = []
    for number, group in enumerate(groups, start=1):
        name = f"{folder}/shard-{rank + 1:05d}-model-{number:05d}-of-{len(groups):05d}.safetensors"
        try:
            files.append(_write_file(root / name, name, group, save_id))
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{root / name} cannot be written: {error}") from error
    return files


def _write_file(path: Path, name: str, group: Sequence[Shard], save_id: str) -> SavedFile:
    sharding = {
        shard.fqn: {"saved_offsets": shard.box.offsets, "global_shape": shard.global_shape}
        for shard in group
    }
    metadata = {
        "format": "pt",
        "DCP_VERSION": "1.0",
        "DCP_SHARDING_INFO": json.dumps(sharding),
        _SAVE_ID_KEY: save_id,
    }
    tensors = {shard.fqn: shard.tensor.detach().cpu().contiguous() for shard in group}
    with path.open("xb") as placeholder:  # exclusive, and with the mode that the umask gives
        mode = os.fstat(placeholder.fileno()).st_mode
    safetensors.torch.save_file(tensors, path, metadata)
    path.chmod(mode & 0o777)
    failures: list[OSError] = []
    flush = threading.Thread(target=_flush, args=(path, failures))
    flush.start()
    checksums = {fqn: _block_checksums(tensor) for fqn, tensor in tensors.items()}
    flush.join()
    if failures:
        raise failures[0]
    header, data_start = _read_header(path)
    entries = json.loads(header[8:])
    return SavedFile(
        name=name,
        nbytes=path.stat().st_size,
        header_checksum=xxhash.xxh3_128_hexdigest(header),
        boxes=tuple(
            SavedBox(
                shard.fqn,
                shard.box,
                data_start + entries[shard.fqn]["data_offsets"][0],
                checksums[shard.fqn],
            )
            for shard in group
        ),
    )


def fsync_path(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush everything in a folder to the disk."""
    for parent, _, files in os.walk(folder):
        for entry in [*files, "."]:
            fsync_path(Path(parent, entry))


class ShardReader:
    """An open shard file whose size and header are those that the manifest names.

    Raises:
        CheckpointCorrupt: Missing, torn, another save's, or a spoiled header.
        CheckpointError: It cannot be read, for want of permission or the like.
    """

    def __init__(self, root: Path, file: SavedFile, save_id: str) -> None:
        self._file = file
        path = root / file.name
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise CheckpointCorrupt(f"{path} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        try:
            self._check(path, save_id)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def _check(self, path: Path, save_id: str) -> None:
        nbytes = os.fstat(self._descriptor).st_size
        try:
            header, _ = _read_header(path)
            intact = xxhash.xxh3_128_hexdigest(header) == self._file.header_checksum
        except (OSError, ValueError):
            header, intact = b"", False
        if not intact and (other := _save_id(header)) not in (None, save_id):
            raise CheckpointCorrupt(
                f"{path} belongs to another save: its id is {other}, the manifest's {save_id}"
            )
        if nbytes != self._file.nbytes:
            raise CheckpointCorrupt(
                f"{path} is torn: it has {nbytes} bytes, the manifest says {self._file.nbytes}"
            )
        if not intact:
            raise CheckpointCorrupt(f"{path}: the checksum of its header is wrong")

    def read(self, box: SavedBox, read: Read, buffer: Tensor, *, verify: bool = True) -> None:
        """Read whole blocks of a box into the start of a byte buffer, and verify them.

        Raises:
            CheckpointCorrupt: The file ends early, or a block's checksum is wrong.
        """
        view = self._fill(box, read, buffer)
        if verify and (index := next(self._wrong_blocks(box, read, view), None)) is not None:
            raise CheckpointCorrupt(self._fault(box, index, index))

    def faults(self, box: SavedBox, read: Read, buffer: Tensor) -> Iterator[str]:
        """Everything that is wrong with whole blocks of a box, read into a byte buffer."""
        try:
            wrong = list(self._wrong_blocks(box, read, self._fill(box, read, buffer)))
        except CheckpointCorrupt as error:
            yield str(error)
            return
        for first, stop in runs(wrong):
            yield self._fault(box, first, stop - 1)

    def _fill(self, box: SavedBox, read: Read, buffer: Tensor) -> memoryview:
        view = _bytes_of(buffer)[: read.nbytes]
        done = 0
        while done < read.nbytes:
            try:
                got = os.preadv(self._descriptor, [view[done:]], box.begin + read.begin + done)
            except OSError as error:
                raise CheckpointError(f"{self._file.name} cannot be read: {error}") from error
            if got == 0:
                raise CheckpointCorrupt(f"{self._file.name} is torn: it ended while it was read")
            done += got
        return view

    def _wrong_blocks(self, box: SavedBox, read: Read, view: memoryview) -> Iterator[int]:
        for index, found in enumerate(_digests(view), start=read.first_block):
            if found != box.checksums[16 * index : 16 * (index + 1)]:
                yield index

    def _fault(self, box: SavedBox, first: int, last: int) -> str:
        what = (
            f"checksum of block {first} is"
            if first == last
            else (f"checksums of the blocks {first} to {last} are")
        )
        return (
            f"{self._file.name}: {box.fqn}: the {what} wrong (bytes "
            f"{box.begin + first * BLOCK_BYTES} and following of the file)"
        )


def fill(
    reader: ShardReader,
    box: SavedBox,
    read: Read,
    dtype: torch.dtype,
    target: Tensor,
    buffer: Tensor,
    *,
    verify: bool = True,
) -> None:
    """Read a part of a box to its place, straight or by way of a byte buffer, and verify it.

    Raises:
        CheckpointCorrupt: The file ends early, or a block's checksum is wrong.
    """
    if read.direct is None:
        reader.read(box, read, buffer, verify=verify)
        items = buffer[: read.nbytes].view(dtype)
        for copy in read.copies:
            source = items[copy.start : copy.start + math.prod(copy.sizes)].view(copy.sizes)
            target[copy.target.slices()].copy_(source[copy.source.slices()])
        return
    place = target.view(-1)[read.direct : read.direct + read.nbytes // dtype.itemsize]
    if place.dtype == dtype and place.device.type == "cpu":
        reader.read(box, read, as_bytes(place), verify=verify)
    else:
        reader.read(box, read, buffer, verify=verify)
        place.copy_(buffer[: read.nbytes].view(dtype))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor."""
    return as_bytes(tensor).numpy().data


def _flush(path: Path, failures: list[OSError]) -> None:
    try:
        fsync_path(path)
    except OSError as error:
        failures.append(error)


def _block_checksums(tensor: Tensor) -> str:
    return "".join(_digests(_bytes_of(tensor)))


def _digests(data: memoryview) -> Iterator[str]:
    for start in range(0, len(data), BLOCK_BYTES):
        yield xxhash.xxh3_64_hexdigest(data[start : start + BLOCK_BYTES])


def _read_header(path: Path) -> tuple[bytes, int]:
    """The header with its length prefix, and where the data begins."""
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError("no header")
        (length,) = struct.unpack("<Q", prefix)
        if length > _MAX_HEADER_BYTES:
            raise ValueError("absurd header length")
        return prefix + file.read(length), 8 + length


def _save_id(header: bytes) -> str | None:
    try:
        metadata: Mapping[str, Any] = json.loads(header[8:])["__metadata__"]
        return str(metadata[_SAVE_ID_KEY])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
