"""Who may remove what: locks of readers and of savers, and what is left of the dead."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from checks import error_of, feed, trained
from models import Uneven

import distavg
from distavg import CheckpointExists, CheckpointNotFound
from distavg.checkpoint import folders
from distavg.checkpoint.folders import (
    committed,
    prune,
    prune_uncommitted,
    reading,
    take_marker,
)

MARKER = ".distavg-uncommitted.json"


def names(root: Path) -> set[str]:
    return {each.name for each in root.iterdir()}


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Any]:
    """Three checkpoints of a run, and its averager."""
    model, averager = trained("plain", Uneven)
    for step, name in enumerate("abc", start=3):
        feed(averager, model, [step])
        averager.save(tmp_path / name)
    return tmp_path, averager


def test_what_is_being_read_stays(runs: tuple[Path, Any]) -> None:
    root, averager = runs
    with reading(root / "a") as manifest, reading(root / "a"):
        averager.save(root / "d", keep=2)
        assert names(root) == {"a", "c", "d"}
        assert {each.name for each in (root / "a").iterdir()} == {
            "manifest.json",
            *manifest.folders,
        }
        assert prune(root, 1) == [root / "c"]
    assert prune(root, 1) == [root / "a"]
    assert names(root) == {"d"}


def test_another_process_that_reads_is_respected(runs: tuple[Path, Any]) -> None:
    root, averager = runs
    script = (
        "import sys, pathlib; from distavg.checkpoint.folders import reading\n"
        f"with reading(pathlib.Path({str(root / 'a')!r})):\n"
        "    print('reading', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"reading\n"
        averager.save(root / "d", keep=1)
        assert names(root) == {"a", "d"}
        reader.communicate()
    averager.save(root / "e", keep=1)
    assert names(root) == {"e"}


def test_what_is_being_removed_cannot_be_read(runs: tuple[Path, Any]) -> None:
    root, averager = runs
    with (root / "a" / "manifest.json").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert error_of(averager.load, root / "a") == (
            f"CheckpointNotFound: {root / 'a'}: this checkpoint is being removed"
        )
    averager.load(root / "a")


def test_a_load_reads_under_its_lock(runs: tuple[Path, Any]) -> None:
    root, averager = runs
    removed = []

    def also(folder: Path) -> None:
        removed.extend(prune(root, 1))

    averager.save(root / "d", also=lambda folder: None)
    averager.save(root / "e")
    averager.load(root / "d", also=also)
    assert removed == [root / "a", root / "b", root / "c"]  # and not the one that is being read


def test_two_saves_to_one_path(tmp_path: Path) -> None:
    _, first = trained("plain", Uneven)
    _, second = trained("plain", Uneven)
    texts = []

    def also(folder: Path) -> None:
        texts.append(error_of(second.save, tmp_path / "a", overwrite=True))

    first.save(tmp_path / "a", also=also)
    assert texts == [f"CheckpointExists: {tmp_path / 'a'}: another save to this path is under way"]
    second.load(tmp_path / "a")
    assert names(tmp_path / "a") == {"ema", "swa", "train", "manifest.json"}


def test_a_save_under_way_is_not_cleaned_up(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    cleaned = []
    (tmp_path / "dead" / "ema").mkdir(parents=True)
    (tmp_path / "dead" / MARKER).write_text('["ema"]')
    (tmp_path / "notes").mkdir()

    def also(folder: Path) -> None:
        cleaned.append(prune_uncommitted(tmp_path))

    averager.save(tmp_path / "a", also=also)
    assert cleaned == [[tmp_path / "dead"]]
    assert names(tmp_path) == {"a", "notes"}
    averager.load(tmp_path / "a")


def test_what_a_dead_overwrite_left_is_cleaned_and_the_checkpoint_stays(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    averager.save(tmp_path / "a")
    (tmp_path / "a" / "ema.1").mkdir()
    take_marker(tmp_path / "a", ["ema", "swa", "ema.1"]).close()
    assert prune_uncommitted(tmp_path) == [tmp_path / "a"]
    assert names(tmp_path / "a") == {"ema", "swa", "manifest.json"}
    assert prune_uncommitted(tmp_path) == []
    averager.load(tmp_path / "a")


def test_a_marker_keeps_what_it_listed(tmp_path: Path) -> None:
    take_marker(tmp_path, ["a"]).close()
    with take_marker(tmp_path, ["b", "a"]), pytest.raises(CheckpointExists):
        take_marker(tmp_path, [])
    assert (tmp_path / MARKER).read_text() == '["a", "b"]'


def test_each_run_keeps_its_newest(runs: tuple[Path, Any]) -> None:
    root, _ = runs
    _, other = trained("plain", Uneven)
    for name in "xyz":
        other.save(root / name)
    assert sorted(prune(root, 2)) == [root / "a", root / "x"]
    assert [path.name for path, _ in committed(root)] == ["b", "c", "y", "z"]


def test_on_a_file_system_without_locks_all_works_the_same(runs: tuple[Path, Any]) -> None:
    root, averager = runs
    refusal = OSError(errno.ENOLCK, "No locks available")
    with mock.patch.object(fcntl, "flock", side_effect=refusal):
        averager.save(root / "d", keep=2)
        averager.load(root / "d")
        assert names(root) == {"c", "d"}
        with reading(root / "c"):
            assert prune(root, 1) == [root / "c"]


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="has no manifest"), reading(tmp_path):
        pass
    with pytest.raises(CheckpointNotFound, match="no checkpoint here"), reading(tmp_path / "a"):
        pass
    assert distavg.latest(tmp_path) is None


def test_what_is_read_while_it_is_overwritten_stays_until_the_next_save(tmp_path: Path) -> None:
    model, averager = trained("plain", Uneven)
    averager.save(tmp_path / "a")
    before = names(tmp_path / "a" / "ema")
    with reading(tmp_path / "a") as manifest:
        feed(averager, model, [3])
        averager.save(tmp_path / "a", overwrite=True)
        assert [names(tmp_path / "a" / folder) for folder in manifest.folders] == [before] * 2
    averager.load(tmp_path / "a")
    averager.save(tmp_path / "a", overwrite=True)
    assert not any(each.name.startswith(".") for each in (tmp_path / "a").iterdir())
    assert len(list((tmp_path / "a").iterdir())) == 3


def test_what_cannot_be_removed_does_not_stop_the_rest(
    runs: tuple[Path, Any], caplog: pytest.LogCaptureFixture
) -> None:
    root, averager = runs
    original = folders._lock

    def lock(path: Path, *, exclusive: bool) -> Any:
        if path.parent == root / "a" and exclusive:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, exclusive=exclusive)

    with mock.patch.object(folders, "_lock", lock):
        averager.save(root / "d", keep=1)
    assert names(root) == {"a", "d"}
    assert f"{root / 'a'} could not be removed: " in caplog.text


def test_odd_folders_among_the_dead(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, averager = trained("plain", Uneven)
    averager.save(tmp_path / "spoiled")
    take_marker(tmp_path / "spoiled", ["ema"]).close()
    (tmp_path / "spoiled" / "manifest.json").write_bytes(b"spoiled")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    for path in (outside, tmp_path / "dead", tmp_path / ".out.distavg-export"):
        (path / "ema").mkdir(parents=True)
        (path / MARKER).write_text('["ema"]')
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / MARKER).write_text("[" * 100_000)
    (tmp_path / "link").symlink_to(outside)
    assert prune_uncommitted(tmp_path) == [
        tmp_path / ".out.distavg-export",
        tmp_path / "dead",
        tmp_path / "deep",
    ]
    assert names(tmp_path) == {"spoiled", "link"}
    assert (outside / "ema").is_dir()
    assert (tmp_path / "spoiled" / "ema").is_dir()
    assert f"{tmp_path / 'spoiled'} could not be removed: " in caplog.text


def test_what_was_overwritten_meanwhile_is_not_removed(runs: tuple[Path, Any]) -> None:
    root, averager = runs
    before = committed(root)
    averager.save(root / "a", overwrite=True)
    with mock.patch.object(folders, "committed", return_value=before):
        assert prune(root, 1) == [root / "b"]
    averager.load(root / "a")


def test_latest_says_what_it_passes_over(
    runs: tuple[Path, Any], caplog: pytest.LogCaptureFixture
) -> None:
    root, _ = runs
    (root / "c" / "manifest.json").write_bytes(b"spoiled")
    assert distavg.latest(root) == root / "b"
    assert f"passed over: {root / 'c'}: manifest.json is torn or spoiled" in caplog.text
