"""Saving: every rank writes its own shards, and one rename commits them all.

1. Rank 0 checks the target, picks the save id and the folders, makes them, tells the others.
2. Every rank writes and flushes its files. A vote.
3. `also=` runs on every rank. A vote.
4. Rank 0 gathers what was written, proves that every tensor is covered exactly once, and writes
   the manifest beside its place. A vote.
5. Rank 0 renames the manifest into place: the commit. Then it removes what was replaced. A vote.

On any failure every rank raises, and rank 0 removes what was written. While a save is under way
the target holds a marker that lists its folders and those that it replaces: a save that died leaves
it, and the next save to the same path removes the folders that are not committed, and nothing else.
"""

import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

from torch import Tensor

from distavg.average import Average
from distavg.checkpoint.files import fsync_path, write_shards
from distavg.checkpoint.manifest import (
    FOLDER_PATTERN,
    MANIFEST_NAME,
    Manifest,
    SavedAverage,
    SavedFile,
    SavedTensor,
    read_manifest,
)
from distavg.comm import Comm
from distavg.errors import CheckpointError, CheckpointExists, CheckpointNotFound, DistavgError
from distavg.layout import Box
from distavg.shards import ModelShards, check_equal

__all__ = ["SaveHandle", "SaveRequest", "committed", "latest", "save"]

# Averages' names, and so their folders, do not begin with a dot.
_MARKER_NAME = ".distavg-uncommitted.json"
_TEMPORARY_PREFIX = f".{MANIFEST_NAME}."
_EXTRA_NAME = "train"

Also = Callable[[Path], object]


@dataclass(frozen=True, slots=True)
class SaveHandle:
    """A save that has been started; a blocking one is finished when it is returned.

    Attributes:
        path: The checkpoint.
    """

    path: Path

    def wait(self) -> None:
        """Return when the checkpoint is committed."""

    def done(self) -> bool:
        """Whether the checkpoint is committed."""
        return True


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """What to save, and how.

    Attributes:
        path: The checkpoint's folder.
        averager_id: See `Manifest`.
        steps: See `Manifest`.
        epochs: See `Manifest`.
        overwrite: Whether a committed checkpoint at the path may be replaced.
        keep: After the commit, keep this many newest checkpoints of this run beside it.
        also: Called on every rank with a folder that becomes visible with the commit.
        spared: The save that the run went on from; `keep` does not remove it.
    """

    path: Path
    averager_id: str
    steps: int
    epochs: Fraction
    overwrite: bool
    keep: int | None
    also: Also | None
    spared: str | None


@dataclass(frozen=True, slots=True)
class _Target:
    """What rank 0 decided: the id and the folders of this save."""

    save_id: str
    folders: dict[str, str]
    extra_folder: str | None


@contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def save(
    request: SaveRequest, averages: Sequence[Average], model_shards: ModelShards, comm: Comm
) -> None:
    """Write a checkpoint. Collective; see the module for the protocol.

    Communicates only small records, over gloo: a broadcast, votes, and a gather to rank 0 of the
    file records (about 16 bytes for every 256 KiB of data).

    Raises:
        CheckpointExists: There is a checkpoint or something else at the path.
        CheckpointError: Anything failed on any rank; names the ranks.
        ReplicaMismatch: Averages that every rank holds whole differ between ranks.
    """
    doing = f"saving to {request.path}"
    prepared: _Target | None = None
    with comm.together(doing), _as_checkpoint_error(request.path):
        if comm.rank == 0:
            nbytes = sum(
                math.prod(tensor.shape) * average.dtypes[tensor.fqn].itemsize
                for average in averages
                for tensor in model_shards.catalogue
                if tensor.is_held
            )
            prepared = _prepare(request, [average.name for average in averages], nbytes)
    target = cast(_Target, comm.broadcast(prepared, doing))
    try:
        records: dict[str, list[SavedFile]] = {}
        _check_copies(averages, model_shards, comm, doing)
        with comm.together(doing), _as_checkpoint_error(request.path):
            for average in averages:
                records[average.name] = _write(request, target, average, model_shards, comm)
        if request.also is not None:
            with comm.together(doing), _as_checkpoint_error(request.path):
                folder = request.path / str(target.extra_folder)
                call_also(request.also, folder)
                _fsync_tree(folder)  # here, because no other host can flush this one's cache
        gathered = comm.gather_to_first(records, doing)
        with comm.together(doing), _as_checkpoint_error(request.path):
            if gathered is not None:
                _write_manifest(request, target, averages, model_shards, gathered)
    except BaseException:
        if comm.rank == 0:
            with suppress(OSError):  # what cannot be removed now, the next save will remove
                _clean(request.path)
        raise
    with comm.together(doing):
        if comm.rank == 0:
            _commit(request, target)


