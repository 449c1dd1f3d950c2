"""Saves in the background: that they never tear, and what they say when they fail."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
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
def test_a_failure_is_raised_once(
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
    handle.wait()
    averager.save(tmp_path / "b")
    assert holds(tmp_path / "b", range(3))


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


SCRIPT = """
import sys, torch, torch.distributed as dist, distavg
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1500, 1500))
averager = distavg.Averager(model, distavg.EMA(0.9))
averager.step()
averager.save(sys.argv[1], block=False)
if sys.argv[2] == "raises":
    raise KeyError("on purpose")
"""


@pytest.mark.parametrize("end", ["ends", "raises"])
def test_a_process_that_ends_finishes_its_save(end: str, tmp_path: Path) -> None:
    script, path = tmp_path / "script.py", tmp_path / "a"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launch, str(script), str(path), end],
        capture_output=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=end == "ends",
    )
    if end == "ends" or distavg.latest(tmp_path) is not None:
        model = torch.nn.Linear(1500, 1500)
        averager = Averager(model, distavg.EMA(0.9))
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
