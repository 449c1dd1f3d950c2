"""Saving: whole or invisible, whatever fails, on whichever rank, at whichever instant."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checks import RULES, differences, error_of, feed, saved_files, torch_average, trained
from models import Awkward, Uneven, build, set_weights, weights_at
from ranks import run_ranks
from safetensors import safe_open
from torch import Tensor, nn

import distavg
from distavg import Averager
from distavg.checkpoint import folders
from distavg.checkpoint.files import write_shards
from distavg.checkpoint.manifest import read_manifest
from distavg.checkpoint.read import verify_checkpoint
from distavg.checkpoint.records import SavedFile, uncovered
from distavg.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointExists,
    CheckpointNotFound,
    ConfigError,
)
from distavg.layout import Box

MARKER = ".distavg-uncommitted.json"
LIVE_SEED = 99


def tree(root: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content, None for a folder."""
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes()
        for path in sorted(root.rglob("*"))
    }


def trainable(cls: type[nn.Module] = Uneven) -> list[str]:
    return [name for name, p in cls().named_parameters() if p.requires_grad]


def values_in(path: Path) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds of each average, read by one process into a plain model."""
    averager = Averager(build("plain", Uneven, seed=LIVE_SEED), RULES)
    averager.load(path)
    whole = {rule: averager.full_state_dict(rule) for rule in RULES}
    return {rule: {name: whole[rule][name] for name in trainable()} for rule in RULES}


def expected_after(steps: Iterable[int]) -> dict[str, dict[str, Tensor]]:
    whole = {rule: torch_average(Uneven, rule, steps) for rule in RULES}
    return {rule: {name: whole[rule][name] for name in trainable()} for rule in RULES}


def holds(path: Path, steps: Iterable[int]) -> bool:
    """Whether a checkpoint holds, bit for bit, the averages after these steps."""
    found, expected = values_in(path), expected_after(steps)
    return all(differences(found[rule], expected[rule]) == [] for rule in RULES)


def write_note(folder: Path) -> None:
    """An `also=` that leaves a file of each rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    (folder / f"note-{rank}").write_text("model and optimizer")


# --------------------------------------------------------------------------- one good checkpoint