def call_also(also: Also, folder: Path) -> None:
    """Call what the user passed as `also=`; whatever it raises is a `CheckpointError`."""
    try:
        also(folder)
    except DistavgError:
        raise
    except Exception as error:
        raise CheckpointError(f"also= raised {type(error).__name__}: {error}") from error


def latest(root: str | os.PathLike[str]) -> Path | None:
    """The checkpoint in a folder that was committed last, or None. Not collective.

    Looks at the folder's immediate children. Saves that were never committed do not count.
    """
    found = committed(Path(root))
    return found[-1][0] if found else None


def committed(root: Path) -> list[tuple[Path, Manifest]]:
    """The committed checkpoints among a folder's immediate children, the oldest first."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        with suppress(CheckpointError):
            found.append((path, read_manifest(path)))
    return sorted(found, key=lambda each: (each[1].committed_at, each[1].steps))


def _prepare(request: SaveRequest, names: Sequence[str], nbytes: int) -> _Target:
    """Check the target and make its folders. Rank 0."""
    path = request.path
    replaces = None
    try:
        replaces = read_manifest(path)
    except CheckpointNotFound:
        if path.exists() and not path.is_dir():
            raise CheckpointExists(f"{path} exists and is not a folder") from None
    if replaces is not None and not request.overwrite:
        raise CheckpointExists(
            f"{path} holds a checkpoint already (of step {replaces.steps}): save to another path, "
            "or replace it with overwrite=True"
        )
    _clean(path)
    if replaces is None and path.is_dir() and any(path.iterdir()):
        raise CheckpointExists(
            f"{path} is not empty and is not a checkpoint: save to a path of its own"
        )
    missing = [each for each in (path, *path.absolute().parents) if not each.exists()]
    replaced = replaces.folders if replaces is not None else []
    try:
        path.mkdir(parents=True, exist_ok=True)
        for each in missing:
            fsync_path(each.absolute().parent)
        free_bytes = shutil.disk_usage(path).free
        if free_bytes < nbytes:
            raise CheckpointError(f"{path} needs {nbytes:,} bytes, and {free_bytes:,} are free")
        taken = {MANIFEST_NAME, *(entry.name for entry in path.iterdir())}
        folders = {name: _free_name(name, taken) for name in names}
        extra = _free_name(_EXTRA_NAME, taken) if request.also is not None else None
        made = [*folders.values(), *([extra] if extra is not None else [])]
        _write_marker(path, made + replaced)
        for folder in made:
            (path / folder).mkdir()
        fsync_path(path)
    except (OSError, CheckpointError):
        with suppress(OSError):
            _clean(path)
        with suppress(OSError):
            path.rmdir()  # which fails, as it should, if there is something in it
        raise
    return _Target(uuid.uuid4().hex, folders, extra)


def _free_name(name: str, taken: set[str]) -> str:
    count = 0
    candidate = name
    while candidate in taken:
        count += 1
        candidate = f"{name}.{count}"
    taken.add(candidate)
    return candidate


def _check_copies(
    averages: Sequence[Average], model_shards: ModelShards, comm: Comm, doing: str
) -> None:
    """Compare the averages that every rank holds whole, of which only the first's are saved."""
    for average in averages:
        copies: dict[str, tuple[tuple[int, ...], list[Tensor]]] = {}
        for shard in average.shards():
            tensor = model_shards.by_name[shard.fqn]
            if tensor.is_copied and not tensor.named.is_buffer:
                copies.setdefault(shard.fqn, (tensor.holders, []))[1].append(shard.tensor)
        check_equal(comm, copies, f"{doing}: average {average.name!r}")


def _write(
    request: SaveRequest, target: _Target, average: Average, model_shards: ModelShards, comm: Comm
) -> list[SavedFile]:
    folder = target.folders[average.name]
    if not (request.path / folder).is_dir():
        raise CheckpointError(
            f"{request.path / folder} was made by rank 0 and is not visible here: all ranks must "
            "save to one shared file system"
        )
    counted = [shard for shard in average.shards() if model_shards.is_counted(shard.fqn)]
    files = write_shards(request.path, folder, comm.rank, counted, target.save_id)
    fsync_path(request.path / folder)
    return files


