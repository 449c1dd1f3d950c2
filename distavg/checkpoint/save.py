"""Saving: every rank writes its own shards, and one rename commits them all.

1. Rank 0 checks the target, picks the save id and the folders, makes them, and a file with the id
   in its name. A vote, in which the others learn of them. Who does not see that file does not share
   the folder. A vote.
2. `also=` runs on every rank. A vote. From here on a background save goes on in a thread.
3. Every rank writes and flushes its files, and beside them a record of what lies where. A vote.
4. In an exchange each rank gets the boxes of some tensors, and proves that they cover those exactly
   once. A vote.
5. In another, rank 0 gets size and checksum of each record. It writes the manifest beside its
   place, into that file. A vote.
6. Rank 0 renames the manifest into place: the commit. Then it removes what was replaced. A vote.

On any failure every rank raises, and rank 0 removes what was written. While a save is under way
the target holds a marker (`distavg.checkpoint.folders`): if it dies, the next save to the same path
removes the folders that are not committed, and nothing else.
"""

import json
import logging
import shutil
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from distavg.average import Average
from distavg.checkpoint.cover import prove_cover
from distavg.checkpoint.files import fsync_path, fsync_tree, write_shards
from distavg.checkpoint.folders import (
    TEMPORARY_PREFIX,
    check_unmarked,
    clean,
    prune,
    take_marker,
    unless_read,
)
from distavg.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    SavedAverage,
    SavedRecord,
    SavedTensor,
    read_manifest,
)
from distavg.checkpoint.records import SavedFile, write_record
from distavg.comm import Comm
from distavg.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointExists,
    CheckpointNotFound,
    DistavgError,
)
from distavg.layout import Box
from distavg.shards import ModelShards, check_equal
from distavg.tensors import Shard

logger = logging.getLogger("distavg")

__all__ = [
    "Contents",
    "Save",
    "SaveHandle",
    "SaveRequest",
    "call_also",
    "check_copies",
    "in_background",
]

_EXTRA_NAME = "train"

Also = Callable[[Path], object]


class SaveHandle:
    """A save that has been started; a blocking one is finished when it is returned.

    Attributes:
        path: The checkpoint.
        error: What it failed with; None as long as it has not.
        is_reported: Whether `wait` has raised that on this rank.
    """

    def __init__(self, path: Path, finish: Callable[[], object] | None = None) -> None:
        self.path = path
        self.error: BaseException | None = None
        self.is_reported = False
        self._ended = threading.Event()
        if finish is None:
            self._ended.set()
        else:  # not a daemon: a process that ends waits for it
            threading.Thread(target=self._run, args=(finish,), name="distavg-save").start()

    def _run(self, finish: Callable[[], object]) -> None:
        try:
            finish()
        except BaseException as error:
            self.error = error
            logger.error("saving to %s in the background failed: %s", self.path, error)
        finally:
            self._ended.set()

    def join(self) -> None:
        """Return when the save has ended, well or not."""
        self._ended.wait()

    def wait(self) -> None:
        """Return when the checkpoint is committed. Not collective.

        Raises:
            CheckpointError: The save failed; nothing is left behind.
            RankError: A rank was lost.
        """
        self.join()
        if self.error is not None:
            self.is_reported = True
            raise self.error

    def done(self) -> bool:
        """Whether the save has ended on this rank, well or not."""
        return self._ended.is_set()


# The last background save over each group: two at a time would meet in their messages.
_last: weakref.WeakKeyDictionary[object, SaveHandle] = weakref.WeakKeyDictionary()


def in_background(
    path: Path, request: "SaveRequest", contents: Sequence["Contents"], comm: Comm
) -> SaveHandle:
    """Begin a save, and finish it in a thread, after others over this group. Collective.

    Raises:
        CheckpointExists: There is a checkpoint or something else at the path.
        CheckpointError: It could not be begun.
    """
    if comm.group is not None and comm.group in _last:
        _last[comm.group].join()
    handle = SaveHandle(path, Save(request, contents, comm).finish)
    if comm.group is not None:
        _last[comm.group] = handle
    return handle


