"""Shard files: safetensors that PyTorch's distributed reader understands, and verified reads.

They are written from the tensors' memory and read with `preadv` straight into it, in whole checksum
blocks that are verified on the way; without verification, only what is wanted. mmap is avoided for
the sake of network file systems.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from torch import Tensor

from distavg.checkpoint.header import encode_header, read_header
from distavg.checkpoint.manifest import BLOCK_BYTES, SavedTensor
from distavg.checkpoint.plan import Read, runs
from distavg.checkpoint.records import HASH_DIGITS, SavedBox, SavedFile, shard_name
from distavg.errors import CheckpointCorrupt, CheckpointError
from distavg.foreach import as_bytes
from distavg.tensors import Shard

__all__ = [
    "ShardReader",
    "Target",
    "fsync_path",
    "fsync_tree",
    "group_boxes",
    "start_flush",
    "write_shards",
]

# Reads pass through a buffer of this size on the way to their tensors.
BUFFER_BYTES = 32 * BLOCK_BYTES
# Data is checksummed in pieces that stay in a core's L2 cache between the copy and the checksum. As
# it is written so, Linux does not hold up the writer: it was seen to do that with 16 MiB at a time.
PIECE_BYTES = 2 * BLOCK_BYTES
# The disk is told to begin whenever so much was written: a save then takes a fifth less time, and
# does not meet the limit at which Linux holds up whoever writes.
_FLOW_BYTES = 2**25
_SAVE_ID_KEY = "distavg.save_id"


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
    """Write a rank's shards of one average and return what its record says of them.

    Raises:
        CheckpointError: The file exists already, or cannot be written.
        UnsupportedError: A tensor's name, or their number, is more than the format has.
    """
    groups = group_boxes(shards)
    files = []
    for number, group in enumerate(groups, start=1):
        shard = shard_name(folder, rank)
        name = f"{shard}-model-{number:05d}-of-{len(groups):05d}.safetensors"
        try:
            files.append(_write_file(root / name, name, group, save_id))
        except OSError as error:
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
    shards = {shard.fqn: shard for shard in group}
    arrays = {
        fqn: SavedTensor(fqn, shard.box.sizes, str(shard.tensor.dtype).removeprefix("torch."), ())
        for fqn, shard in shards.items()
    }
    header, begins = encode_header(arrays, metadata)
    boxes = []
    flowing, end = 0, len(header)
    with path.open("xb", buffering=0) as file:
        _write_all(file, memoryview(header))
        for fqn, begin in begins.items():
            digests: list[str] = []
            for piece in _host_pieces(shards[fqn].tensor):
                _write_all(file, piece)
                digests += _digests(piece)  # at once: it is in the cache now
                end += len(piece)
                if end - flowing >= _FLOW_BYTES:
                    start_flush(file.fileno(), flowing, end)
                    flowing = end
            boxes.append(SavedBox(fqn, shards[fqn].box, begin, "".join(digests)))
        os.fsync(file.fileno())
    return SavedFile(name, end, xxhash.xxh3_128_hexdigest(header), tuple(boxes))


def _write_all(file: FileIO, view: memoryview) -> None:
    while view:
        view = view[file.write(view) :]


def start_flush(descriptor: int, begin: int, end: int) -> None:
    """Let the disk begin with these bytes, so that `fsync` does not wait for all of them.

    Linux starts to write what it is told will not be needed again, and forgets of it what the disk
    has already; elsewhere nothing happens.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # it was an advice
            os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)