def test_what_lies_where(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    path = tmp_path / "runs" / "7" / "epoch-9"
    handle = averager.save(str(path), also=write_note)
    assert handle.path == path
    assert handle.done()
    handle.wait()
    shard = "shard-00001-model-00001-of-00001.safetensors"
    index = "model.safetensors.index.json"
    assert sorted(tree(path)) == [
        "ema",
        f"ema/{index}",
        f"ema/{shard}",
        "ema/shard-00001.json",
        "manifest.json",
        "swa",
        f"swa/{index}",
        f"swa/{shard}",
        "swa/shard-00001.json",
        "train",
        "train/note-0",
    ]
    manifest = read_manifest(path)
    assert manifest.steps == averager.step_count == 3
    assert {n: a.num_updates for n, a in manifest.averages.items()} == {"ema": 3, "swa": 3}
    assert manifest.averages["ema"].rule == RULES["ema"].record()
    assert manifest.averages["ema"].tensors["embed.weight"].aliases == ("head.weight",)
    assert sorted(manifest.averages["ema"].tensors) == sorted(trainable())
    assert holds(path, range(3))


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    averager.save(tmp_path)
    assert holds(tmp_path, range(3))


def test_before_the_first_update_the_live_weights_are_saved(tmp_path: Path) -> None:
    model, averager = trained("plain", Uneven, ())
    set_weights(model, weights_at(model, 5))
    averager.save(tmp_path / "a")
    assert differences(values_in(tmp_path / "a")["ema"], weights_at(Uneven(), LIVE_SEED)) == []
    assert read_manifest(tmp_path / "a").averages["ema"].num_updates == 0
    folder = tmp_path / "a" / "ema"
    with safe_open(folder / "shard-00001-model-00001-of-00001.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("one"), weights_at(model, 5)["one"])


def test_saving_inside_applied_saves_the_average(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    with averager.applied("ema"):
        averager.save(tmp_path / "inside")
        assert error_of(averager.save, tmp_path / "also", also=write_note) == (
            "StateError: save(also=...) inside applied('ema') would save the average as the "
            "model's weights: save after the context"
        )
    assert holds(tmp_path / "inside", range(3))
    assert not (tmp_path / "also").exists()


def test_the_index_makes_a_whole_average_loadable(tmp_path: Path) -> None:
    """As `transformers` does: the index says which file holds which name."""
    _, averager = trained("plain", Uneven)
    averager.save(tmp_path / "a")
    folder = tmp_path / "a" / "ema"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    expected = expected_after(range(3))["ema"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    found = {}
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "pt") as opened:
            found[name] = opened.get_tensor(name)
    assert differences(found, expected) == []


def test_averages_may_have_any_name_that_is_allowed(tmp_path: Path) -> None:
    names = ["manifest.json", "manifest.json.5", "train", "a.b-c_d", "manifest", "x" * 100]
    model = build("plain", Uneven)
    averager = Averager(model, {name: distavg.EMA(0.9) for name in names})
    feed(averager, model, range(3))
    for overwrite in (False, True, True):
        averager.save(tmp_path / "a", overwrite=overwrite, also=write_note)
    manifest = read_manifest(tmp_path / "a")
    assert set(manifest.averages) == set(names)
    assert len(set(manifest.folders)) == len(names) + 1
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "manifest.json",
        *manifest.folders,
    }
    other = Averager(build("plain", Uneven, seed=5), {name: distavg.EMA(0.9) for name in names})
    other.load(tmp_path / "a")
    for name in names:
        assert differences(other.full_state_dict(name), averager.full_state_dict(name)) == [
            "frozen",
            "norm.running_mean",
            "norm.running_var",
            "offset",
        ]


# ----------------------------------------------------------------------------- taken or unwritable


def test_a_checkpoint_is_not_overwritten_unasked(tmp_path: Path) -> None:
    model, averager = trained("plain", Uneven)
    path = tmp_path / "a"
    averager.save(path)
    before = tree(path)
    feed(averager, model, [3])
    with pytest.raises(CheckpointExists) as caught:
        averager.save(path)
    assert str(caught.value) == (
        f"{path} holds a checkpoint already (of step 3): save to another path, or replace it with "
        "overwrite=True"
    )
    assert tree(path) == before


def test_overwriting(tmp_path: Path) -> None:
    model, averager = trained("plain", Uneven)
    path = tmp_path / "a"
    averager.save(path, also=write_note)
    folders = [read_manifest(path).folders]
    for step in (3, 4):
        feed(averager, model, [step])
        averager.save(path, overwrite=True, also=write_note)
        assert holds(path, range(step + 1))
        folders.append(read_manifest(path).folders)
        assert {each.name for each in path.iterdir()} == {"manifest.json", *folders[-1]}
    first, second = ["ema", "swa", "train"], ["ema.1", "swa.1", "train.1"]
    assert folders == [first, second, first]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_checkpoint_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    _, averager = trained("plain", Uneven)
    folder, file = tmp_path / "folder", tmp_path / "file"
    (folder / "ema").mkdir(parents=True)
    (folder / "ema" / "thesis.txt").write_text("three years")
    file.write_text("more")
    before = tree(tmp_path)
    with pytest.raises(CheckpointExists) as caught:
        averager.save(folder, overwrite=overwrite)
    assert str(caught.value) == (
        f"{folder} is not empty and is not a checkpoint: save to a path of its own"
    )
    with pytest.raises(CheckpointExists, match=r"file exists and is not a folder$"):
        averager.save(file, overwrite=overwrite)
    assert tree(tmp_path) == before


def test_a_spoiled_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    averager.save(tmp_path / "a")
    os.truncate(tmp_path / "a" / "manifest.json", 100)
    before = tree(tmp_path)
    with pytest.raises(CheckpointCorrupt, match=r"manifest\.json is torn or spoiled"):
        averager.save(tmp_path / "a", overwrite=True)
    assert tree(tmp_path) == before


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    (tmp_path / "file").touch()
    before = tree(tmp_path)
    for path, text in [
        (tmp_path / "file" / "below", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("/proc/distavg/a"), "No such file or directory"),
    ]:
        with pytest.raises(CheckpointError) as caught:
            averager.save(path)
        assert str(path) in str(caught.value)
        assert text in str(caught.value)
    assert tree(tmp_path) == before


def test_options_that_cannot_be(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    for keep in (0, -1, "2"):
        with pytest.raises(ConfigError, match=f"keep={keep!r} is not a number of checkpoints"):
            averager.save(tmp_path / "a", keep=keep)
    assert tree(tmp_path) == {}


def refused(root: str) -> list[str]:
    """Every kind of refusal, as this rank sees it."""
    _, averager = trained("fsdp2", Uneven)
    path = Path(root)
    averager.save(path / "taken")
    texts = [
        error_of(averager.save, path / "taken"),
        error_of(averager.save, path / "file" / "below"),
        error_of(averager.save, path / "file"),
        error_of(averager.save, path / "folder"),
        error_of(averager.save, path / "taken", block=False),
        error_of(averager.save, path / "a", keep=0),
        # A path of its own on every rank: nothing that they share.
        error_of(averager.save, path / f"own-{dist.get_rank()}"),
    ]
    dist.barrier()
    return [*texts, str(sorted(each.name for each in path.iterdir()))]


def test_every_rank_hears_of_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").touch()
    kinds = ["Exists", "Error", "Exists", "Exists"]
    words = ["of step 3", "Not a directory", "is not a folder", "is not empty"]
    for rank, texts in enumerate(run_ranks(refused, 3, str(tmp_path))):
        for text, kind, word in zip(texts[:4], kinds, words, strict=True):
            assert text.startswith(f"Checkpoint{kind}: ")
            assert word in text
            assert (f"saving to {tmp_path}" in text and "rank 0: " in text) is (rank > 0)
        assert texts[4] == texts[0]  # in the background, too, it is found at once
        assert texts[5].startswith("ConfigError: save: keep=0")
        assert texts[6].startswith("CheckpointError: ")
        assert "rank 1: " in texts[6]
        assert "rank 2: " in texts[6]
        assert "own-1 on the machine " in texts[6]
        assert "in which rank 0 has begun the save: save to a file system that all" in texts[6]
        assert texts[7] == "['file', 'folder', 'taken']"


def save_on_two_machines(root: str) -> list[str]:
    """Each rank has a folder of its own, where there is a checkpoint of the same names."""
    _, averager = trained("fsdp2", Uneven)
    mine = Path(root) / f"machine-{dist.get_rank()}" / "a"
    called: list[Path] = []
    options: list[dict[str, Any]] = [{}, {"also": called.append}, {"block": False}]
    texts = [error_of(averager.save, mine, overwrite=True, **each) for each in options]
    return [*texts, *map(str, called)]


def test_machines_that_share_no_folder_are_found_at_the_first_save(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    for machine in (tmp_path / "machine-0", tmp_path / "machine-1"):
        averager.save(machine / "a", also=lambda folder: (folder / "model").touch())
    before = tree(tmp_path)
    for texts in run_ranks(save_on_two_machines, 2, str(tmp_path)):
        assert len(texts) == 3
        for text in texts:
            assert f"{tmp_path}/machine-1/a on the machine " in text
            assert "save to a file system that all ranks share" in text
    assert tree(tmp_path) == before


# ------------------------------------------------------------------------ one rank fails, all raise


@contextmanager
def failing(target: str, rank: int, error: Exception) -> Iterator[None]:
    """Let a function raise on one rank."""
    if dist.get_rank() == rank:
        with mock.patch(target, side_effect=error, autospec=True):
            yield
    else:
        yield


NO_SPACE = OSError(28, "No space left on device")
SAVE = "distavg.checkpoint.save"
FAULTS: list[tuple[str, int, Exception]] = [
    (f"{SAVE}.write_shards", 1, NO_SPACE),
    (f"{SAVE}.write_shards", 0, NO_SPACE),
    (f"{SAVE}.write_record", 0, NO_SPACE),
    (f"{SAVE}.write_record", 1, NO_SPACE),
    ("distavg.checkpoint.cover.cover_fault", 0, ValueError("a bug")),
    ("distavg.checkpoint.cover.cover_fault", 1, ValueError("a bug")),
    ("distavg.checkpoint.files._write_all", 1, NO_SPACE),
    ("distavg.checkpoint.files._digests", 1, ValueError("a bug")),
    (f"{SAVE}.fsync_path", 0, NO_SPACE),
    (f"{SAVE}.fsync_path", 1, NO_SPACE),
    (f"{SAVE}.write_note_on_rank", 1, ValueError("the optimizer's state is odd")),
    (f"{SAVE}.Manifest", 0, ValueError("a bug")),
    ("pathlib.Path.rename", 0, PermissionError(13, "Permission denied")),
    ("pathlib.Path.write_bytes", 0, NO_SPACE),
]


def save_with_faults(root: str, layout: str) -> list[tuple[str, str, bool, bool]]:
    """For each fault: the error of a fresh save and of one that overwrites; what is left."""
    model, averager = trained(layout, Uneven)
    path, fresh = Path(root) / "a", Path(root) / "fresh"
    averager.save(path, also=write_note)
    before = tree(path)
    feed(averager, model, [3])
    found = []
    for target, rank, error in FAULTS:
        also: Callable[[Path], object] = write_note
        if target.endswith("write_note_on_rank"):
            also = mock.Mock(side_effect=error) if dist.get_rank() == rank else write_note
            target = "os.path.expandvars"  # nothing that a save calls
        with failing(target, rank, error):
            texts = [
                error_of(averager.save, fresh, also=also),
                error_of(averager.save, path, overwrite=True, also=also),
            ]
        dist.barrier()
        found.append((*texts, fresh.exists(), tree(path) == before))
        dist.barrier()
    averager.save(path, overwrite=True, also=write_note)  # and nothing is broken
    return found


@pytest.mark.parametrize("layout", ["fsdp2", "ddp"])
def test_a_failure_on_one_rank(tmp_path: Path, layout: str) -> None:
    results = run_ranks(save_with_faults, 2, str(tmp_path), layout)
    for found in results:
        for (_, rank, error), (*texts, left_something, is_untouched) in zip(
            FAULTS, found, strict=True
        ):
            for text in texts:
                assert str(error) in text or error.args[-1] in text
                assert text.startswith(("CheckpointError: ", "RankError: ", "ValueError: "))
                assert found is results[rank] or f"rank {rank}: " in text
            assert not left_something
            assert is_untouched
    assert holds(tmp_path / "a", range(4))


def save_without(root: str, fqns: list[str]) -> list[tuple[str, bool]]:
    """Rank 0 does not write its box of a tensor: what each hears, and whether anything is left."""
    _, averager = trained("fsdp2", Uneven)
    found = []
    for fqn in fqns:

        def write(*args: Any, fqn: str = fqn) -> list[SavedFile]:
            *others, shards, save_id = args
            lost = fqn if dist.get_rank() == 0 else None
            return write_shards(*others, [each for each in shards if each.fqn != lost], save_id)

        with mock.patch(f"{SAVE}.write_shards", write):
            text = error_of(averager.save, f"{root}/a")
        dist.barrier()
        found.append((text, Path(root, "a").exists()))
        dist.barrier()
    return found


@pytest.mark.parametrize("world_size", [1, 3])
def test_what_is_not_written_whole_is_found_by_whichever_rank(
    tmp_path: Path, world_size: int
) -> None:
    """The ranks take turns with the tensors, by name."""
    fqns = trainable()
    assert len(fqns) > 3
    results = run_ranks(save_without, world_size, str(tmp_path), fqns)
    for rank, found in enumerate(results):
        for (text, left_something), fqn in zip(found, fqns, strict=True):
            keeper = sorted(fqns).index(fqn) % world_size
            start = "" if rank == keeper else f"saving to {tmp_path}/a failed. rank {keeper}: "
            assert text.startswith(
                f"CheckpointError: {start}average 'ema' was not written whole: {fqn}: "
            )
            assert text.endswith(" elements are in no box")
            assert not left_something


def overwrite_failing(root: str) -> None:
    """One rank fails while a checkpoint is overwritten."""
    model, averager = trained("fsdp2", Uneven)
    averager.save(f"{root}/a")
    feed(averager, model, [3])
    with failing(f"{SAVE}.write_shards", 1, NO_SPACE), pytest.raises(CheckpointError):
        averager.save(f"{root}/a", overwrite=True)


def test_after_a_failure_the_old_checkpoint_is_loadable(tmp_path: Path) -> None:
    run_ranks(overwrite_failing, 2, str(tmp_path))
    assert holds(tmp_path / "a", range(3))
    assert verify_checkpoint(tmp_path / "a")[1] == []


def also_that_raises(root: str) -> tuple[str, bool, list[str]]:
    _, averager = trained("fsdp2", Uneven)
    seen = []

    def also(folder: Path) -> None:
        seen.append(f"{folder.name}, committed: {(folder.parent / 'manifest.json').exists()}")
        write_note(folder)
        if dist.get_rank() == 1:
            raise KeyError("no such optimizer")

    text = error_of(averager.save, f"{root}/a", also=also)
    dist.barrier()
    return text, Path(root, "a").exists(), seen


def test_also_raises_on_one_rank(tmp_path: Path) -> None:
    (first, *rest), second = run_ranks(also_that_raises, 2, str(tmp_path))
    cause = "also= raised KeyError: 'no such optimizer'"
    assert first == f"CheckpointError: saving to {tmp_path}/a failed. rank 1: {cause}"
    assert second[0] == f"CheckpointError: {cause}"
    assert rest == [False, ["train, committed: False"]] == list(second[1:])


def test_a_marker_names_only_what_may_be_removed(tmp_path: Path) -> None:
    """Names in a marker that lead elsewhere, or to the committed checkpoint, are left alone.

    All of them lead into tmp_path, so that a test that fails removes nothing of anybody's.
    """
    _, averager = trained("plain", Uneven)
    path, precious = tmp_path / "runs" / "a", tmp_path / "runs" / "precious"
    averager.save(path)
    precious.mkdir()
    (path / "dead").mkdir()
    before = tree(path / "ema")
    listed = ["../precious", str(precious), "a/../../precious", "ema", "dead", "manifest.json"]
    (path / MARKER).write_text(json.dumps(listed))
    with pytest.raises(CheckpointExists):
        averager.save(path)
    assert precious.is_dir()
    assert tree(path / "ema") == before
    averager.save(path, overwrite=True)
    assert precious.is_dir()
    assert not (path / "dead").exists()
    assert holds(path, range(3))


@pytest.mark.parametrize("content", ["", "[", '["ema", "sw'])
def test_a_torn_marker(tmp_path: Path, content: str) -> None:
    _, averager = trained("plain", Uneven)
    (tmp_path / MARKER).write_text(content)
    averager.save(tmp_path)
    assert holds(tmp_path, range(3))
    assert not (tmp_path / MARKER).exists()


# ------------------------------------------------------------------------------ at every instant


class _Crash(BaseException):
    """The process ends here: nothing that it would do next is done."""


_events_left: list[int] = []  # one number while armed: changes to the disk that still happen
_hooked: list[bool] = []


def _on_event(event: str, args: tuple[Any, ...]) -> None:
    if not _events_left or threading.current_thread() is not threading.main_thread():
        return
    if event == "open":
        if not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
    elif event not in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"):
        return
    if _events_left[0] == 0:
        raise _Crash
    _events_left[0] -= 1


def crashes(call: Callable[[], object], after_events: int) -> bool:
    """Run a call, and let the process "die" after so many changes to the disk."""
    if not _hooked:
        sys.addaudithook(_on_event)  # for good; it does nothing unless armed
        _hooked.append(True)
    _events_left.append(after_events)
    try:
        call()
    except _Crash:
        return True
    finally:
        _events_left.clear()
    return False


def state_of(path: Path, old: range, new: range) -> str:
    try:
        found = values_in(path)
    except CheckpointNotFound:
        return "nothing"
    for name, steps in (("old", old), ("new", new)):
        expected = expected_after(steps)
        if all(differences(found[rule], expected[rule]) == [] for rule in RULES):
            return name
    return "a mixture"


def test_a_crash_while_overwriting(tmp_path: Path) -> None:
    model, averager = trained("plain", Uneven)
    averager.save(tmp_path / "template", also=write_note)
    feed(averager, model, [3])
    states = []
    path = tmp_path / "a"
    for instant in range(1000):
        shutil.copytree(tmp_path / "template", path)
        has_crashed = crashes(lambda: averager.save(path, overwrite=True, also=write_note), instant)
        states.append(state_of(path, range(3), range(4)))
        averager.save(path, overwrite=True)
        assert {each.name for each in path.iterdir()} == {
            "manifest.json",
            *read_manifest(path).folders,
        }
        shutil.rmtree(path)
        if not has_crashed:
            break
    assert states[0] == "old"
    assert states[-1] == "new"
    assert states == sorted(states, reverse=True)  # old, ..., old, new, ..., new
    assert min(states.count("old"), states.count("new")) >= 5
    assert holds(tmp_path / "template", range(3))


def test_a_crash_while_keeping_one(tmp_path: Path) -> None:
    """A new checkpoint, after which the older one is removed: one of them is whole throughout."""
    model, averager = trained("plain", Uneven)
    averager.save(tmp_path / "template")
    feed(averager, model, [3])
    root = tmp_path / "runs"
    states = []
    for instant in range(1000):
        shutil.copytree(tmp_path / "template", root / "first")
        has_crashed = crashes(lambda: averager.save(root / "second", keep=1), instant)
        first = state_of(root / "first", range(3), range(4))
        second = state_of(root / "second", range(3), range(4))
        states.append((first, second))
        newest = distavg.latest(root)
        assert newest == root / ("second" if second == "new" else "first")
        if second == "nothing":
            averager.save(root / "second", keep=1)
            assert holds(root / "second", range(4))
            assert {each.name for each in root.iterdir()} == {"second"}
        shutil.rmtree(root)
        if not has_crashed:
            break
    assert list(dict.fromkeys(states)) == [("old", "nothing"), ("old", "new"), ("nothing", "new")]


def die_in_also(root: str, rank: int) -> str:
    """One rank dies for good while all of them save."""
    _, averager = trained("fsdp2", Uneven)

    def also(folder: Path) -> None:
        if dist.get_rank() == rank:
            os._exit(1)

    return error_of(averager.save, f"{root}/a", also=also)


def test_a_dead_save_is_invisible_and_cleaned_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a"
    first, second = run_ranks(die_in_also, 2, str(tmp_path), 0, expect_death=(0,))
    assert first is None
    assert second.startswith(f"RankError: saving to {path}: lost contact with rank 0")
    left = sorted(each.name for each in path.iterdir())
    assert left.pop(0) == MARKER
    assert left.pop(0).startswith(".manifest.json.")
    assert left == ["ema", "swa", "train"]
    with pytest.raises(CheckpointNotFound) as caught:
        values_in(path)
    assert str(caught.value) == (
        f"{path}: has no manifest.json: it is not a checkpoint, or its save was never committed"
    )
    assert distavg.latest(tmp_path) is None
    _, averager = trained("plain", Uneven)
    averager.save(path)
    assert holds(path, range(3))
    assert sorted(each.name for each in path.iterdir()) == ["ema", "manifest.json", "swa"]


# ----------------------------------------------------------------------------------------- keep=


def test_keep_removes_the_oldest_of_this_run(tmp_path: Path) -> None:
    model, averager = trained("plain", Uneven)
    _, other = trained("plain", Uneven)
    other.save(tmp_path / "other")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead" / MARKER).write_text("[]")
    # Names whose order is not that of time.
    for step, name in enumerate(["d", "b", "c", "a"], start=3):
        feed(averager, model, [step])
        averager.save(tmp_path / name, keep=2, also=write_note)
    assert {each.name for each in tmp_path.iterdir()} == {"other", "notes", "dead", "c", "a"}
    assert holds(tmp_path / "a", range(7))
    assert holds(tmp_path / "c", range(6))
    assert distavg.latest(tmp_path) == tmp_path / "a"


def test_keep_never_removes_what_was_just_saved(tmp_path: Path) -> None:
    """Also where another machine, whose clock is ahead, saved the older ones."""
    model, averager = trained("plain", Uneven)
    with mock.patch("time.time", side_effect=itertools.count(4e9)):
        averager.save(tmp_path / "a")
        averager.save(tmp_path / "b")
    feed(averager, model, [3])
    averager.save(tmp_path / "c", keep=2)
    assert {each.name for each in tmp_path.iterdir()} == {"b", "c"}
    averager.save(tmp_path / "d", keep=1)
    assert {each.name for each in tmp_path.iterdir()} == {"d"}


def test_keep_goes_on_over_a_resume(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    averager.save(tmp_path / "a")
    averager.save(tmp_path / "b")
    _, resumed = trained("plain", Uneven, ())
    resumed.load(tmp_path / "b")
    resumed.save(tmp_path / "c", keep=2)
    assert {each.name for each in tmp_path.iterdir()} == {"b", "c"}


def test_keep_leaves_what_a_user_put_into_a_checkpoint(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    averager.save(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("good one")
    averager.save(tmp_path / "b", keep=1)
    assert tree(tmp_path / "a") == {"notes.txt": b"good one"}


def test_latest(tmp_path: Path) -> None:
    assert distavg.latest(tmp_path / "nowhere") is None
    assert distavg.latest(tmp_path) is None
    _, averager = trained("plain", Uneven)
    for name in ("b", "c", "a"):
        averager.save(tmp_path / name)
        assert distavg.latest(str(tmp_path)) == tmp_path / name
    (tmp_path / "a" / "manifest.json").write_bytes(b"spoiled")
    assert distavg.latest(tmp_path) == tmp_path / "c"


# ------------------------------------------------------------------- a plain model on every rank


def save_plain(root: str, has_drifted: bool) -> tuple[str, list[str]]:
    """Each rank keeps its average whole; rank 0 writes."""
    model, averager = trained("plain", Uneven)
    if has_drifted and dist.get_rank() == 1:
        weights = weights_at(model, 3)
        weights["module.bias"] = weights["module.bias"].clone()
        weights["module.bias"][-1] += 1
        set_weights(model, weights)
    else:
        set_weights(model, weights_at(model, 3))
    averager.step()
    text = error_of(averager.save, f"{root}/a")
    dist.barrier()
    return text, sorted(str(path.relative_to(root)) for path in Path(root).rglob("*.safetensors"))


def test_of_whole_copies_rank_0_writes_its_own(tmp_path: Path) -> None:
    shard = "shard-00001-model-00001-of-00001.safetensors"
    for text, files in run_ranks(save_plain, 2, str(tmp_path), False):
        assert text == "nothing"
        assert files == [f"a/ema/{shard}", f"a/swa/{shard}"]
    assert holds(tmp_path / "a", range(4))
    assert (tmp_path / "a" / "ema" / "model.safetensors.index.json").exists()


def test_whole_copies_that_differ(tmp_path: Path) -> None:
    for text, files in run_ranks(save_plain, 2, str(tmp_path), True):
        assert text.startswith(
            f"ReplicaMismatch: saving to {tmp_path}/a: average 'ema': module.bias on ranks [1] "
            "differs from rank 0's: these ranks should hold replicas"
        )
        assert files == []
    assert not (tmp_path / "a").exists()


# ------------------------------------------------------------------------- what each rank writes


def save_and_list(root: str, layout: str) -> list[str]:
    _, averager = trained(layout, Uneven)
    averager.save(f"{root}/a")
    rank = dist.get_rank() + 1
    return [path.name for path in Path(root).glob(f"a/ema/shard-{rank:05d}*")]


@pytest.mark.parametrize("layout", ["fsdp2", "ddp"])
def test_each_rank_writes_its_own_shards(tmp_path: Path, layout: str) -> None:
    files = run_ranks(save_and_list, 2, str(tmp_path), layout)
    assert all(f"shard-0000{rank}.json" in own for rank, own in enumerate(files, start=1))
    folder = tmp_path / "a" / "ema"
    assert {path.name for path in folder.iterdir()} == {name for own in files for name in own}
    average = read_manifest(tmp_path / "a").averages["ema"]
    saved = saved_files(tmp_path / "a", "ema")
    # Every element is written once, and by one rank.
    assert uncovered(average, saved) is None
    assert average.nbytes == sum(weight.nbytes for weight in weights_at(Uneven(), 0).values())
    for file in saved:
        names = [box.fqn for box in file.boxes]
        assert len(names) == len(set(names)) > 0


class Wide(nn.Module):
    """A tensor of one name, whatever its size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, 10, 10))


def in_pieces(count: int) -> Callable[..., list[SavedFile]]:
    """The function `write_shards`, with each box cut into so many along its first dim."""

    def write(*args: Any) -> list[SavedFile]:
        *others, shards, save_id = args
        pieces = []
        for shard in shards:
            (first, *offsets), (length, *sizes) = shard.box
            step = -(-length // count)
            for low in range(0, length, step):
                box = Box((first + low, *offsets), (min(step, length - low), *sizes))
                pieces.append(shard.part(box))
        return write_shards(*others, pieces, save_id)

    return write


def save_small_and_large(root: str) -> None:
    """A small tensor in few boxes and blocks, and a large one in many; all else is equal."""
    for name, size, count in (("small", 1000, 1), ("large", 9999, 50)):
        averager = Averager(Wide(size), RULES, replicas=dist.group.WORLD)
        with (
            mock.patch("time.time", return_value=1.7e9),
            mock.patch(f"{SAVE}.write_shards", in_pieces(count)),
        ):
            averager.save(f"{root}/{name}")


def test_the_manifest_does_not_grow_with_elements_and_boxes(tmp_path: Path) -> None:
    run_ranks(save_small_and_large, 2, str(tmp_path))
    small, large = tmp_path / "small", tmp_path / "large"
    boxes = [sum(len(file.boxes) for file in saved_files(path)) for path in (small, large)]
    assert boxes[1] > 40 * boxes[0]
    records = [(path / "ema" / "shard-00001.json").stat().st_size for path in (small, large)]
    assert records[1] > 20 * records[0]
    manifests = [(path / "manifest.json").stat().st_size for path in (small, large)]
    digits = 2 * 2 * (len(str(records[1])) - len(str(records[0])))  # two ranks, two averages
    assert manifests[1] == manifests[0] + digits


def save_awkward(root: str) -> None:
    _, averager = trained("ddp", Awkward, buffers="copied")
    averager.save(f"{root}/a")


def test_buffers_are_rank_0s(tmp_path: Path) -> None:
    run_ranks(save_awkward, 2, str(tmp_path))
    average = read_manifest(tmp_path / "a").averages["ema"]
    buffers = {name for name, _ in Awkward().named_buffers()}
    assert buffers < set(average.tensors)
    files = saved_files(tmp_path / "a", "ema")
    for name in buffers:
        holders = [file.name for file in files if name in {box.fqn for box in file.boxes}]
        assert [holder.split("-")[1] for holder in holders] == ["00001"]
    assert average.tensors["calls"].dtype == "int64"
    assert average.tensors["mask"].dtype == "bool"


def test_keep_spares_what_the_run_was_started_from(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    averager.save(tmp_path / "base")
    _, forked = trained("plain", Uneven, ())
    forked.load(tmp_path / "base")
    for step in range(3):
        forked.step()
        forked.save(tmp_path / f"fork-{step}", keep=1)
    assert {each.name for each in tmp_path.iterdir()} == {"base", "fork-2"}


def test_keep_leaves_links_alone(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    averager.save(tmp_path / "a")
    averager.save(tmp_path / "b")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    averager.save(tmp_path / "c", keep=2)
    assert {each.name for each in tmp_path.iterdir()} == {"b", "c", "link"}


def test_a_target_that_keep_was_removing_when_it_died_can_be_saved_to(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    averager.save(tmp_path / "a")

    def die(path: Path) -> None:
        raise KeyboardInterrupt

    with (
        mock.patch.object(folders, "clean", die),
        pytest.raises(KeyboardInterrupt),
    ):
        folders.prune(tmp_path, 0)
    assert not (tmp_path / "a" / "manifest.json").exists()
    averager.save(tmp_path / "a")
    averager.load(tmp_path / "a")


def test_too_little_room_is_found_before_anything_is_written(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    with (
        mock.patch.object(shutil, "disk_usage", return_value=usage),
        pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, and 10 are free"),
    ):
        averager.save(tmp_path / "a")
    averager.save(tmp_path / "a")


def save_apart(root: str) -> list[str]:
    _, averager = trained("ddp", Uneven)
    if dist.get_rank() == 1:
        averager.update("ema")
    errors = [error_of(averager.save, Path(root) / "a")]

    def body() -> None:
        with averager.applied("ema"):
            raise AssertionError("must not run")

    return [*errors, error_of(body)]


def test_ranks_that_have_updated_differently_are_found(tmp_path: Path) -> None:
    for texts in run_ranks(save_apart, 2, str(tmp_path)):
        for text in texts:
            assert text.startswith("StateError: ")
            assert "ranks [1] have made other updates or steps than rank 0" in text
    assert tree(tmp_path) == {}