@dataclass(frozen=True, slots=True)
class Contents:
    """What is saved of one average.

    Attributes:
        name: The average's.
        rule: Its rule's record.
        num_updates: Its counter.
        statistics_at: The counter when its BatchNorm statistics were measured, if they were.
        tensors: What it holds, whole; the same on every rank.
        shards: What this rank writes.
    """

    name: str
    rule: dict[str, Any]
    num_updates: int
    statistics_at: int | None
    tensors: dict[str, SavedTensor]
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, average: Average, model_shards: ModelShards, *, copy: bool) -> "Contents":
        """An average as it is now.

        Args:
            average: The average.
            model_shards: Its live tensors.
            copy: Whether to copy its memory to the host, so that updates may go on.
        """
        counted = [
            part
            for fqn, held in average.contents(model_shards).items()
            if (fqn in average.dtypes or fqn in average.statistics) and model_shards.is_counted(fqn)
            for part in held
        ]
        if copy:
            counted = [
                replace(shard, tensor=shard.tensor.detach().to("cpu", copy=True))
                for shard in counted
            ]
        tensors = {
            tensor.fqn: SavedTensor(
                tensor.fqn,
                tensor.shape,
                str(average.dtypes.get(tensor.fqn, tensor.dtype)).removeprefix("torch."),
                tensor.aliases,
            )
            for tensor in model_shards.catalogue
            if tensor.is_held or tensor.fqn in average.statistics
        }
        return cls(
            average.name,
            average.rule.record(),
            average.num_updates,
            average.statistics_at,
            tensors,
            tuple(counted),
        )


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """What to save, and how.

    Attributes:
        path: The checkpoint's folder; absolute, since a thread may go on with it.
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


@contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


@dataclass(frozen=True, slots=True)
class _Target:
    """What rank 0 decided: the id and the folders of this save."""

    save_id: str
    folders: dict[str, str]
    extra_folder: str | None


@dataclass(frozen=True, slots=True)
class _Written:
    """What a rank tells rank 0 of what it wrote of an average.

    Attributes:
        record: Of its record file; None if it wrote nothing.
        index: The data file of each tensor, if every box that it wrote is a whole tensor; else
            None.
    """

    record: SavedRecord | None
    index: dict[str, str] | None


class Save:
    """A save under way. Collective to begin and to finish.

    Communicates only small things, over gloo: votes, offsets and sizes of the boxes that were
    written, and to rank 0 some 70 bytes from each rank for each average (where ranks hold whole
    tensors, the names of those as well).

    Args:
        request: What to do.
        contents: The averages.
        comm: The ranks; nothing else may use it until the save is finished.

    Raises:
        CheckpointExists: There is a checkpoint or something else at the path.
        CheckpointError: Anything failed on any rank; names the ranks.
    """

    def __init__(self, request: SaveRequest, contents: Sequence[Contents], comm: Comm) -> None:
        self._request = request
        self._contents = contents
        self._comm = comm
        self._doing = f"saving to {request.path}"
        self._marker: BinaryIO | None = None
        with self._cleaning():
            with comm.together(self._doing) as vote, _as_checkpoint_error(request.path):
                if comm.rank == 0:
                    vote.answer, self._marker = _prepare(request, contents)
            self._target: _Target = vote.answers[0]
            with comm.together(self._doing):
                _check_shared(request.path, self._target)
            if request.also is not None:
                with comm.together(self._doing), _as_checkpoint_error(request.path):
                    folder = request.path / str(self._target.extra_folder)
                    call_also(request.also, folder)
                    fsync_tree(folder)  # here: no other host can flush this one's cache

    def finish(self) -> None:
        """Write everything and commit it."""
        request, comm = self._request, self._comm
        files: dict[str, list[SavedFile]] = {}
        mine: dict[str, _Written] = {}
        with self._cleaning():
            with comm.together(self._doing), _as_checkpoint_error(request.path):
                for each in self._contents:
                    files[each.name], mine[each.name] = _write(
                        request, self._target, each, comm.rank
                    )
            tensors = {each.name: each.tensors for each in self._contents}
            prove_cover(tensors, files, comm, self._doing, _not_whole)
            # Of uneven sizes: a gather would make room for the largest from every rank.
            parts = [mine if rank == 0 else {} for rank in range(comm.size)]
            written = comm.exchange(parts, self._doing)
            with comm.together(self._doing), _as_checkpoint_error(request.path):
                if comm.rank == 0:
                    _write_manifest(request, self._target, self._contents, written)
        try:
            with comm.together(self._doing):
                if comm.rank == 0:
                    _commit(request, self._target)
        finally:
            self._let_go()

    @contextmanager
    def _cleaning(self) -> Iterator[None]:
        """If the body raises, rank 0 removes what was written."""
        try:
            yield
        except BaseException:
            try:
                if self._marker is not None:  # else the folder is not this save's
                    with suppress(OSError):  # what cannot be removed now, the next save removes
                        clean(self._request.path)
            finally:
                self._let_go()
            raise

    def _let_go(self) -> None:
        if self._marker is not None:
            self._marker.close()


def call_also(also: Also, folder: Path) -> None:
    """Call what the user passed as `also=`; whatever it raises is a `CheckpointError`."""
    try:
        also(folder)
    except DistavgError:
        raise
    except Exception as error:
        raise CheckpointError(f"also= raised {type(error).__name__}: {error}") from error


def _prepare(request: SaveRequest, contents: Sequence[Contents]) -> tuple[_Target, BinaryIO]:
    """Check the target and make its folders. Rank 0."""
    path = request.path
    replaces = None
    try:
        replaces = read_manifest(path)
    except CheckpointNotFound:
        if path.exists() and not path.is_dir():
            raise CheckpointExists(f"{path} exists and is not a folder") from None
    except CheckpointCorrupt as error:
        raise CheckpointCorrupt(f"{error}. To save here, remove the folder by hand") from error
    if replaces is not None and not request.overwrite:
        raise CheckpointExists(
            f"{path} holds a checkpoint already (of step {replaces.steps}): save to another path, "
            "or replace it with overwrite=True"
        )
    check_unmarked(path)
    clean(path)
    if replaces is None and path.is_dir() and any(path.iterdir()):
        raise CheckpointExists(
            f"{path} is not empty and is not a checkpoint: save to a path of its own"
        )
    missing = [each for each in (path, *path.absolute().parents) if not each.exists()]
    replaced = replaces.folders if replaces is not None else []
    nbytes = sum(tensor.nbytes for each in contents for tensor in each.tensors.values())
    marker: BinaryIO | None = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        for each in missing:
            fsync_path(each.absolute().parent)
        free_bytes = shutil.disk_usage(path).free
        if free_bytes < nbytes:
            raise CheckpointError(f"{path} needs {nbytes:,} bytes, and {free_bytes:,} are free")
        taken = {MANIFEST_NAME, *(entry.name for entry in path.iterdir())}
        folders = {each.name: _free_name(each.name, taken) for each in contents}
        extra = _free_name(_EXTRA_NAME, taken) if request.also is not None else None
        made = [*folders.values(), *([extra] if extra is not None else [])]
        target = _Target(uuid.uuid4().hex, folders, extra)
        marker = take_marker(path, made + replaced)
        for folder in made:
            (path / folder).mkdir()
        _temporary(path, target).touch()
        fsync_path(path)
    except BaseException as error:
        if isinstance(error, (OSError, CheckpointError)):
            with suppress(OSError):
                clean(path)
            with suppress(OSError):
                path.rmdir()  # which fails, as it should, if there is something in it
        if marker is not None:
            marker.close()
        raise
    return target, marker


def _free_name(name: str, taken: set[str]) -> str:
    count = 0
    candidate = name
    while candidate in taken:
        count += 1
        candidate = f"{name}.{count}"
    taken.add(candidate)
    return candidate


def check_copies(
    averages: Sequence[Average], model_shards: ModelShards, comm: Comm, doing: str
) -> None:
    """Compare the averages that every rank holds whole, of which only the first's are saved.

    Collective: a checksum of each of them.

    Raises:
        ReplicaMismatch: They differ.
    """
    for average in averages:
        copies: dict[str, tuple[tuple[int, ...], list[Tensor]]] = {}
        for shard in average.shards():
            tensor = model_shards.by_name[shard.fqn]
            if tensor.is_copied and not tensor.named.is_buffer:
                copies.setdefault(shard.fqn, (tensor.holders, []))[1].append(shard.tensor)
        check_equal(comm, copies, f"{doing}: average {average.name!r}")


def _check_shared(path: Path, target: _Target) -> None:
    """Whether this machine sees what rank 0 has written: no other save has a file of this name.

    Raises:
        CheckpointError: It does not.
    """
    if not _temporary(path, target).exists():
        raise CheckpointError(
            f"{path} on the machine {socket.gethostname()!r} is not the folder of that name in "
            "which rank 0 has begun the save: save to a file system that all ranks share"
        )


def _write(
    request: SaveRequest, target: _Target, contents: Contents, rank: int
) -> tuple[list[SavedFile], _Written]:
    """Write and flush a rank's files of an average, and their record."""
    folder, tensors = target.folders[contents.name], contents.tensors
    files = write_shards(request.path, folder, rank, contents.shards, target.save_id)
    record = write_record(request.path, folder, rank, tensors, files, target.save_id)
    fsync_path(request.path / folder)
    boxes = [(file, box) for file in files for box in file.boxes]
    are_whole = all(box.box == Box.whole(tensors[box.fqn].shape) for _, box in boxes)
    index = {box.fqn: Path(file.name).name for file, box in boxes} if are_whole else None
    return files, _Written(record, index)


