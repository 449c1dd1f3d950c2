"""Exports, read by the tools that they are for: transformers, and safetensors' own loaders."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from checks import differences, error_of, trained
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from models import Uneven
from ranks import run_ranks
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from distavg import (
    EMA,
    Averager,
    CheckpointError,
    CheckpointExists,
    ConfigError,
    UnsupportedError,
)
from distavg.checkpoint import export as export_module
from distavg.checkpoint import read
from distavg.checkpoint.export import parse_size, plan_export
from distavg.checkpoint.manifest import SavedTensor
from distavg.cli import main
from distavg.layout import Box


def distavg(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def values_in(folder: Path) -> dict[str, Tensor]:
    """What the index and the files it names hold; every file is one that safetensors accepts."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    values = {}
    for name in set(index["weight_map"].values()):
        values.update(safetensors.torch.load_file(folder / name))
    assert values.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in values.values())
    files = {path.name for path in folder.glob("*.safetensors")}
    assert files == set(index["weight_map"].values())
    return values


def canonical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the second names of tied tensors."""
    return {name: tensor for name, tensor in state.items() if name != "head.weight"}


def test_an_averager_exports_all_of_its_model(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    averager.export(tmp_path / "out", "ema")
    expected = averager.full_state_dict("ema")
    assert differences(values_in(tmp_path / "out"), canonical(expected)) == []
    loaded = Uneven()
    missing, unexpected = safetensors.torch.load_model(
        loaded, tmp_path / "out" / "model.safetensors"
    )
    assert (missing, unexpected) == (set(), [])
    assert differences(dict(loaded.state_dict()), expected) == []
    assert {each.name for each in tmp_path.iterdir()} == {"out"}


def test_the_command_exports_what_the_checkpoint_holds(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    averager.save(tmp_path / "a")
    result = distavg("export", tmp_path / "a", "--name=swa", "-o", tmp_path / "out")
    expected = {shard.fqn: shard.tensor for shard in averager["swa"].shards()}
    assert result.output == f"wrote {tmp_path / 'out'}: {len(expected)} tensors in 1 files\n"
    assert differences(values_in(tmp_path / "out"), expected) == []
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp64", torch.float64)])
def test_another_dtype(dtype: str, expected: torch.dtype, tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    averager.export(tmp_path / "out", "ema", dtype=dtype)
    state = canonical(averager.full_state_dict("ema"))
    converted = {n: t.to(expected) if t.is_floating_point() else t for n, t in state.items()}
    assert differences(values_in(tmp_path / "out"), converted) == []
    averager.save(tmp_path / "a")
    distavg("export", tmp_path / "a", "--name=ema", "-o", tmp_path / "b", f"--dtype={dtype}")
    found = values_in(tmp_path / "b")
    assert differences(found, {name: converted[name] for name in found}) == []


def test_files_of_a_size(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    averager.export(tmp_path / "out", "ema", max_shard_size="200")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    expected = canonical(averager.full_state_dict("ema"))
    largest = max(tensor.nbytes for tensor in expected.values())
    for path in files:
        nbytes = sum(t.nbytes for t in safetensors.torch.load_file(path).values())
        assert 0 < nbytes <= max(200, largest)
    assert differences(values_in(tmp_path / "out"), expected) == []


def test_while_it_is_applied_the_average_is_exported(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    expected = canonical(averager.full_state_dict("ema"))
    with averager.applied("ema"):
        averager.export(tmp_path / "out", "ema")
    found = values_in(tmp_path / "out")
    assert differences(found, expected) == []


def tiny_llama(**options: Any) -> Any:
    transformers: Any = importlib.import_module("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
    return transformers.LlamaConfig(**sizes, num_attention_heads=2, **options)


def test_transformers_loads_what_an_averager_exports(tmp_path: Path) -> None:
    transformers: Any = importlib.import_module("transformers")
    config = tiny_llama(num_hidden_layers=2, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config)
    averager = Averager(model, EMA(0.5))
    averager.step()
    averager.export(tmp_path / "out", max_shard_size="4KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert differences(dict(loaded.state_dict()), averager.full_state_dict()) == []
    base = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(base.embed_tokens.weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_the_configuration_is_that_of_what_is_written(dtype: str | None, tmp_path: Path) -> None:
    """A bf16 model has an fp32 average, which transformers must not round when it loads it."""
    transformers: Any = importlib.import_module("transformers")
    config = tiny_llama(num_hidden_layers=1, dtype="bfloat16")
    model = transformers.LlamaForCausalLM(config).bfloat16()
    averager = Averager(model, EMA(0.5))
    averager.step()
    averager.export(tmp_path / "out", dtype=dtype)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = "float32" if dtype is None else "bfloat16"
    assert (written["architectures"], written["dtype"]) == (["LlamaForCausalLM"], expected)
    assert (tmp_path / "out" / "generation_config.json").exists()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in loaded.parameters()} == {getattr(torch, expected)}
    whole = nn.Module()
    whole.net = model  # its names are not those that transformers looks for
    Averager(whole, EMA(0.5)).export(tmp_path / "whole")
    assert not (tmp_path / "whole" / "config.json").exists()


def test_tensors_that_averages_never_hold(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("rotations", torch.randn(3) * 1j)
    model.register_buffer("counts", torch.arange(4).to(torch.uint16))
    model.register_buffer("scales", torch.ones(4).to(torch.float8_e4m3fn))
    Averager(model, EMA()).export(tmp_path / "out", dtype="bf16")
    found = values_in(tmp_path / "out")
    assert torch.equal(found["rotations"], model.rotations)
    assert torch.equal(found["counts"], model.counts)
    assert found["scales"].dtype == torch.float8_e4m3fn
    model.register_buffer("odd", torch.randn(3).to(torch.complex128))
    with pytest.raises(UnsupportedError, match=r"odd: safetensors files cannot hold complex128"):
        Averager(model, EMA()).export(tmp_path / "odd")


def test_more_files_than_are_held_open(tmp_path: Path) -> None:
    model = nn.ParameterList(nn.Parameter(torch.randn(2)) for _ in range(100))
    averager = Averager(model, EMA())
    averager.export(tmp_path / "out", max_shard_size=8)
    assert differences(values_in(tmp_path / "out"), averager.full_state_dict()) == []


# --------------------------------------------------------------------------------- several ranks


def given_otherwise(root: str) -> list[str]:
    _, averager = trained("fsdp2", Uneven)
    rank = dist.get_rank()
    return [
        error_of(averager.export, f"{root}/a", "ema", dtype=["bf16", None][rank]),
        error_of(averager.export, f"{root}/a", ["ema", "swa"][rank]),
        error_of(averager.export, f"{root}/a", "ema", dtype=["int3", None][rank]),
    ]


def test_ranks_that_are_given_other_arguments(tmp_path: Path) -> None:
    for first, second, third in run_ranks(given_otherwise, 2, str(tmp_path)):
        assert "the ranks were given other arguments: " in first
        assert "the ranks were given other arguments: " in second
        assert "'int3' is none of" in third
    assert list(tmp_path.iterdir()) == []


def export_on_ranks(root: str, layout: str) -> list[str]:
    _, averager = trained(layout, Uneven)
    averager.export(f"{root}/{layout}", "swa", max_shard_size=300)
    expected = averager.full_state_dict("swa", all_ranks=True)
    dist.barrier()
    return differences(values_in(Path(root, layout)), canonical(expected))


@pytest.mark.parametrize(
    ("layout", "size"),
    [("fsdp2", 3), ("ddp", 3), ("plain", 2), ("tp", 2), ("fsdp1", 2), ("hsdp", 4)],
)
def test_each_rank_writes_its_part(layout: str, size: int, tmp_path: Path) -> None:
    assert run_ranks(export_on_ranks, size, str(tmp_path), layout) == [[]] * size


def export_a_transformer(root: str) -> str:
    transformers: Any = importlib.import_module("transformers")
    config = tiny_llama(num_hidden_layers=1)
    model = fully_shard(transformers.LlamaForCausalLM(config))
    Averager(model, EMA(0.5)).export(f"{root}/out")
    return str(json.loads(Path(root, "out", "config.json").read_text())["architectures"])


def test_a_sharded_transformer_has_its_own_name(tmp_path: Path) -> None:
    assert run_ranks(export_a_transformer, 2, str(tmp_path)) == ["['LlamaForCausalLM']"] * 2


def fail_on_rank_1(root: str) -> list[str]:
    _, averager = trained("fsdp2", Uneven)
    if dist.get_rank() == 1:
        with mock.patch.object(export_module.os, "pwrite", side_effect=OSError(28, "No space")):
            text = error_of(averager.export, f"{root}/out", "ema")
    else:
        text = error_of(averager.export, f"{root}/out", "ema")
    dist.barrier()
    alone = error_of(averager.export, f"{root}/own-{dist.get_rank()}", "ema")
    averager.export(f"{root}/out", "ema")
    dist.barrier()
    taken = error_of(averager.export, f"{root}/out", "ema")
    return [text, alone, taken]


def test_a_failure_leaves_nothing_and_is_raised_on_all(tmp_path: Path) -> None:
    for text, alone, taken in run_ranks(fail_on_rank_1, 2, str(tmp_path)):
        assert "CheckpointError" in text
        assert "cannot be written" in text
        assert alone == "nothing"  # the path of rank 0 counts
        assert taken.startswith("CheckpointExists: ")
    assert {each.name for each in tmp_path.iterdir()} == {"out", "own-0"}


# ---------------------------------------------------------------------------------- what is refused


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").touch()
    with pytest.raises(CheckpointExists, match="exists and is not empty"):
        averager.export(tmp_path / "out", "ema")
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"notes"}
    (tmp_path / "out" / "notes").unlink()
    averager.export(tmp_path / "out", "ema")  # an empty folder may be there
    with pytest.raises(CheckpointError):
        averager.export(tmp_path / "out" / "model.safetensors" / "below", "ema")


def test_an_export_that_died_is_cleaned_by_the_next(tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    with (
        mock.patch.object(export_module.os, "fsync", side_effect=KeyboardInterrupt),
        mock.patch.object(export_module.shutil, "rmtree"),
        pytest.raises(KeyboardInterrupt),
    ):
        averager.export(tmp_path / "out", "ema")
    assert {each.name for each in tmp_path.iterdir()} == {".out.distavg-export"}
    texts = []
    original = export_module.ExportFiles.create

    def create(files: Any, folder: Path) -> None:
        original(files, folder)
        texts.append(error_of(averager.export, tmp_path / "out", "swa"))

    with mock.patch.object(export_module.ExportFiles, "create", create):
        averager.export(tmp_path / "out", "ema")
    assert "another save to this path is under way" in texts[0]
    assert {each.name for each in tmp_path.iterdir()} == {"out"}


def test_targets_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    averager = Averager(nn.Linear(1, 1), EMA())
    monkeypatch.chdir(tmp_path)
    for target in (".", "/", tmp_path):
        with pytest.raises(CheckpointExists, match="cannot be replaced as a whole"):
            averager.export(target)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    averager.export("link/")
    assert (tmp_path / "there" / "model.safetensors").exists()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("dtype", ["int8", "fp8", "", 3, torch.int64, "Tensor"])
def test_dtypes_that_cannot_be(dtype: Any, tmp_path: Path) -> None:
    averager = Averager(nn.Linear(1, 1), EMA())
    with pytest.raises(ConfigError, match=r"is none of fp64, fp32, fp16, bf16"):
        averager.export(tmp_path / "out", dtype=dtype)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("1.5MiB", 3 * 2**19), ("200kb", 200_000), (300, 300), ("7", 7)],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 TB", "0", 0, "1e3", None])
def test_sizes_that_cannot_be(text: Any) -> None:
    with pytest.raises(ConfigError, match="is not a size such as"):
        parse_size(text)


# --------------------------------------------------------------------------------------- the plan


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    offsets = [draw(st.integers(0, size - 1)) for size in shape]
    sizes = [draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True)]
    return shape, Box(tuple(offsets), tuple(sizes))


@given(boxes())
def test_runs_are_where_the_elements_of_a_box_lie(case: tuple[tuple[int, ...], Box]) -> None:
    shape, box = case
    whole = torch.arange(math.prod(shape)).reshape(shape)
    length = export_module._run_length(shape, box)
    found = [
        index
        for start in export_module._run_starts(shape, box)
        for index in range(start, start + length)
    ]
    assert found == whole[box.slices()].flatten().tolist()


def test_a_tensor_larger_than_a_file_has_one_of_its_own() -> None:
    tensors = {
        n: SavedTensor(n, (size,), "float32", ())
        for n, size in zip("abcd", (1, 9, 1, 1), strict=True)
    }
    files = plan_export(tensors, None, 10)
    assert [files.places[name][0][6:11] for name in "abcd"] == ["00001", "00002", "00003", "00003"]


def pieces_of(shape: tuple[int, ...]) -> Iterator[Box]:
    with mock.patch.object(read, "_PIECE_ELEMENTS", 7):
        reader = read.AverageReader.__new__(read.AverageReader)
        reader.average = mock.Mock(tensors={"a": mock.Mock(shape=shape)})
        with mock.patch.object(read.AverageReader, "part", lambda self, fqn, box: box):
            yield from (box for box, _ in reader.pieces("a"))


def test_tensors_are_read_in_pieces() -> None:
    found = list(pieces_of((5, 3, 2)))
    assert all(box.numel <= 7 for box in found)
    assert sum(box.numel for box in found) == 30
    assert len(found) >= 5
