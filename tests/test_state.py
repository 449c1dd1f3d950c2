"""An averager's state in PyTorch's distributed checkpoint, and in torch.save."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checks import (
    MULTI_AVG_FNS,
    RULES,
    cloned,
    differences,
    error_of,
    feed,
    storages,
    torch_average,
    trained,
)
from models import Awkward, TokenModel, Uneven, build, set_weights, weights_at
from ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel

from distavg import EMA, Averager, CheckpointMismatch, Clock


def test_the_one_private_class_is_where_it_was() -> None:
    """DCP knows pieces of replicas by this class only; `distavg.state` must follow if it moves."""
    module = importlib.import_module("torch.distributed.tensor._shards_wrapper")
    assert hasattr(module, "LocalShardsWrapper"), (
        "torch moved or renamed torch.distributed.tensor._shards_wrapper.LocalShardsWrapper: "
        "distavg/state.py needs its new place to describe DDP's pieces to DCP"
    )
    wrapper = module.LocalShardsWrapper([torch.zeros(2)], [(0,)])
    assert wrapper.local_shards()[0].shape == (2,)


def save_with_dcp(layout: str, cls: type[TokenModel], folder: Path) -> None:
    model, averager = trained(layout, cls, range(3), clock=Clock(steps_per_epoch=7))
    dcp.save({"model": get_model_state_dict(model), "averager": averager}, checkpoint_id=folder)


def load_with_dcp(layout: str, cls: type[TokenModel], folder: Path) -> list[str]:
    """What is not as it was saved, after a load and after training on from there."""
    model = build(layout, cls, seed=50)
    averager = Averager(model, RULES, clock=Clock(steps_per_epoch=7))
    feed(averager, model, [40])  # something to be overwritten
    weights = get_model_state_dict(model)
    dcp.load({"model": weights, "averager": averager}, checkpoint_id=folder)
    set_model_state_dict(model, weights)
    wrong = []
    for steps in (range(3), range(5)):
        feed(averager, model, steps[3:])
        assert averager.step_count == len(steps)
        assert averager._position.epochs == Fraction(len(steps), 7)
        for name in averager.names:
            assert averager[name].num_updates == len(steps)
            found = averager.full_state_dict(name, all_ranks=True)
            wrong += differences(found, torch_average(cls, name, steps))
    return wrong


@pytest.mark.parametrize(
    ("saved", "loaded", "cls"),
    [
        (("fsdp2", 2), ("fsdp2", 3), Uneven),
        (("fsdp2-keep", 4), ("plain", 1), Uneven),
        (("ddp", 2), ("ddp", 3), Awkward),
        (("fsdp2", 3), ("ddp", 2), Uneven),
        (("plain", 1), ("ddp", 4), Awkward),
        (("fsdp1", 3), ("hsdp", 4), Uneven),
        (("hsdp", 4), ("fsdp1-flat", 2), Uneven),
        (("fsdp1-hybrid", 4), ("tp-fsdp2", 4), Uneven),
        (("tp-fsdp2", 4), ("fsdp2", 3), Uneven),
        (("fsdp1-no-shard", 2), ("ddp", 3), Uneven),
    ],
    ids=str,
)
def test_dcp_reshards_the_averages_bit_for_bit(
    saved: tuple[str, int], loaded: tuple[str, int], cls: type[TokenModel], tmp_path: Path
) -> None:
    run_ranks(save_with_dcp, saved[1], saved[0], cls, tmp_path)
    assert run_ranks(load_with_dcp, loaded[1], loaded[0], cls, tmp_path) == [[]] * loaded[1]


def save_in_storage(layout: str, folder: Path, storage: str, is_async: bool) -> None:
    model, averager = trained(layout, Uneven, range(3))
    state = {"averager": averager, "scheduler": torch.arange(4.0)}
    writer = {
        "files": lambda: dcp.FileSystemWriter(folder),
        "safetensors": lambda: HuggingFaceStorageWriter(str(folder), save_distributed=True),
    }[storage]()
    if is_async:  # while it writes, training goes on
        group = dist.new_group(backend="gloo")
        saving = dcp.async_save(state, storage_writer=writer, process_group=group)
        feed(averager, model, [3, 4])
        saving.result()
    else:
        dcp.save(state, storage_writer=writer)


def load_from_storage(layout: str, folder: Path, storage: str) -> list[str]:
    averager = Averager(build(layout, Uneven, seed=50), RULES)
    reader = {
        "files": lambda: dcp.FileSystemReader(folder),
        "safetensors": lambda: HuggingFaceStorageReader(str(folder)),
    }[storage]()
    scheduler = torch.zeros(4)
    dcp.load({"averager": averager, "scheduler": scheduler}, storage_reader=reader)
    wrong = [] if scheduler.tolist() == [0, 1, 2, 3] else ["scheduler"]
    for name in averager.names:
        if averager[name].num_updates != 3:
            wrong.append(f"{name}: {averager[name].num_updates} updates")
        found = averager.full_state_dict(name, all_ranks=True)
        expected = torch_average(Uneven, name, range(3))
        held = averager[name].dtypes
        wrong += differences({n: found[n] for n in held}, {n: expected[n] for n in held})
    return wrong


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("storage", "saved", "loaded"),
    [
        ("files", ("ddp", 3), ("fsdp2", 2)),
        ("files", ("fsdp1", 2), ("ddp", 3)),
        ("safetensors", ("fsdp2", 3), ("ddp", 2)),
        ("safetensors", ("plain", 1), ("fsdp1", 2)),
        ("safetensors", ("hsdp", 4), ("fsdp2", 3)),
    ],
    ids=str,
)
def test_dcps_storages(
    storage: str, saved: tuple[str, int], loaded: tuple[str, int], tmp_path: Path, *, is_async: bool
) -> None:
    run_ranks(save_in_storage, saved[1], saved[0], tmp_path, storage, is_async)
    assert run_ranks(load_from_storage, loaded[1], loaded[0], tmp_path, storage) == [[]] * loaded[1]


@pytest.mark.filterwarnings("ignore")  # DCP has its own without a process group
def test_dcp_loads_without_a_process_group(tmp_path: Path) -> None:
    run_ranks(save_with_dcp, 2, "ddp", Awkward, tmp_path)
    assert load_with_dcp("plain", Awkward, tmp_path) == []


def references(layout: str) -> list[str]:
    """Parts of the state that do not follow the averages: it must be references, not copies."""
    model, averager = trained(layout, Uneven if "fsdp" in layout else Awkward)
    state = averager.state_dict()
    feed(averager, model, [7])
    again = averager.state_dict()
    wrong = []
    for name in averager.names:
        first, second = pieces(state, name), pieces(again, name)
        wrong += differences(first, second)
        wrong += [n for n in first if first[n].data_ptr() != second[n].data_ptr()]
        owned = sum(shard.tensor.numel() for shard in averager[name].shards())
        assert sum(tensor.numel() for tensor in first.values()) == owned
    return wrong


def pieces(state: Any, name: str) -> dict[str, torch.Tensor]:
    found = {}
    for fqn, tensor in state["averages"][name]["tensors"].items():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        parts = local.local_shards() if hasattr(local, "local_shards") else [local]
        found |= {f"{fqn} {index}": part for index, part in enumerate(parts)}
    return found


@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp2"])
def test_the_state_is_made_of_references(layout: str) -> None:
    assert run_ranks(references, 3, layout) == [[]] * 3


def torch_save_of(layout: str, folder: Path) -> tuple[list[str], str, list[str]]:
    """What a copy of the own state does not bring back, the error of another rank's, its harm."""
    cls = Uneven if "fsdp" in layout else Awkward
    model, averager = trained(layout, cls)
    rank = dist.get_rank()
    torch.save(averager.state_dict(), folder / f"{rank}.pt")
    feed(averager, model, [7, 8])
    before = {name: cloned(pieces(averager.state_dict(), name)) for name in averager.names}
    dist.barrier()
    other = torch.load(folder / f"{(rank + 1) % 2}.pt", weights_only=False)
    text = error_of(averager.load_state_dict, other)
    after = {name: pieces(averager.state_dict(), name) for name in averager.names}
    harm = [n for name in averager.names for n in differences(after[name], before[name])]
    assert averager.step_count == 5
    averager.load_state_dict(torch.load(folder / f"{rank}.pt", weights_only=False))
    wrong = []
    for name in averager.names:
        assert averager[name].num_updates == averager.step_count == 3
        found = averager.full_state_dict(name, all_ranks=True)
        wrong += differences(found, torch_average(cls, name, range(3)))
    return wrong, text, harm


