"""Folders of checkpoints: which are committed, what dead saves left, what is read, what may go.

While a save is under way its folder holds a marker that lists the folders that it makes and those
that it replaces. A save that died leaves it, and then nothing else than these folders is removed.
The saving process locks the marker, readers lock the manifest (`flock`, shared): where the file
system has such locks, two jobs do not save to one path at once, and what is being read stays until
nobody reads it (what an overwriting save replaces: until the save after that).
"""

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from distavg.checkpoint.files import fsync_path
from distavg.checkpoint.manifest import FOLDER_PATTERN, MANIFEST_NAME, Manifest, read_manifest
from distavg.errors import CheckpointError, CheckpointExists, CheckpointNotFound

__all__ = [
    "check_unmarked",
    "clean",
    "committed",
    "latest",
    "prune",
    "prune_uncommitted",
    "reading",
    "take_marker",
]

logger = logging.getLogger("distavg")

# Averages' names, and so their folders, do not begin with a dot.
_MARKER_NAME = ".distavg-uncommitted.json"
TEMPORARY_PREFIX = f".{MANIFEST_NAME}."
EXPORT_SUFFIX = ".distavg-export"


def latest(root: str | os.PathLike[str]) -> Path | None:
    """The checkpoint in a folder that was committed last, or None. Not collective.

    Looks at the folder's immediate children. Saves that were never committed do not count.
    """
    found = committed(Path(root))
    return found[-1][0] if found else None


def committed(root: Path) -> list[tuple[Path, Manifest]]:
    """The committed checkpoints among a folder's immediate children, the oldest first."""
    paths = root.iterdir() if root.is_dir() else ()
    found = [(path, manifest) for path in paths if (manifest := _manifest_at(path)) is not None]
    return sorted(found, key=lambda each: (each[1].committed_at, each[1].steps))


def _manifest_at(path: Path) -> Manifest | None:
    try:
        return read_manifest(path)
    except CheckpointNotFound:
        return None
    except CheckpointError as error:
        logger.warning("passed over: %s", error)
        return None


@contextmanager
def reading(path: Path) -> Iterator[Manifest]:
    """The manifest of a checkpoint that nobody removes while the body runs.

    Raises:
        CheckpointNotFound: There is no committed checkpoint, or it is being removed.
        CheckpointCorrupt: The manifest is spoiled.
    """
    try:
        file = _lock(path / MANIFEST_NAME, exclusive=False)
    except OSError:
        file = None  # what is wrong, reading it will say
    else:
        if file is None:
            raise CheckpointNotFound(f"{path}: this checkpoint is being removed")
    try:
        yield read_manifest(path)
    finally:
        if file is not None:
            file.close()


@contextmanager
def unless_read(path: Path) -> Iterator[bool]:
    """Whether nobody reads the checkpoint that is at a path, if there is one."""
    try:
        file = _lock(path / MANIFEST_NAME, exclusive=True)
    except FileNotFoundError:
        yield True
        return
    if file is None:
        yield False
    else:
        with file:
            yield True


def take_marker(path: Path, folders: Sequence[str]) -> BinaryIO:
    """Note in a checkpoint's folder which of its folders are not committed, or soon no more.

    Returns:
        The open marker, which other saves to this path respect until it is closed.

    Raises:
        CheckpointExists: Another process has it.
    """
    (path / _MARKER_NAME).open("ab").close()
    marker = _lock(path / _MARKER_NAME, exclusive=True)
    if marker is None:
        raise CheckpointExists(f"{path}: another save to this path, or its removal, is under way")
    try:
        listed = [*_listed(marker.read()), *folders]
        marker.seek(0)
        marker.truncate()
        marker.write(json.dumps(list(dict.fromkeys(listed))).encode())
        marker.flush()
        os.fsync(marker.fileno())
        fsync_path(path)
    except BaseException:
        marker.close()
        raise
    return marker