def _write_manifest(
    request: SaveRequest,
    target: _Target,
    averages: Sequence[Average],
    model_shards: ModelShards,
    gathered: Sequence[Mapping[str, Sequence[SavedFile]]],
) -> None:
    """Prove the cover and write the manifest beside its place. Rank 0."""
    saved = {
        average.name: _saved_average(
            average,
            target.folders[average.name],
            model_shards,
            tuple(file for records in gathered for file in records[average.name]),
        )
        for average in averages
    }
    for name, average in saved.items():
        if fault := average.fault():
            raise CheckpointError(f"average {name!r} was not written whole: {fault}")
        _write_index(request.path, average)
    manifest = Manifest(
        save_id=target.save_id,
        averager_id=request.averager_id,
        committed_at=time.time(),
        steps=request.steps,
        epochs=request.epochs,
        averages=saved,
        extra_folder=target.extra_folder,
    )
    content = manifest.to_bytes()
    Manifest.from_bytes(content)  # what cannot be read back must not replace what can
    temporary = _temporary(request.path, target)
    temporary.write_bytes(content)
    fsync_path(temporary)


def _commit(request: SaveRequest, target: _Target) -> None:
    """Rename the manifest into place, and tidy up. Rank 0."""
    try:
        _temporary(request.path, target).rename(request.path / MANIFEST_NAME)
    except OSError as error:
        with suppress(OSError):
            _clean(request.path)
        raise CheckpointError(f"{request.path} could not be committed: {error}") from error
    try:
        fsync_path(request.path)
        _clean(request.path)
        if request.keep is not None:
            _prune(request, request.keep)
    except OSError as error:
        raise CheckpointError(
            f"{request.path} is committed, but what follows a commit failed: {error}"
        ) from error


def _temporary(path: Path, target: _Target) -> Path:
    return path / f"{_TEMPORARY_PREFIX}{target.save_id}"


def _fsync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for entry in [*files, "."]:
            fsync_path(Path(parent, entry))


def _saved_average(
    average: Average, folder: str, model_shards: ModelShards, files: tuple[SavedFile, ...]
) -> SavedAverage:
    return SavedAverage(
        folder=folder,
        rule=average.rule.record(),
        num_updates=average.num_updates,
        tensors={
            tensor.fqn: SavedTensor(
                tensor.fqn,
                tensor.shape,
                str(average.dtypes[tensor.fqn]).removeprefix("torch."),
                tensor.aliases,
            )
            for tensor in model_shards.catalogue
            if tensor.is_held
        },
        files=files,
    )


def _write_index(root: Path, average: SavedAverage) -> None:
    """Where every box is a whole tensor, write the index that `transformers` loads."""
    boxes = [(file, box) for file in average.files for box in file.boxes]
    if any(box.box != Box.whole(average.tensors[box.fqn].shape) for _, box in boxes):
        return
    index = {
        "metadata": {"total_size": average.nbytes},
        "weight_map": {box.fqn: Path(file.name).name for file, box in boxes},
    }
    path = root / average.folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=1), encoding="utf-8")
    fsync_path(path)
    fsync_path(path.parent)


def _clean(path: Path) -> None:
    """Remove the folders that the marker lists, except those of the committed checkpoint.

    Before a commit these are what a save left when it died, after it what the save replaced.
    """
    try:
        listed = json.loads((path / _MARKER_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return
    except ValueError:
        listed = []  # the marker itself was torn, before any folder was made
    listed = listed if isinstance(listed, list) else []
    try:
        kept = set(read_manifest(path).folders)
    except CheckpointNotFound:
        kept = set()
    names = [name for name in listed if type(name) is str and re.fullmatch(FOLDER_PATTERN, name)]
    dead = [path / name for name in names if name not in kept]
    for folder in dead:
        shutil.rmtree(folder, ignore_errors=True)
    for stale in path.glob(f"{_TEMPORARY_PREFIX}*"):
        stale.unlink()
    if not any(folder.exists() for folder in dead):  # or else a later save tries again
        (path / _MARKER_NAME).unlink()
        if not any(path.iterdir()):
            path.rmdir()


def _prune(request: SaveRequest, keep: int) -> None:
    """Keep the newest checkpoints of this run in the target's parent folder.

    The one just saved counts as the newest, whatever time the clocks of other machines gave.
    """
    run = [
        (path, manifest)
        for path, manifest in committed(request.path.absolute().parent)
        if manifest.averager_id == request.averager_id and not path.is_symlink()
    ]
    removable = [
        (path, manifest)
        for path, manifest in run
        if manifest.save_id != request.spared and not path.samefile(request.path)
    ]
    for path, manifest in removable[: max(0, len(run) - keep)]:
        _write_marker(path, manifest.folders)  # a crash from here on leaves no orphans
        (path / MANIFEST_NAME).unlink()
        fsync_path(path)
        _clean(path)


def _write_marker(path: Path, folders: Sequence[str]) -> None:
    marker = path / _MARKER_NAME
    marker.write_text(json.dumps(folders), encoding="utf-8")
    fsync_path(marker)
    fsync_path(path)
