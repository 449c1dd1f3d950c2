"""Whole tensors in safetensors files as other tools read them, written piece by piece.

The files are laid out beforehand, so every piece goes straight to its place, from whichever rank
has it, and no rank holds a tensor whole. They are written beside their place and renamed into it.
"""

import copy
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distavg.average import Average
from distavg.checkpoint.files import PIECE_BYTES, fsync_path, fsync_tree, start_flush
from distavg.checkpoint.folders import EXPORT_SUFFIX, check_unmarked, take_marker
from distavg.checkpoint.header import check_dtypes, encode_header
from distavg.checkpoint.manifest import SavedTensor
from distavg.comm import Comm
from distavg.errors import CheckpointError, CheckpointExists, ConfigError
from distavg.foreach import as_bytes
from distavg.layout import Box
from distavg.names import unwrapped
from distavg.shards import ModelShards
from distavg.wrappers import class_name

__all__ = [
    "ExportFiles",
    "export_average",
    "export_dtype",
    "export_folder",
    "parse_size",
    "plan_export",
]

_OPEN_FILES = 32
_FLUSH_BYTES = 2**20  # what is worth a word to the disk
INDEX_NAME = "model.safetensors.index.json"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SHORT = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_FLOATS = set(_SHORT.values())


@dataclass(frozen=True, slots=True)
class ExportFiles:
    """Where every tensor of an export goes.

    Attributes:
        tensors: The tensors in their order, in the dtypes that are written.
        headers: Of each file, by name.
        places: The file of each tensor, and where it begins there.
        sizes: Bytes of each file.
    """

    tensors: dict[str, SavedTensor]
    headers: dict[str, bytes]
    places: dict[str, tuple[str, int]]
    sizes: dict[str, int]

    def create(self, folder: Path) -> None:
        """Make the files in their sizes, with headers and an index. One rank.

        Raises:
            OSError: A file cannot be made.
        """
        for name, header in self.headers.items():
            with (folder / name).open("xb") as file:
                file.write(header)
                file.truncate(self.sizes[name])
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in self.tensors.values())},
            "weight_map": {fqn: name for fqn, (name, _) in self.places.items()},
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")

    @contextmanager
    def writing(self, folder: Path) -> Iterator["ExportWriter"]:
        """Write into the files; afterwards they are flushed to the disk."""
        writer = ExportWriter(self, folder)
        try:
            yield writer
            writer.flush()
        finally:
            writer.close()


class ExportWriter:
    """The open files of an export, on one rank."""

    def __init__(self, files: ExportFiles, folder: Path) -> None:
        self._files = files
        self._folder = folder
        self._open: dict[str, int] = {}

    def write(self, fqn: str, box: Box, part: Tensor) -> None:
        """Write a part of a tensor to its place, converted to the export's dtype.

        Raises:
            OSError: It cannot be written.
        """
        tensor = self._files.tensors[fqn]
        name, begin = self._files.places[fqn]
        part = part.detach().to("cpu", getattr(torch, tensor.dtype)).contiguous()
        content = memoryview(as_bytes(part).numpy().data)
        run = _run_length(tensor.shape, box) * tensor.item_bytes
        for number, start in enumerate(_run_starts(tensor.shape, box)):
            view = content[number * run : (number + 1) * run]
            self._write_all(self._descriptor(name), view, begin + start * tensor.item_bytes)

    def _write_all(self, descriptor: int, view: memoryview, offset: int) -> None:
        begin = offset
        while view:
            done = os.pwrite(descriptor, view[:PIECE_BYTES], offset)
            view, offset = view[done:], offset + done
        if offset - begin >= _FLUSH_BYTES:
            start_flush(descriptor, begin, offset)

    def _descriptor(self, name: str) -> int:
        if name not in self._open:
            if len(self._open) == _OPEN_FILES:
                descriptor = self._open.pop(next(iter(self._open)))
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            self._open[name] = os.open(self._folder / name, os.O_WRONLY)
        return self._open[name]

    def flush(self) -> None:
        """Flush what was written to the disk."""
        for descriptor in self._open.values():
            os.fsync(descriptor)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def export_average(
    average: Average,
    model_shards: ModelShards,
    comm: Comm,
    path: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> None:
    """Export an average, and what it does not hold from the model. Collective.

    Each rank writes its part; only votes and a broadcast of the folder's name are communicated.

    Raises:
        CheckpointExists: There is something at the path.
        CheckpointError: Anything failed on any rank; nothing is left behind.
    """
    doing = f"exporting to {path}"
    tensors = {
        tensor.fqn: SavedTensor(
            tensor.fqn,
            tensor.shape,
            str(average.dtypes[tensor.fqn] if tensor.is_held else tensor.dtype).removeprefix(
                "torch."
            ),
            tensor.aliases,
        )
        for tensor in model_shards.catalogue
    }
    parts = [
        part
        for fqn, held in average.contents(model_shards).items()
        if model_shards.is_counted(fqn)
        for part in held
    ]
    folder = Path()
    with ExitStack() as stack:
        with comm.together(doing):
            files = plan_export(tensors, dtype, max_shard_bytes)
            if comm.rank == 0:
                folder = stack.enter_context(export_folder(path))
                files.create(folder)
                _write_config(folder, model_shards, files)
        folder = comm.broadcast(folder, doing)
        with comm.together(doing), _as_checkpoint_error(path), files.writing(folder) as writer:
            for part in parts:
                writer.write(part.fqn, part.box, part.tensor)
        with comm.together(doing):
            stack.close()


def _write_config(folder: Path, model_shards: ModelShards, files: ExportFiles) -> None:
    """Write how a model of transformers is configured, with which `from_pretrained` builds it."""
    if not isinstance(model_shards.model, nn.Module):
        return
    model: Any = unwrapped(model_shards.model)
    if not hasattr(getattr(model, "config", None), "save_pretrained"):
        return
    config = copy.deepcopy(model.config)
    floats = [tensor.dtype for tensor in files.tensors.values() if tensor.dtype in _FLOATS]
    config.dtype = getattr(torch, floats[0]) if floats else None  # or it is loaded rounded
    config.architectures = [class_name(model)]
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


@contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename} was made by rank 0 and is not visible here: all ranks must export "
            "to one shared file system"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def plan_export(
    tensors: Mapping[str, SavedTensor], dtype: torch.dtype | None, max_shard_bytes: int
) -> ExportFiles:
    """Lay whole tensors out in files of at most a size (one tensor may be larger).

    Args:
        tensors: What is exported, in order. Tied names are noted in the header as safetensors'
            `save_model` does, and written once.
        dtype: What floating tensors are converted to; None to keep theirs.
        max_shard_bytes: The most bytes of tensors in a file.

    Raises:
        UnsupportedError: A dtype that safetensors files do not have.
    """
    check_dtypes(tensors.values())
    wanted = None if dtype is None else str(dtype).removeprefix("torch.")
    converted = {
        fqn: replace(tensor, dtype=wanted) if wanted and tensor.dtype in _FLOATS else tensor
        for fqn, tensor in tensors.items()
    }
    groups: list[list[SavedTensor]] = [[]]
    filled = 0
    for tensor in converted.values():
        if groups[-1] and filled + tensor.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    headers, sizes = {}, {}
    places: dict[str, tuple[str, int]] = {}
    for number, group in enumerate(groups, start=1):
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        aliases = {alias: tensor.fqn for tensor in group for alias in tensor.aliases}
        arrays = {tensor.fqn: tensor for tensor in group}
        headers[name], begins = encode_header(arrays, {"format": "pt", **aliases})
        sizes[name] = len(headers[name]) + sum(tensor.nbytes for tensor in group)
        places |= {fqn: (name, begin) for fqn, begin in begins.items()}
    return ExportFiles(converted, headers, places, sizes)


