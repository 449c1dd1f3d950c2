"""The command line, without a process group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checks import saved_files, trained
from click.testing import CliRunner, Result
from models import Uneven
from ranks import run_ranks
from torch import nn

from distavg import EMA, SWA, Averager, Clock
from distavg.checkpoint import read
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
    count, nbytes = len(average.tensors), average.nbytes
    assert lines == [
        "step 5, epoch 2.5",
        "average  updates  tensors  bytes  ranks  coverage  rule",
        f"ema            4  {count:>7}  {nbytes:>5,}      1  whole     "
        "EMA(start='1ba', update_interval='1ba', decay=0.9, min_decay=0.0)",
        f"swa            2  {count:>7}  {nbytes:>5,}      1  whole     "
        "SWA(start='0ba', update_interval='1ep')",
        "written by also=: train",
    ]


def test_inspect_tensors(checkpoint: Path) -> None:
    result = distavg("inspect", "--tensors", checkpoint)
    assert result.exit_code == 0
    assert result.output.count("  embed.weight = head.weight: float32 [5, 4]\n") == 2
    assert result.output.count("  experts: float32 [3, 5, 4]\n") == 2
    assert "frozen" not in result.output


def test_inspect_for_a_script(checkpoint: Path) -> None:
    content = json.loads(distavg("inspect", "--json", checkpoint).output)
    average = read_manifest(checkpoint).averages["ema"]
    assert content["path"] == str(checkpoint)
    assert (content["steps"], content["epochs"], content["also"]) == (5, 2.5, "train")
    assert content["averages"]["ema"] == {
        "rule": EMA(0.9, start="1ba").record(),
        "num_updates": 4,
        "tensors": len(average.tensors),
        "bytes": average.nbytes,
        "ranks": 1,
        "coverage": "whole",
    }
    tensors = json.loads(distavg("inspect", "--json", "--tensors", checkpoint).output)
    expected = {"dtype": "float32", "shape": [5, 4], "aliases": ["head.weight"]}
    assert tensors["averages"]["swa"]["tensors"]["embed.weight"] == expected


def test_verify(checkpoint: Path) -> None:
    result = distavg("verify", checkpoint)
    assert result.exit_code == 0
    total = sum(average.nbytes for average in read_manifest(checkpoint).averages.values())
    assert result.output == f"{checkpoint}: whole and unspoiled, {total:,} bytes verified\n"


def test_every_fault_of_a_checkpoint_is_named(checkpoint: Path) -> None:
    ema, swa = saved_files(checkpoint)
    nbytes = (checkpoint / swa.name).stat().st_size
    os.truncate(checkpoint / swa.name, nbytes - 1)
    with (checkpoint / ema.name).open("r+b") as file:
        for box in ema.boxes[2:4]:
            file.seek(box.begin)
            byte = file.read(1)
            file.seek(box.begin)
            file.write(bytes([byte[0] ^ 1]))
    result = distavg("verify", checkpoint)
    assert result.exit_code == 1
    first, second, third, last = result.output.splitlines()
    for line, box in zip((first, second), ema.boxes[2:4], strict=True):
        assert line == (
            f"{ema.name}: {box.fqn}: the checksum of block 0 is wrong (bytes {box.begin} and "
            "following of the file)"
        )
    assert third == (
        f"{checkpoint / swa.name} is torn: it has {nbytes - 1} bytes, its record says {nbytes}"
    )
    assert last.startswith(f"Error: {checkpoint}: 3 faults, ")
    assert distavg("inspect", checkpoint).exit_code == 0  # the records are whole


def test_records_that_are_lost_or_spoiled_are_named(checkpoint: Path) -> None:
    for name in ("ema", "swa"):
        path = checkpoint / name / "shard-00001.json"
        nbytes = path.stat().st_size
        os.truncate(path, nbytes - 1)
        fault = f"{path} is torn: it has {nbytes - 1} bytes, the manifest says {nbytes}"
        found = json.loads(distavg("inspect", "--json", checkpoint).output)["averages"][name]
        assert (found["ranks"], found["coverage"]) == (1, fault)
        result = distavg("export", checkpoint, "--name", name, "-o", checkpoint.parent / "out")
        assert (result.exit_code, result.output) == (1, f"Error: CheckpointCorrupt: {fault}\n")
        assert fault in distavg("verify", checkpoint).output.splitlines()
    path.unlink()
    assert f"{path} is missing" in distavg("inspect", checkpoint).output
    assert distavg("verify", checkpoint).output.splitlines()[1:] == [
        f"{path} is missing",
        f"Error: {checkpoint}: 2 faults, 0 bytes read",
    ]


@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "export"])
def test_no_checkpoint(tmp_path: Path, command: str) -> None:
    more = {"diff": [tmp_path], "export": ["-o", tmp_path / "out"]}.get(command, [])
    result = distavg(command, tmp_path, *more)
    assert result.exit_code == 2
    assert result.output == (
        f"Error: CheckpointNotFound: {tmp_path}: has no manifest.json: it is not a checkpoint, or "
        "its save was never committed\n"
    )
    (tmp_path / "manifest.json").write_text("{}")
    result = distavg(command, tmp_path, *more)
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: CheckpointCorrupt: {tmp_path}: manifest.json is torn")


# ------------------------------------------------------------------------------------------ diff


def test_averages_that_are_equal(checkpoint: Path) -> None:
    result = distavg("diff", checkpoint, checkpoint, "--name=ema")
    count = len(read_manifest(checkpoint).averages["ema"].tensors)
    assert (result.exit_code, result.output) == (0, f"ema: {count} tensors are equal\n")
    result = distavg("diff", checkpoint, checkpoint)
    assert result.exit_code == 2
    assert result.output == (
        f"Error: ConfigError: {checkpoint} holds the averages ['ema', 'swa']: name one\n"
    )


def test_averages_that_differ(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1), nn.Linear(1, 1))
    averager = Averager(model, EMA(0.5))
    averager.save(tmp_path / "a")
    before = {name: tensor.double() for name, tensor in averager.full_state_dict().items()}
    with torch.no_grad():
        model[0].weight[1, 1] += 3
        model[2].bias.fill_(torch.nan)
    averager.save(tmp_path / "b")
    result = distavg("diff", tmp_path / "a", tmp_path / "b")
    relative = f"{3 / before['0.weight'].norm().item():g}"
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        "tensor    largest  relative",
        f"0.weight        3  {relative:>8}",
        "2.bias    nan      nan",
    ]
    lines = distavg("diff", tmp_path / "a", tmp_path / "b", "--json").output.splitlines()
    assert [json.loads(line)["fqn"] for line in lines] == ["0.weight", "2.bias"]
    assert distavg("diff", tmp_path / "b", tmp_path / "b").exit_code == 0  # NaN equals itself

    smaller = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    Averager(smaller, EMA(0.5)).save(tmp_path / "c")
    lines = distavg("diff", tmp_path / "a", tmp_path / "c").output.splitlines()
    assert lines[1].split(maxsplit=1) == ["0.weight", "shapes (3, 2) and (4, 2)"]
    assert lines[-1].split(maxsplit=1) == ["2.bias", "only in the first"]


class Buffers(nn.Module):
    """What is hard to compare."""

    def __init__(self, mask: list[float], count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("mask", torch.tensor(mask))
        self.register_buffer("count", torch.tensor([count]))


def test_infinities_signs_and_large_integers(tmp_path: Path) -> None:
    for name, mask, count in (
        ("a", [-torch.inf, 1.0], 2**53),
        ("b", [-torch.inf, 1.5], 2**53 + 1),
        ("c", [torch.inf, 1.0], 2**53),
    ):
        model = Buffers(mask, count)
        if name == "c":
            with torch.no_grad():
                model.weight.neg_()
        averager = Averager(model, EMA(), buffers="copied")
        averager.update()
        averager.save(tmp_path / name)

    def lines(*arguments: str) -> list[dict[str, Any]]:
        output = distavg("diff", tmp_path / "a", *arguments, "--json").output
        return [json.loads(line, parse_constant=pytest.fail) for line in output.splitlines()]

    mask, count = lines(str(tmp_path / "b"))
    assert (mask["fqn"], mask["largest"]) == ("mask", 0.5)
    assert count["fqn"] == "count"
    weight, mask = lines(str(tmp_path / "c"))
    assert (weight["what"], weight["largest"]) == ("signs of zero", 0)
    assert (mask["fqn"], mask["largest"]) == ("mask", None)


def test_averages_of_other_names_and_dtypes(tmp_path: Path) -> None:
    model = nn.Linear(2, 2).bfloat16()
    Averager(model, {"x": EMA(), "y": EMA(0.5)}).save(tmp_path / "a")
    Averager(model, {"z": EMA()}, dtype=torch.bfloat16).save(tmp_path / "b")
    assert distavg("diff", tmp_path / "a", tmp_path / "a", "--name=x:y").exit_code == 0
    result = distavg("diff", tmp_path / "a", tmp_path / "b", "--name=x:z")
    assert result.exit_code == 1
    assert "weight  float32 and bfloat16" in result.output


def test_what_cannot_be_read_is_not_called_corrupt(checkpoint: Path) -> None:
    original = os.open

    def refuse(path: Any, *rest: Any) -> int:
        if str(path).endswith(".safetensors"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *rest)

    with mock.patch.object(os, "open", refuse):
        result = distavg("verify", checkpoint)
    assert result.exit_code == 2
    assert "CheckpointError: " in result.output
    assert "Permission denied" in result.output


def save_on_ranks(root: str) -> None:
    for layout in ("fsdp2", "ddp"):
        _, averager = trained(layout, Uneven)
        averager.save(f"{root}/{layout}")


def test_other_layouts_compare_piece_by_piece(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    averager.save(tmp_path / "plain")
    run_ranks(save_on_ranks, 3, str(tmp_path))
    with mock.patch.object(read, "_PIECE_ELEMENTS", 3):
        for first, second in (("plain", "fsdp2"), ("fsdp2", "ddp"), ("ddp", "plain")):
            result = distavg("diff", tmp_path / first, tmp_path / second, "--name=swa")
            assert result.exit_code == 0, result.output
    table = distavg("inspect", tmp_path / "fsdp2").output.splitlines()
    assert [line.split()[4] for line in table[2:]] == ["ranks", "3", "3"]


# ----------------------------------------------------------------------------------------- prune


def test_prune(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    for name in "abc":
        averager.save(tmp_path / name)
    (tmp_path / "dead" / "ema").mkdir(parents=True)
    (tmp_path / "dead" / ".distavg-uncommitted.json").write_text('["ema"]')
    assert distavg("prune", tmp_path).exit_code == 2
    result = distavg("prune", tmp_path, "--keep", "2")
    assert (result.exit_code, result.output) == (0, f"removed {tmp_path / 'a'}\n")
    result = distavg("prune", tmp_path, "--uncommitted", "--keep", "1")
    assert result.output == f"removed {tmp_path / 'b'}\ncleaned {tmp_path / 'dead'}\n"
    assert [each.name for each in tmp_path.iterdir()] == ["c"]


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