@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp2"])
def test_a_copy_by_torch_save_is_of_one_rank(layout: str, tmp_path: Path) -> None:
    for wrong, text, harm in run_ranks(torch_save_of, 2, layout, tmp_path):
        assert wrong == []
        assert text.startswith("CheckpointMismatch: ")
        assert "reshard, use Averager.save and load" in text
        assert harm == []


def refusal(change: Any) -> tuple[str, list[str]]:
    """The error of loading a state that was changed, and what it harmed."""
    model, averager = trained("plain", Awkward)
    state = OrderedDict(averager.state_dict())
    state = _copied(state)
    state._metadata = averager.state_dict()._metadata  # type: ignore[attr-defined]
    feed(averager, model, [7])
    change(state)
    before = {name: cloned(pieces(averager.state_dict(), name)) for name in averager.names}
    text = error_of(averager.load_state_dict, state)
    harm = [
        fqn
        for name in averager.names
        for fqn in differences(pieces(averager.state_dict(), name), before[name])
    ]
    if averager.step_count != 4:
        harm.append("step_count")
    return text, harm


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return type(value)((key, _copied(each)) for key, each in value.items())
    return value.detach().clone()


def drop_average(state: Any) -> None:
    del state["averages"]["swa"]


def drop_tensor(state: Any) -> None:
    del state["averages"]["swa"]["tensors"]["scalar"]