@contextmanager
def export_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the body ends well. One rank.

    What an export that died left is removed by the next one to the same path.

    Raises:
        CheckpointExists: There is something at the path, or another export to it is under way.
        CheckpointError: It cannot be written.
    """
    path = path.resolve()  # a link stays one
    folder = path.with_name(f".{path.name}{EXPORT_SUFFIX}") if path.name else path
    if path.is_mount() or path == Path.cwd():
        raise CheckpointExists(f"{path} cannot be replaced as a whole: export to a folder in it")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointExists(f"{path} exists and is not empty: export to another path")
    try:
        check_unmarked(folder)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        with take_marker(folder, []) as marker:
            try:
                yield folder
                Path(marker.name).unlink()
                fsync_tree(folder)
                folder.rename(path)
                fsync_path(path.parent)
            except BaseException:
                with suppress(OSError):
                    shutil.rmtree(folder)
                raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def parse_size(text: str | int) -> int:
    """Bytes in `"5GB"`, `"500MiB"` or a number.

    Raises:
        ConfigError: It is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", str(text).upper())
    nbytes = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if nbytes < 1:
        raise ConfigError(f"{text!r} is not a size such as '5GB' or '500MiB'")
    return nbytes


def export_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating dtype from `"bf16"`, `"bfloat16"` or itself.

    Raises:
        ConfigError: It is none.
    """
    found = getattr(torch, _SHORT.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if dtype is None:
        return None
    name = str(found).removeprefix("torch.")
    if not isinstance(found, torch.dtype) or name not in _FLOATS:
        raise ConfigError(f"{dtype!r} is none of {', '.join(_SHORT)}")
    return found


def _run_length(shape: tuple[int, ...], box: Box) -> int:
    """Elements of a box that lie one after another in the whole tensor."""
    length = 1
    for size, whole in zip(reversed(box.sizes), reversed(shape), strict=True):
        length *= size
        if size != whole:
            break
    return length


def _run_starts(shape: tuple[int, ...], box: Box) -> Iterator[int]:
    """Where in the whole tensor, counted in elements, each such run begins, in the box's order."""
    if not box.numel:
        return
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    first = sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True))
    outer = len(shape)
    while outer and (outer == len(shape) or box.sizes[outer] == shape[outer]):
        outer -= 1
    for index in itertools.product(*(range(size) for size in box.sizes[:outer])):
        yield first + sum(i * stride for i, stride in zip(index, strides, strict=False))
