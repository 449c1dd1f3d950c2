"""Saves in the background: that they never tear, and what they say when they fail."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checks import RULES, differences, error_of, feed, torch_average, trained
from models import Uneven, backward, build
from ranks import run_ranks
from torch import Tensor

import distavg
from distavg import Averager, CheckpointError, CheckpointExists
from distavg.checkpoint import save as save_module

write_shards = save_module.write_shards


def held_back(gate: threading.Event, failure: Exception | None = None) -> Any:
    """Writing waits for a gate, and may fail behind it."""

    def write(*args: Any) -> Any:
        assert gate.wait(30)
        if failure is not None:
            raise failure
        return write_shards(*args)

    return mock.patch.object(save_module, "write_shards", write)


def holds(path: Path, steps: range) -> bool:
    averager = Averager(build("plain", Uneven, seed=99), RULES)
    averager.load(path)
    expected = {rule: torch_average(Uneven, rule, steps) for rule in RULES}
    found = {rule: averager.full_state_dict(rule) for rule in RULES}
    names = [name for name, p in Uneven().named_parameters() if p.requires_grad]
    return all(
        differences({n: found[rule][n] for n in names}, {n: expected[rule][n] for n in names}) == []
        for rule in RULES
    )


def test_a_save_is_of_the_moment_when_it_began(tmp_path: Path) -> None:
    model, averager = trained("plain", Uneven)
    gate = threading.Event()
    with held_back(gate):
        handle = averager.save(tmp_path / "a", block=False)
        assert not handle.done()
        feed(averager, model, [3, 4])
        with averager.applied("ema"):
            pass
        assert distavg.latest(tmp_path) is None
        gate.set()
        handle.wait()
    assert handle.done()
    assert handle.path == tmp_path / "a"
    assert holds(tmp_path / "a", range(3))
    averager.save(tmp_path / "b")
    assert holds(tmp_path / "b", range(5))


@pytest.mark.parametrize("what", ["save", "load"])
def test_the_next_call_waits_for_it(what: str, tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    averager.save(tmp_path / "old")
    gate = threading.Event()
    with held_back(gate):
        first = averager.save(tmp_path / "a", block=False)
        threading.Timer(0.3, gate.set).start()
        if what == "save":
            second = averager.save(tmp_path / "b", block=False)
            assert first.done()
            second.wait()
        else:
            averager.load(tmp_path / "old")
            assert first.done()
    assert holds(tmp_path / "a", range(3))


@pytest.mark.parametrize("asked", ["save", "load", "wait"])
def test_a_failure_is_raised_until_it_is_known(
    asked: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, averager = trained("plain", Uneven)
    averager.save(tmp_path / "old")
    gate = threading.Event()
    gate.set()
    with held_back(gate, OSError(28, "No space left on device")):
        handle = averager.save(tmp_path / "a", block=False)
        while not handle.done():
            time.sleep(0.01)
    assert not (tmp_path / "a").exists()
    assert "in the background failed" in caplog.text
    calls = {
        "save": lambda: averager.save(tmp_path / "b"),
        "load": lambda: averager.load(tmp_path / "old"),
        "wait": handle.wait,
    }
    with pytest.raises(CheckpointError, match="No space left on device"):
        calls[asked]()
    assert not (tmp_path / "b").exists()
    with pytest.raises(CheckpointError, match="No space left on device"):
        handle.wait()  # it never was committed
    averager.save(tmp_path / "b")
    assert holds(tmp_path / "b", range(3))


def test_a_wait_that_is_interrupted_can_be_repeated(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    gate = threading.Event()

    def interrupted(call: Callable[[], object]) -> None:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            call()

    with held_back(gate):
        handle = averager.save(tmp_path / "a", block=False)
        interrupted(handle.wait)
        interrupted(lambda: averager.save(tmp_path / "b"))
        assert not handle.done()
        threading.Timer(0.2, gate.set).start()
        averager.save(tmp_path / "c")
    assert handle.done()
    assert holds(tmp_path / "a", range(3))


def test_a_folder_that_is_left_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, averager = trained("plain", Uneven)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    gate = threading.Event()
    with held_back(gate):
        handle = averager.save("a", block=False)
        monkeypatch.chdir(tmp_path / "elsewhere")
        gate.set()
        handle.wait()
    assert handle.path == Path("a")
    assert holds(tmp_path / "a", range(3))


def test_what_can_be_known_is_raised_at_once(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    averager.save(tmp_path / "a")
    with pytest.raises(CheckpointExists):
        averager.save(tmp_path / "a", block=False)


def test_also_runs_before_it_returns(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    seen: list[object] = []
    gate = threading.Event()

    def also(folder: Path) -> None:
        seen.append(threading.current_thread())
        (folder / "model").touch()

    with held_back(gate):
        handle = averager.save(tmp_path / "a", block=False, also=also, overwrite=True, keep=1)
        assert seen == [threading.main_thread()]
        gate.set()
        handle.wait()
    assert (tmp_path / "a" / "train" / "model").exists()


def test_keep_and_overwrite_work_in_the_background(tmp_path: Path) -> None:
    model, averager = trained("plain", Uneven)
    for step, name in enumerate("abc", start=3):
        feed(averager, model, [step])
        averager.save(tmp_path / name, block=False, keep=2)
    averager.save(tmp_path / "c", block=False, overwrite=True).wait()
    assert {each.name for each in tmp_path.iterdir()} == {"b", "c"}
    assert holds(tmp_path / "c", range(6))


# --------------------------------------------------------------------------------- several ranks


def train_meanwhile(root: str, layout: str) -> list[str]:
    """Training, swaps and gathers go on while saves run, each over the same ranks."""
    model = build(layout)
    averager = Averager(model, RULES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    averager.attach(optimizer)
    expected: list[dict[str, Tensor]] = []
    handles = []
    for step in range(6):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(averager.full_state_dict("ema", all_ranks=True))
        handles.append(averager.save(f"{root}/{step}", block=False))
        with averager.applied("ema"):
            averager.metrics(distance=False)
    handles[-1].wait()
    dist.barrier()
    offences = []
    held = averager["ema"].dtypes  # not the buffers, which are the live ones
    for step, values in enumerate(expected):
        averager.load(f"{root}/{step}")
        found = averager.full_state_dict("ema", all_ranks=True)
        offences += differences({n: found[n] for n in held}, {n: values[n] for n in held})
    return offences


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_training_goes_on(layout: str, tmp_path: Path) -> None:
    assert run_ranks(train_meanwhile, 2, str(tmp_path), layout) == [[], []]


def fail_on_rank_1(root: str) -> list[str]:
    logging.disable()
    _, averager = trained("fsdp2", Uneven)
    gate = threading.Event()
    gate.set()
    failure = OSError(5, "Input/output error") if dist.get_rank() == 1 else None
    with held_back(gate, failure):
        handle = averager.save(f"{root}/a", block=False)
        while not handle.done():
            time.sleep(0.01)
    texts = [error_of(averager.save, f"{root}/b"), error_of(averager.save, f"{root}/b")]
    logging.disable(logging.NOTSET)
    return texts


def test_a_failure_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(fail_on_rank_1, 2, str(tmp_path))
    for text, then in (first, second):
        assert text.startswith("CheckpointError: ")
        assert "Input/output error" in text
        assert then == "nothing"
    assert [each.name for each in tmp_path.iterdir()] == ["b"]


def heard_on_one_rank(root: str) -> list[str]:
    """Rank 0 alone has asked how the save went."""
    logging.disable()
    _, averager = trained("fsdp2", Uneven)
    gate = threading.Event()
    gate.set()
    with held_back(gate, OSError(28, "No space left on device")):
        handle = averager.save(f"{root}/a", block=False)
        heard = error_of(handle.wait) if dist.get_rank() == 0 else ""
        texts = [error_of(averager.save, f"{root}/b")]
        handle = averager.save(f"{root}/c", block=False)
        known = error_of(handle.wait)
    logging.disable(logging.NOTSET)
    return [heard, *texts, known, error_of(averager.save, f"{root}/d")]


def test_ranks_agree_on_a_failure_that_one_has_heard(tmp_path: Path) -> None:
    first, second = run_ranks(heard_on_one_rank, 2, str(tmp_path))
    for _, text, known, then in (first, second):
        assert "No space left on device" in text
        assert "No space left on device" in known
        assert then == "nothing"  # all ranks had heard it
    assert [each.name for each in tmp_path.iterdir()] == ["d"]


def two_at_a_time(root: str) -> None:
    """Saves of two averagers over the same ranks."""
    averagers = [trained("ddp", Uneven)[1] for _ in range(2)]
    for step in range(8):
        handles = [
            averager.save(f"{root}/{number}-{step}", block=False)
            for number, averager in enumerate(averagers)
        ]
        averagers[0].update("ema")
    for handle in handles:
        handle.wait()
    dist.barrier()


def test_two_averagers_may_save_at_a_time(tmp_path: Path) -> None:
    run_ranks(two_at_a_time, 2, str(tmp_path))
    assert len(list(tmp_path.glob("*/manifest.json"))) == 16


SCRIPT = """
import sys, torch, torch.distributed as dist, distavg
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1500, 1500))
averager = distavg.Averager(model, distavg.EMA(0.9))
averager.step()
averager.save(sys.argv[1], block=False)
"""


def test_a_process_that_ends_finishes_its_save(tmp_path: Path) -> None:
    script, path = tmp_path / "script.py", tmp_path / "a"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launch, str(script), str(path)],
        capture_output=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    averager = Averager(torch.nn.Linear(1500, 1500), distavg.EMA(0.9))
    averager.load(path)
    assert averager["ema"].num_updates == 1


def test_the_copy_is_no_view(tmp_path: Path) -> None:
    """What a save in the background holds is apart from the averages and from the live weights."""
    _, averager = trained("plain", Uneven)
    memory = {shard.tensor.untyped_storage().data_ptr() for shard in averager["ema"].shards()}
    seen: list[int] = []

    def write(root: Path, folder: str, rank: int, shards: Any, save_id: str) -> Any:
        seen.extend(shard.tensor.untyped_storage().data_ptr() for shard in shards)
        return write_shards(root, folder, rank, shards, save_id)

    with mock.patch.object(save_module, "write_shards", write):
        averager.save(tmp_path / "a", block=False).wait()
    assert seen
    assert memory.isdisjoint(seen)