def _host_pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, some whole blocks at a time, by way of host memory."""
    for part in torch.split(as_bytes(tensor.detach().contiguous()), BUFFER_BYTES):
        view = _bytes_of(part.cpu())
        for start in range(0, len(view), PIECE_BYTES):
            yield view[start : start + PIECE_BYTES]


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
    """An open shard file whose size and header are those that its record names.

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
            header = read_header(path)
            intact = xxhash.xxh3_128_hexdigest(header) == self._file.header_checksum
        except (OSError, ValueError):
            header, intact = b"", False
        if not intact and (other := _save_id(header)) not in (None, save_id):
            raise CheckpointCorrupt(
                f"{path} belongs to another save: its id is {other}, the manifest's {save_id}"
            )
        if nbytes != self._file.nbytes:
            raise CheckpointCorrupt(
                f"{path} is torn: it has {nbytes} bytes, its record says {self._file.nbytes}"
            )
        if not intact:
            raise CheckpointCorrupt(f"{path}: the checksum of its header is wrong")

    def read(self, box: SavedBox, read: Read, memory: memoryview, *, verify: bool = True) -> None:
        """Read a part of a box to the start of some memory; to verify it, it must be whole blocks.

        Raises:
            CheckpointCorrupt: The file ends early, or a block's checksum is wrong.
        """
        if len(memory) < read.nbytes:
            raise ValueError(f"{read.nbytes} bytes do not fit in {len(memory)}")
        if not verify:
            self._fill(memory[: read.nbytes], box.begin + read.begin)
        elif (index := next(self._wrong_blocks(box, read, memory), None)) is not None:
            raise CheckpointCorrupt(self._fault(box, index, index))

    def faults(self, box: SavedBox, read: Read, buffer: Tensor) -> Iterator[str]:
        """Everything that is wrong with whole blocks of a box, read into a byte buffer."""
        try:
            wrong = list(self._wrong_blocks(box, read, _bytes_of(buffer)))
        except CheckpointCorrupt as error:
            yield str(error)
            return
        for first, stop in runs(wrong):
            yield self._fault(box, first, stop - 1)

    def _wrong_blocks(self, box: SavedBox, read: Read, memory: memoryview) -> Iterator[int]:
        """Read, and compare each piece while it is in the cache."""
        index = read.first_block
        for start in range(0, read.nbytes, PIECE_BYTES):
            piece = memory[start : min(start + PIECE_BYTES, read.nbytes)]
            self._fill(piece, box.begin + read.begin + start)
            for found in _digests(piece):
                if found != box.checksums[HASH_DIGITS * index : HASH_DIGITS * (index + 1)]:
                    yield index
                index += 1

    def _fill(self, view: memoryview, offset: int) -> None:
        while view:
            try:
                done = os.preadv(self._descriptor, [view], offset)
            except OSError as error:
                raise CheckpointError(f"{self._file.name} cannot be read: {error}") from error
            if done == 0:
                raise CheckpointCorrupt(f"{self._file.name} is torn: it ended while it was read")
            view, offset = view[done:], offset + done

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


class Target:
    """A tensor that is filled from files.

    Args:
        tensor: On any device.
        dtype: Of what the files hold; it is converted if the tensor has another.
    """

    def __init__(self, tensor: Tensor, dtype: torch.dtype) -> None:
        self._tensor = tensor
        self._dtype = dtype
        self.is_flat = tensor.is_contiguous()
        is_same = tensor.dtype == dtype and tensor.device.type == "cpu"
        self._memory = _bytes_of(tensor) if self.is_flat and is_same else None

    def fill(
        self, reader: ShardReader, box: SavedBox, read: Read, buffer: Tensor, *, verify: bool = True
    ) -> None:
        """Read a part of a box to its place, by way of a byte buffer where need be, and verify it.

        Raises:
            CheckpointCorrupt: The file ends early, or a block's checksum is wrong.
        """
        straight, item_bytes = read.straight, self._dtype.itemsize
        if straight is None:
            reader.read(box, read, _bytes_of(buffer), verify=verify)
            items = buffer[: read.nbytes].view(self._dtype)
            for copy in read.copies:
                source = items[copy.start : copy.start + math.prod(copy.sizes)].view(copy.sizes)
                self._tensor[copy.target.slices()].copy_(source[copy.source.slices()])
            return
        if not verify:  # whole blocks are for the checksums
            read = read.narrowed(item_bytes)
        if self._memory is not None and read.nbytes == straight.numel * item_bytes:
            reader.read(box, read, self._memory[straight.place * item_bytes :], verify=verify)
            return
        for part, (skip, numel, place) in read.split(buffer.nbytes, item_bytes):
            reader.read(box, part, _bytes_of(buffer), verify=verify)
            items = buffer[: part.nbytes].view(self._dtype)[skip : skip + numel]
            self._tensor.view(-1)[place : place + numel].copy_(items)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor."""
    return as_bytes(tensor).numpy().data


def _digests(data: memoryview) -> Iterator[str]:
    for start in range(0, len(data), BLOCK_BYTES):
        yield xxhash.xxh3_64_hexdigest(data[start : start + BLOCK_BYTES])


def _save_id(header: bytes) -> str | None:
    try:
        metadata: Mapping[str, Any] = json.loads(header[8:])["__metadata__"]
        return str(metadata[_SAVE_ID_KEY])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