def other_shape(state: Any) -> None:
    state["averages"]["swa"]["tensors"]["one"] = torch.zeros(2)


def other_dtype(state: Any) -> None:
    tensors = state["averages"]["swa"]["tensors"]
    tensors["one"] = tensors["one"].double()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_average, "the state has no average 'swa', only ['ema']"),
        (drop_tensor, "scalar: the state of average 'swa' has no box at ()"),
        (other_shape, "one: the state of average 'swa' has no box at (0,) of sizes (1,)"),
        (other_dtype, "one: the state of average 'swa' holds torch.float64"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change: Any, message: str) -> None:
    text, harm = refusal(change)
    assert text.startswith("CheckpointMismatch: ")
    assert message in text
    assert harm == []


def test_a_resume_goes_on_where_the_warm_up_was() -> None:
    """The counters come back: the next update does not copy."""
    model = nn.Linear(2, 2)
    averager = Averager(model, EMA(0.9))
    oracle = AveragedModel(model, multi_avg_fn=MULTI_AVG_FNS["ema"])
    for step in range(2):
        set_weights(model, weights_at(model, step))
        averager.step()
        oracle.update_parameters(model)
    resumed = Averager(model, EMA(0.9))
    resumed.load_state_dict(averager.state_dict())
    set_weights(model, weights_at(model, 2))
    resumed.step()
    oracle.update_parameters(model)
    assert differences(resumed.full_state_dict(), oracle.module.state_dict()) == []


def test_averages_without_updates_save_what_they_read_as(tmp_path: Path) -> None:
    model = build("plain", Awkward)
    averager = Averager(model, EMA(0.9))
    copied = _copied(averager.state_dict())["averages"]["ema"]["tensors"]
    live = storages(model)
    assert differences(copied, {fqn: live[fqn] for fqn in copied}) == []


def test_loading_what_is_no_state_is_an_error() -> None:
    averager = Averager(nn.Linear(1, 1), EMA())
    with pytest.raises(CheckpointMismatch, match="this is not the state of an Averager"):
        averager.load_state_dict({"model": {}})