def _not_whole(name: str, fault: str) -> CheckpointError:
    return CheckpointError(f"average {name!r} was not written whole: {fault}")


def _write_manifest(
    request: SaveRequest,
    target: _Target,
    contents: Sequence[Contents],
    written: Sequence[Mapping[str, _Written]],
) -> None:
    """Write the manifest beside its place. Rank 0."""
    saved = {
        each.name: SavedAverage(
            folder=target.folders[each.name],
            rule=each.rule,
            num_updates=each.num_updates,
            statistics_at=each.statistics_at,
            tensors=each.tensors,
            records=tuple(ranks[each.name].record for ranks in written),
        )
        for each in contents
    }
    for name, average in saved.items():
        _write_index(request.path, average, [ranks[name].index for ranks in written])
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
        with unless_read(request.path) as is_unread:
            _temporary(request.path, target).rename(request.path / MANIFEST_NAME)
    except OSError as error:
        with suppress(OSError):
            clean(request.path)
        raise CheckpointError(f"{request.path} could not be committed: {error}") from error
    try:
        fsync_path(request.path)
        if is_unread:
            clean(request.path)
        else:
            logger.info(
                "%s was being read: what it replaced stays until a later save", request.path
            )
        if request.keep is not None:
            prune(
                request.path.absolute().parent,
                request.keep,
                averager_id=request.averager_id,
                newest=request.path,
                spared=request.spared,
            )
    except OSError as error:
        raise CheckpointError(
            f"{request.path} is committed, but what follows a commit failed: {error}"
        ) from error


def _temporary(path: Path, target: _Target) -> Path:
    return path / f"{TEMPORARY_PREFIX}{target.save_id}"


def _write_index(
    root: Path, average: SavedAverage, parts: Sequence[Mapping[str, str] | None]
) -> None:
    """Where every box is a whole tensor, write the index that `transformers` loads."""
    weight_map: dict[str, str] = {}
    for part in parts:
        if part is None:
            return
        weight_map |= part
    index = {"metadata": {"total_size": average.nbytes}, "weight_map": weight_map}
    path = root / average.folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=1), encoding="utf-8")
    fsync_path(path)
    fsync_path(path.parent)
