"""The command line, without a process group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checks import trained
from click.testing import CliRunner, Result
from models import Uneven

from distavg import EMA, SWA, Clock
from distavg.checkpoint.manifest import read_manifest
from distavg.cli import main


def distavg(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    rules = {"ema": EMA(0.9, start="1ba"), "swa": SWA()}
    _, averager = trained("plain", Uneven, range(5), rules=rules, clock=Clock(steps_per_epoch=2))
    averager.save(tmp_path / "a", also=lambda folder: None)
    return tmp_path / "a"


def test_inspect(checkpoint: Path) -> None:
    result = distavg("inspect", checkpoint)
    assert result.exit_code == 0
    first, *lines = result.output.splitlines()
    assert first.startswith(f"{checkpoint}: committed 20")
    assert first.endswith(" UTC")
    average = read_manifest(checkpoint).averages["ema"]
    size = f"{len(average.tensors)} tensors, {average.nbytes:,} bytes in 1 files"
    assert lines == [
        "step 5, epoch 2.5",
        "ema: EMA(start='1ba', update_interval='1ba', decay=0.9, min_decay=0.0)",
        f"  4 updates, {size}",
        "swa: SWA(start='0ba', update_interval='1ep')",
        f"  2 updates, {size}",
        "written by also=: train",
    ]


def test_inspect_tensors(checkpoint: Path) -> None:
    result = distavg("inspect", "--tensors", checkpoint)
    assert result.exit_code == 0
    assert result.output.count("  embed.weight = head.weight: float32 [5, 4]\n") == 2
    assert result.output.count("  experts: float32 [3, 5, 4]\n") == 2
    assert "frozen" not in result.output


def test_verify(checkpoint: Path) -> None:
    result = distavg("verify", checkpoint)
    assert result.exit_code == 0
    total = sum(average.nbytes for average in read_manifest(checkpoint).averages.values())
    assert result.output.endswith(f"{checkpoint}: whole and unspoiled, {total:,} bytes verified\n")


def test_a_damaged_checkpoint(checkpoint: Path) -> None:
    path = checkpoint / read_manifest(checkpoint).averages["swa"].files[0].name
    nbytes = path.stat().st_size
    os.truncate(path, nbytes - 1)
    result = distavg("verify", checkpoint)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == (
        f"Error: CheckpointCorrupt: {path} is torn: it has {nbytes - 1} bytes, the manifest says "
        f"{nbytes}"
    )
    assert distavg("inspect", checkpoint).exit_code == 0  # the manifest is whole


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_no_checkpoint(tmp_path: Path, command: str) -> None:
    result = distavg(command, tmp_path)
    assert result.exit_code == 1
    assert result.output == (
        f"Error: CheckpointNotFound: {tmp_path}: has no manifest.json: it is not a checkpoint, or "
        "its save was never committed\n"
    )
    (tmp_path / "manifest.json").write_text("{}")
    result = distavg(command, tmp_path)
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: CheckpointCorrupt: {tmp_path}: manifest.json is torn")


def test_the_module_runs(checkpoint: Path) -> None:
    """In a bare process, as `python -m distavg`."""
    found = subprocess.run(
        [sys.executable, "-m", "distavg", "verify", checkpoint],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert "whole and unspoiled" in found.stdout