def check_unmarked(path: Path) -> None:
    """Raise if another save to this path is under way.

    Raises:
        CheckpointExists: It is.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        if (marker := _lock(path / _MARKER_NAME, exclusive=True)) is None:
            raise CheckpointExists(f"{path}: another save to this path is under way")
        marker.close()


def clean(path: Path) -> None:
    """Remove the folders that the marker lists, except those of the committed checkpoint.

    Before a commit these are what a save left when it died, after it what the save replaced.
    """
    try:
        listed = _listed((path / _MARKER_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        kept = set(read_manifest(path).folders)
    except CheckpointNotFound:
        kept = set()
    dead = [path / name for name in listed if name not in kept]
    for folder in dead:
        shutil.rmtree(folder, ignore_errors=True)
    for stale in path.glob(f"{TEMPORARY_PREFIX}*"):
        stale.unlink()
    if not any(folder.exists() for folder in dead):  # or else a later save tries again
        (path / _MARKER_NAME).unlink()
        if not any(path.iterdir()):
            path.rmdir()


def prune(
    root: Path,
    keep: int,
    *,
    averager_id: str | None = None,
    newest: Path | None = None,
    spared: str | None = None,
) -> list[Path]:
    """Of each run keep the newest checkpoints in a folder, and those that are being read.

    Args:
        root: The folder.
        keep: How many.
        averager_id: The run; None for all runs.
        newest: The checkpoint that counts as the newest, whatever time other machines gave.
        spared: The id of a save that stays in any case.

    Returns:
        The checkpoints that were removed.
    """
    runs: dict[str, list[tuple[Path, Manifest]]] = {}
    for path, manifest in committed(root):
        if averager_id in (None, manifest.averager_id) and not path.is_symlink():
            runs.setdefault(manifest.averager_id, []).append((path, manifest))
    removed = []
    for run in runs.values():
        removable = [
            (path, manifest)
            for path, manifest in run
            if manifest.save_id != spared and not (newest is not None and path.samefile(newest))
        ]
        for path, manifest in removable[: max(0, len(run) - keep)]:
            if _remove(path, manifest):
                removed.append(path)
    return removed


def prune_uncommitted(root: Path) -> list[Path]:
    """Remove what saves left that died, in a folder's immediate children.

    Returns:
        The folders that were cleaned. One in which a save is under way is left alone.
    """
    cleaned = []
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if (path / _MARKER_NAME).is_file() and not path.is_symlink():
            with _going_on(path), take_marker(path, []):
                if path.name.endswith(EXPORT_SUFFIX):
                    shutil.rmtree(path)
                else:
                    clean(path)
                cleaned.append(path)
    return cleaned


@contextmanager
def _going_on(path: Path) -> Iterator[None]:
    """What cannot be removed is left, with a warning, for others to be removed all the same."""
    try:
        yield
    except (CheckpointExists, FileNotFoundError):  # somebody else is at it
        pass
    except (CheckpointError, OSError) as error:
        logger.warning("%s could not be removed: %s", path, error)


def _remove(path: Path, manifest: Manifest) -> bool:
    """Remove a checkpoint, unless it is being read or saved to."""
    with _going_on(path):
        held = _lock(path / MANIFEST_NAME, exclusive=True)
        if held is None:
            logger.info("%s is being read, and stays", path)
            return False
        with held:
            if read_manifest(path).save_id != manifest.save_id:
                return False  # it was overwritten in this moment
            with take_marker(path, manifest.folders):  # a crash from here on leaves no orphans
                (path / MANIFEST_NAME).unlink()
                fsync_path(path)
                clean(path)
        return True
    return False


def _lock(path: Path, *, exclusive: bool) -> BinaryIO | None:
    """Open and lock a file without waiting; on a file system without locks, only open it.

    Returns:
        The open file; closing it gives the lock up. None if somebody else's lock excludes it.

    Raises:
        OSError: It cannot be opened.
    """
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    while True:
        file = path.open("r+b" if exclusive else "rb")
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:  # no locks here
            return file
        if _is_at(file, path):
            return file
        file.close()  # it was replaced or removed in this moment


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _listed(content: bytes) -> list[str]:
    """The folders that a marker names; none, if it was torn, which is before any is made."""
    try:
        listed = json.loads(content)
    except (ValueError, RecursionError):
        return []
    names = listed if isinstance(listed, list) else []
    return [name for name in names if type(name) is str and re.fullmatch(FOLDER_PATTERN, name)]
