"""BatchNorm statistics over all ranks' batches; an oracle that sees every element at once."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checks import cloned, differences, error_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import mesh_of
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn

import distavg
import distavg.checkpoint.read
from distavg import EMA, Averager, recalibrate_batchnorm

DOUBLE = torch.float64


class Network(nn.Module):
    """BatchNorm behind convolutions, dropout and a linear layer, one of them used twice."""

    def __init__(self, dropout: float = 0.5, dtype: torch.dtype = DOUBLE) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.first = nn.BatchNorm2d(5)
        self.twice = nn.BatchNorm2d(5, momentum=None)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(5, 7)
        self.last = nn.BatchNorm1d(7, affine=False)
        self.live = nn.BatchNorm2d(5, track_running_stats=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        generator = torch.Generator().manual_seed(0)
        for tensor in self.parameters():
            nn.init.uniform_(tensor, 0.5, 1.5, generator=generator)
        self.to(dtype)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        hidden = self.live(self.conv(images)) + images.mean()
        hidden = self.twice(torch.relu(self.first(hidden)))
        hidden = self.twice(hidden * 2 + 1)
        hidden = self.dropout(hidden).mean((2, 3))
        return self.last(self.linear(hidden))


def data(sizes: list[int], dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    """Batches of these sizes; each differs from the others in mean and scale."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn((size, 3, 5, 4), generator=generator, dtype=DOUBLE).mul(1 + i).add(i).to(dtype)
        for i, size in enumerate(sizes)
    ]


SIZES = [4, 2, 7, 1, 3, 3, 5]
LAYERS = ["first", "twice", "last"]


def oracle(model: Network, batches: list[Tensor]) -> dict[str, Tensor]:
    """Of each layer's inputs, all kept: mean, and variance with Bessel's correction; the calls."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in LAYERS}
    for name in LAYERS:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs[name].append(args[0].detach().double())
        )
    model.train()
    model.dropout.eval()
    with mock.patch("torch.nn.functional._verify_batch_size"):  # a batch of one is one, too
        for batch in batches:
            model(batch)
    found = {}
    for name in LAYERS:
        values = torch.cat([each.transpose(0, 1).flatten(1) for each in inputs[name]], dim=1)
        found[f"{name}.running_mean"] = values.mean(1)
        found[f"{name}.running_var"] = values.var(1)
        found[f"{name}.num_batches_tracked"] = torch.tensor(len(inputs[name]))
    return found


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics by plain names."""
    return {
        ".".join(name.split(".")[-2:]): buffer.detach().clone()
        for name, buffer in model.named_buffers()
        if "steps" not in name
    }


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, check_dtype=False)


def wrap(layout: str, model: nn.Module) -> nn.Module:
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "fsdp2":
        for name in ("conv", "first", "linear"):
            fully_shard(model.get_submodule(name), mesh=mesh_of("fsdp2"))
        return fully_shard(model, mesh=mesh_of("fsdp2"))
    if layout == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if layout == "compiled":
        return torch.compile(model, backend="eager")
    return model


# ----------------------------------------------------------------------------------- the definition


def test_pooled_statistics_are_those_of_all_elements() -> None:
    model = Network()
    recalibrate_batchnorm(model, data(SIZES))
    assert_close(statistics(model), oracle(Network(), data(SIZES)))


def test_per_batch_is_update_bn() -> None:
    sizes = [size for size in SIZES if size > 1]
    model, reference = Network(dropout=0.0), Network(dropout=0.0)
    recalibrate_batchnorm(model, data(sizes), estimator="per_batch")
    update_bn(data(sizes), reference)
    assert_close(statistics(model), statistics(reference))
    with pytest.raises(distavg.ConfigError, match=r"one value per channel.*pooled"):
        recalibrate_batchnorm(model, data([3, 1]), estimator="per_batch")


def test_large_means_do_not_cancel() -> None:
    model = nn.BatchNorm1d(3)
    values = torch.randn(4096, 3, dtype=DOUBLE) + 1e4
    recalibrate_batchnorm(model, values.float().split(17))
    torch.testing.assert_close(model.running_var.double(), values.var(0), rtol=1e-3, atol=0)
    torch.testing.assert_close(model.running_mean.double(), values.mean(0), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_inputs_are_measured_in_fp32(dtype: torch.dtype) -> None:
    model = nn.BatchNorm1d(3).to(dtype)
    values = (torch.randn(512, 3) * 3 + 100).to(dtype)
    recalibrate_batchnorm(model, values.split(100))
    eps = max(torch.finfo(dtype).eps, 2e-6)
    for found, expected in (
        (model.running_mean, values.double().mean(0)),
        (model.running_var, values.double().var(0)),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=eps, atol=0)


def test_autocast_is_the_callers() -> None:
    seen = []
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recalibrate_batchnorm(model, [torch.randn(8, 4)])
    recalibrate_batchnorm(model, [torch.randn(8, 4)])
    assert seen == [torch.bfloat16, torch.float32]
    assert model[1].running_mean.dtype == torch.float32


def spread_out(layout: str, owners: list[int], estimator: str) -> tuple[dict[str, Tensor], str]:
    """The statistics when each batch is on the rank that owns it, and whether ranks have others."""
    model = wrap(layout, Network(dropout=0.0))
    if layout == "compiled":
        model.eval()(data([2])[0])
    mine = [b for b, o in zip(data(SIZES), owners, strict=True) if o == dist.get_rank()]
    recalibrate_batchnorm(model, iter(mine), estimator=estimator)
    found = statistics(model)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    return found, str([differences(found, each) for each in gathered])


OWNERS = {
    1: [[0, 0, 0, 0, 0, 0, 0]],
    2: [[0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    3: [[2, 0, 2, 2, 2, 0, 1], [1, 2, 1, 2, 1, 1, 1]],
    4: [[3, 3, 0, 1, 2, 2, 2], [1, 1, 3, 1, 1, 3, 3]],
}


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        *itertools.product(["plain", "ddp", "fsdp2"], [1, 2, 3, 4]),
        *itertools.product(["fsdp1", "compiled"], [1, 3]),
    ],
)
def test_any_division_of_the_batches_among_ranks(layout: str, size: int) -> None:
    """Ranks without a batch included; no forward waits for another, and all ranks agree."""
    expected = oracle(Network(dropout=0.0), data(SIZES))
    for owners in OWNERS[size]:
        for found, others in run_ranks(spread_out, size, layout, owners, "pooled"):
            assert_close(found, expected)
            assert others == str([[]] * size)


def split_up(cuts: list[int], owners: list[int]) -> Tensor:
    """The statistics of one layer, stacked, when these pieces of the data are on these ranks."""
    model = nn.BatchNorm1d(3, dtype=DOUBLE)
    values = torch.randn((40, 3), generator=torch.Generator().manual_seed(0), dtype=DOUBLE) * 5 + 9
    pieces = torch.tensor_split(values, sorted(cuts))
    mine = [p for p, o in zip(pieces, owners, strict=False) if o == dist.get_rank()]
    recalibrate_batchnorm(model, mine)
    expected = torch.stack([values.mean(0), values.var(0)])
    found = torch.stack([model.running_mean, model.running_var])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_split_of_the_data(size: int) -> None:
    @settings(max_examples=20, suppress_health_check=[HealthCheck.differing_executors])
    @given(
        st.lists(st.integers(0, 40), max_size=9),
        st.lists(st.integers(0, size - 1), min_size=10, max_size=10),
    )
    def holds(cuts: list[int], owners: list[int]) -> None:
        first, *others = run_ranks(split_up, size, cuts, owners)
        assert all(torch.equal(first, each) for each in others)

    holds()


def spread_per_batch() -> dict[str, Tensor]:
    model = Network(dropout=0.0)
    recalibrate_batchnorm(model, data([3, 5, 4])[dist.get_rank() :: 2], estimator="per_batch")
    return statistics(model)


def test_per_batch_over_ranks_is_update_bn_over_all() -> None:
    reference = Network(dropout=0.0)
    update_bn(data([3, 5, 4]), reference)
    for found in run_ranks(spread_per_batch, 2):
        assert_close(found, statistics(reference))


# -------------------------------------------------------------------------------- what is disturbed


def test_nothing_else_changes() -> None:
    model = Network()
    model.first.momentum = 0.3
    model.linear.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    others = cloned({n: t for n, t in model.state_dict().items() if not is_statistic(n)})
    torch.manual_seed(3)
    state = torch.get_rng_state()
    seen: list[tuple[bool, bool]] = []
    model.register_forward_hook(
        lambda module, args, output: seen.append((output.requires_grad, module.dropout.training))
    )

    def batches() -> Iterator[Tensor]:
        torch.rand(3)  # as a DataLoader that shuffles
        yield from data(SIZES)

    recalibrate_batchnorm(model, batches())
    assert {name: module.training for name, module in model.named_modules()} == modes
    after = {n: t for n, t in model.state_dict().items() if not is_statistic(n)}
    assert differences(after, others) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == [(False, False)] * len(SIZES)
    assert (model.first.momentum, model.twice.momentum) == (0.3, None)
    assert not model.first._forward_pre_hooks


def test_a_forward_that_raises_changes_nothing() -> None:
    model = Network()
    recalibrate_batchnorm(model, data([3, 4]))
    before, modes = cloned(model.state_dict()), [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match="expected input"):
        recalibrate_batchnorm(model, [*data([2]), torch.ones(2, 9, 5, 4, dtype=DOUBLE)])
    assert differences(model.state_dict(), before) == []
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())
    recalibrate_batchnorm(model, data(SIZES))
    assert_close(statistics(model), oracle(Network(), data(SIZES)))


def one_rank_raises(layout: str, where: str) -> tuple[str, list[str]]:
    model = wrap(layout, Network())
    before = statistics(model)

    def batches() -> Iterator[Tensor]:
        yield from data([3, 4])
        if dist.get_rank() == 1:
            if where == "loader":
                raise OSError("a file is gone")
            yield torch.ones(2, 9, 5, 4, dtype=DOUBLE)

    text = error_of(recalibrate_batchnorm, model, batches())
    return text, differences(statistics(model), before)


@pytest.mark.parametrize(
    ("layout", "where"), [("ddp", "loader"), ("ddp", "forward"), ("fsdp2", "loader")]
)
def test_a_rank_that_raises_makes_all_raise(layout: str, where: str) -> None:
    results = run_ranks(one_rank_raises, 2, layout, where)
    assert all(changed == [] for _, changed in results)
    assert results[1][0].startswith("OSError: a file" if where == "loader" else "RuntimeError: ")
    assert "recalibrating BatchNorm failed. rank 1: " in results[0][0]


# --------------------------------------------------------------------------------- kinds of batches


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, values: Tensor, scale: float = 1.0) -> Tensor:
        return self.norm(input=values * scale)


VALUES = torch.arange(12.0).view(4, 3)
FORMS: list[tuple[Any, Any]] = [
    (VALUES, None),
    ((VALUES, "label"), None),
    ([VALUES, torch.ones(4)], None),
    ({"values": VALUES, "scale": 1.0}, None),
    ({"values": VALUES / 2, "scale": 2.0}, None),
    ({"x": [VALUES]}, lambda model, batch: model(batch["x"][0])),
]


@pytest.mark.parametrize(("batch", "forward"), FORMS)
def test_any_batch(batch: Any, forward: Any) -> None:
    model = Named()
    recalibrate_batchnorm(model, [batch], forward=forward)
    assert torch.equal(model.norm.running_mean, VALUES.mean(0))
    torch.testing.assert_close(model.norm.running_var, VALUES.var(0))


def test_no_more_batches_than_asked_for() -> None:
    model, taken = nn.BatchNorm1d(3), []

    def batches() -> Iterator[Tensor]:
        for batch in torch.randn(9, 4, 3):
            taken.append(batch)
            yield batch

    recalibrate_batchnorm(model, batches(), max_batches=2)
    assert len(taken) == model.num_batches_tracked == 2


def test_a_batch_of_nothing_counts_for_nothing() -> None:
    model = nn.BatchNorm1d(3)
    recalibrate_batchnorm(model, [VALUES[:0], VALUES])
    assert torch.equal(model.running_mean, VALUES.mean(0))
    assert model.num_batches_tracked == 1


# ---------------------------------------------------------------------------------- kinds of layers


def test_frozen_layers_are_left_alone_unless_asked_for() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[0].requires_grad_(False)
    recalibrate_batchnorm(model, [VALUES])
    assert torch.equal(model[0].running_mean, torch.zeros(3))
    assert not torch.equal(model[1].running_mean, torch.zeros(3))
    recalibrate_batchnorm(model, [VALUES], frozen=True)
    assert torch.equal(model[0].running_mean, VALUES.mean(0))
    model.requires_grad_(False)
    with pytest.raises(distavg.ConfigError, match="requires a gradient: frozen=True"):
        recalibrate_batchnorm(model, [VALUES])


def test_a_frozen_layer_normalises_with_its_own_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[0].requires_grad_(False)
    recalibrate_batchnorm(model, [VALUES * 2])
    torch.testing.assert_close(model[1].running_mean, 2 * VALUES.mean(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (6, 3, 4)),
        (nn.BatchNorm2d(3), (6, 3, 4, 2)),
        (nn.BatchNorm3d(3), (6, 3, 4, 2, 2)),
        (nn.SyncBatchNorm(3), (6, 3, 4)),
    ],
)
def test_every_kind(layer: nn.Module, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    if len(shape) == 4:
        values = values.contiguous(memory_format=torch.channels_last)
    recalibrate_batchnorm(layer, values.split(4))
    flat = values.transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean, flat.mean(1))
    torch.testing.assert_close(layer.running_var, flat.var(1))


def synchronised(owners: list[int]) -> Tensor:
    model = nn.SyncBatchNorm(3)
    values = torch.randn(9, 4, 3, generator=torch.Generator().manual_seed(0))
    mine = [v for v, o in zip(values, owners, strict=True) if o == dist.get_rank()]
    recalibrate_batchnorm(model, mine)
    torch.testing.assert_close(model.running_var, values.flatten(0, 1).var(0))
    return model.running_mean


def test_synchronised_layers_do_not_wait_for_each_other() -> None:
    first, second = run_ranks(synchronised, 2, [0, 0, 1, 0, 0, 0, 1, 0, 0])
    assert torch.equal(first, second)


def test_layers_that_are_not_called_keep_what_they_have(caplog: pytest.LogCaptureFixture) -> None:
    model = Network()
    model.spare = nn.BatchNorm1d(2)
    with caplog.at_level(logging.WARNING, "distavg"):
        recalibrate_batchnorm(model, data([4]))
    assert "1 BatchNorm layers were not called" in caplog.text
    assert torch.equal(model.spare.running_var, torch.ones(2))


def mistakes() -> list[str]:
    model = Network()
    different = nn.Sequential(*[nn.BatchNorm1d(3 + dist.get_rank())])
    own = "pooled" if dist.get_rank() else "per_batch"
    return [
        error_of(recalibrate_batchnorm, model, []),
        error_of(recalibrate_batchnorm, model, data([2]), estimator="mean"),
        error_of(recalibrate_batchnorm, model, data([2]), max_batches=0),
        error_of(recalibrate_batchnorm, nn.Linear(2, 2), [torch.ones(2, 2)]),
        error_of(recalibrate_batchnorm, different, [VALUES]),
        error_of(recalibrate_batchnorm, model, data([2]), estimator=own),
    ]


@pytest.mark.parametrize("size", [1, 2])
def test_mistakes_are_told_on_every_rank(size: int) -> None:
    for texts in run_ranks(mistakes, size):
        assert texts[0] == "ConfigError: recalibrating BatchNorm: no rank has a batch"
        assert "estimator='mean' is neither" in texts[1]
        assert "max_batches=0 is not" in texts[2]
        assert "has no BatchNorm layer" in texts[3]
        if size > 1:
            assert "are not alike on all ranks" in texts[4]
            assert "are not alike on all ranks" in texts[5]


# ------------------------------------------------------------------------------------ of an average


def averaged(layout: str, buffers: str = "live") -> tuple[nn.Module, Averager]:
    """Two updates of an EMA, with other weights live."""
    model = wrap(layout, Network(dropout=0.0))
    averager = Averager(model, EMA(0.5), buffers=buffers)
    for factor in (1.5, 0.5, 3.0):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        if factor < 3:
            averager.step()
    return model, averager


def expected_of_average() -> dict[str, Tensor]:
    reference = Network(dropout=0.0)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_((parameter * 1.5).lerp(parameter * 0.75, 0.5))
    return oracle(reference, data(SIZES))


def mine() -> list[Tensor]:
    return data(SIZES)[dist.get_rank() :: dist.get_world_size()]


def whole(averager: Averager) -> dict[str, Tensor]:
    found = averager.full_state_dict(all_ranks=True)
    return {name: tensor for name, tensor in found.items() if is_statistic(name)}


def in_and_out(layout: str, root: str) -> list[Any]:
    model, averager = averaged(layout)
    live = statistics(model)
    averager.recalibrate_batchnorm(mine())
    results: list[Any] = [differences(statistics(model), live)]
    with averager.applied():
        results.append(statistics(model))
    results.append(differences(statistics(model), live))
    results.append(whole(averager))
    averager.save(f"{root}/a")
    averager.export(f"{root}/out")
    _, other = averaged(layout)
    other.load(f"{root}/a")
    results.append(whole(other))
    target = Network()
    other.copy_to(target)
    results.append(statistics(target))
    dcp.save({"averager": averager}, checkpoint_id=f"{root}/dcp")
    fresh_model, fresh = averaged(layout)
    dcp.load({"averager": fresh.state_dict() and fresh}, checkpoint_id=f"{root}/dcp")
    with fresh.applied():
        results.append(statistics(fresh_model))
    fresh.copy_to()
    results.append(statistics(fresh_model))
    return results


@pytest.mark.parametrize(("layout", "size"), [("plain", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp1", 2)])
def test_statistics_belong_to_their_average(tmp_path: Path, layout: str, size: int) -> None:
    """Through applied, whole tensors, save and load, copy_to and PyTorch's checkpoints."""
    expected = expected_of_average()
    for unchanged, applied, restored, *others in run_ranks(in_and_out, size, layout, str(tmp_path)):
        assert unchanged == restored == []
        for found in (applied, *others):
            assert_close(found, expected)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert_close({name: exported[name] for name in expected}, expected)


def elsewhere(layout: str, path: str) -> dict[str, Tensor]:
    _, averager = averaged(layout)
    averager.load(path)
    return whole(averager)


def test_statistics_are_read_on_another_world_size_and_layout(tmp_path: Path) -> None:
    run_ranks(in_and_out, 2, "ddp", str(tmp_path))
    for layout, size in (("plain", 1), ("fsdp2", 3), ("fsdp1", 2)):
        for found in run_ranks(elsewhere, size, layout, str(tmp_path / "a")):
            assert_close(found, expected_of_average())


def test_a_checkpoint_without_statistics_takes_them_away(tmp_path: Path) -> None:
    model, averager = averaged("plain")
    averager.save(tmp_path / "before")
    live = statistics(model)
    averager.recalibrate_batchnorm(data(SIZES))
    averager.load(tmp_path / "before")
    with averager.applied():
        assert differences(statistics(model), live) == []


def test_a_second_recalibration_replaces_the_first(caplog: pytest.LogCaptureFixture) -> None:
    model, averager = averaged("plain")
    averager.recalibrate_batchnorm(data([2, 2]))
    averager.recalibrate_batchnorm(data(SIZES))
    with caplog.at_level(logging.WARNING, "distavg"), averager.applied():
        assert_close(statistics(model), expected_of_average())
    assert caplog.text == ""


def test_updates_since_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    _, averager = averaged("plain")
    averager.recalibrate_batchnorm(data(SIZES))
    averager.step()
    averager.step()
    with caplog.at_level(logging.WARNING, "distavg"):
        for _ in range(2):
            with averager.applied():
                pass
    assert caplog.text.count("has had 2 updates since its BatchNorm statistics") == 1
    caplog.clear()
    averager.recalibrate_batchnorm(data(SIZES))
    averager.step()
    with caplog.at_level(logging.WARNING, "distavg"), averager.applied():
        pass
    assert caplog.text.count("has had 1 updates since") == 1


@pytest.mark.parametrize("buffers", ["copied", "averaged"])
def test_averages_that_hold_buffers_take_them_there(buffers: str, tmp_path: Path) -> None:
    model, averager = averaged("plain", buffers)
    live = statistics(model)
    averager.recalibrate_batchnorm(data(SIZES))
    with averager.applied():
        assert_close(statistics(model), expected_of_average())
    assert differences(statistics(model), live) == []
    averager.save(tmp_path / "a")
    averager.update()
    averager.load(tmp_path / "a")
    assert_close(whole(averager), expected_of_average())


def validate(layout: str) -> list[Any]:
    model, averager = averaged(layout)
    model.train()
    calls = []

    def batches() -> Iterator[Tensor]:
        calls.append(1)
        yield from mine()

    class Loader:
        __iter__ = staticmethod(batches)

    results = []
    for _ in range(2):
        with averager.evaluating(recalibrate=Loader()):
            results.append((statistics(model), any(m.training for m in model.modules())))
    results.append((len(calls), all(m.training for m in model.modules())))
    averager.step()
    with averager.evaluating(recalibrate=Loader(), max_batches=1):
        pass
    return [*results, len(calls)]


@pytest.mark.parametrize(("layout", "size"), [("plain", 1), ("ddp", 2), ("fsdp2", 2)])
def test_one_line_before_each_validation(layout: str, size: int) -> None:
    """Batches are read only where updates were made since; modes come back."""
    for (found, training), (again, _), counts, calls in run_ranks(validate, size, layout):
        assert_close(found, expected_of_average())
        assert differences(found, again) == []
        assert (training, counts, calls) == (False, (1, True), 2)


def test_options_reach_the_pipeline_of_modules() -> None:
    stages = {"a": Network(dropout=0.0), "b": nn.BatchNorm1d(7, dtype=DOUBLE)}
    averager = Averager(stages, EMA(0.5))
    averager.step()
    with pytest.raises(distavg.ConfigError, match="a mapping of modules needs forward="):
        averager.recalibrate_batchnorm(data([3]))
    run: Callable[[Any, Tensor], Tensor] = lambda model, batch: model["b"](model["a"](batch))  # noqa: E731
    averager.recalibrate_batchnorm(data([3]), forward=run)
    assert averager.full_state_dict()["b.num_batches_tracked"] == 1


# ------------------------------------------------------------------------------ what a review found


def test_statistics_follow_the_dtype_of_the_model(tmp_path: Path) -> None:
    _, averager = averaged("plain")
    averager.recalibrate_batchnorm(data(SIZES))
    averager.save(tmp_path / "double")
    half = Averager(Network(dropout=0.0, dtype=torch.bfloat16), EMA(0.5), dtype=DOUBLE)
    half.load(tmp_path / "double")
    half.save(tmp_path / "half")
    half.load(tmp_path / "half")
    assert half.full_state_dict()["first.running_mean"].dtype == torch.bfloat16
    assert distavg.checkpoint.read.verify_checkpoint(tmp_path / "half")[1] == []
    widened, averager = averaged("plain")
    averager.recalibrate_batchnorm(data(SIZES))
    widened.float()
    averager.save(tmp_path / "float")
    averager.load(tmp_path / "float", cast=True)
    assert averager.full_state_dict()["first.running_mean"].dtype == torch.float32


def loader_fails(how: str) -> tuple[str, bool, str]:
    """On rank 1, before the first batch; the error, whether live weights are back, and a sequel."""
    model, averager = averaged("ddp")
    live = cloned(dict(model.named_parameters()))

    class Failing:
        def __iter__(self) -> Iterator[Tensor]:
            raise KeyboardInterrupt if how == "interrupt" else OSError("a file is gone")

    batches: Any = Failing() if dist.get_rank() == 1 else mine()
    try:
        text = error_of(averager.recalibrate_batchnorm, batches)
    except KeyboardInterrupt:
        text = "KeyboardInterrupt"
    is_back = differences(dict(model.named_parameters()), live) == []
    return text, is_back, error_of(averager.recalibrate_batchnorm, mine())


@pytest.mark.parametrize("how", ["error", "interrupt"])
def test_a_loader_that_fails_at_once_or_is_interrupted(how: str) -> None:
    first, second = run_ranks(loader_fails, 2, how)
    assert first[0].startswith("RankError: recalibrating BatchNorm failed. rank 1: ")
    assert second[0] == ("KeyboardInterrupt" if how == "interrupt" else "OSError: a file is gone")
    assert first[1:] == second[1:] == (True, "nothing")


def unlike() -> list[str]:
    class Local:
        values = torch.ones(2, 3, 5, 4, dtype=DOUBLE)

    model = wrap("fsdp2", Network())
    local = [Local()] if dist.get_rank() else []
    _, averager = averaged("ddp")
    some = mine() if dist.get_rank() else None

    def enter() -> None:
        with averager.evaluating(recalibrate=some):
            pass

    unpickled = error_of(recalibrate_batchnorm, model, local, forward=lambda m, b: m(b.values))
    return [unpickled, error_of(enter)]


def test_ranks_that_are_not_alike_are_told() -> None:
    for unpickled, entered in run_ranks(unlike, 2):
        assert "pickle" in unpickled
        assert "recalibrate= is None on some ranks only" in entered


def test_before_the_first_update_statistics_are_the_live_ones() -> None:
    for buffers in ("live", "copied"):
        model = Network(dropout=0.0)
        averager = Averager(model, EMA(0.5, start="9ba"), buffers=buffers)
        with averager.evaluating(recalibrate=data([3])):
            assert torch.equal(model.first.running_mean, torch.zeros(5, dtype=DOUBLE))
        model.first.running_mean.add_(1)
        with averager.evaluating(recalibrate=data([3])):
            assert torch.equal(model.first.running_mean, torch.ones(5, dtype=DOUBLE))
        assert averager.full_state_dict()["first.running_mean"][0] == 1


def test_random_numbers_of_a_data_loader_are_given_back() -> None:
    model, state = Network(), torch.get_rng_state()
    recalibrate_batchnorm(model, torch.utils.data.DataLoader(data([3])[0], batch_size=2))
    assert torch.equal(torch.get_rng_state(), state)


def left_sharded() -> bool:
    model = wrap("fsdp2", Network())
    recalibrate_batchnorm(model, data([3]))
    return all(isinstance(p, DTensor) for p in model.parameters())


def test_parameters_are_sharded_again() -> None:
    assert run_ranks(left_sharded, 2) == [True, True]


def frozen_in_a_flat_parameter() -> list[bool]:
    found = []
    for use_orig_params in (True, False):
        inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(False)
        model = nn.Sequential(
            FullyShardedDataParallel(
                inner, use_orig_params=use_orig_params, device_id=torch.device("cpu")
            ),
            nn.BatchNorm1d(3),
        )
        recalibrate_batchnorm(model, [VALUES])
        found.append(inner[1].num_batches_tracked.item() == 0)
    return found


def test_frozen_layers_of_a_flat_parameter() -> None:
    assert run_ranks(frozen_in_a_flat_parameter, 2) == [[True, True]] * 2


def test_layers_that_are_not_called_again_keep_the_averages_statistics() -> None:
    model = nn.ModuleDict({"a": nn.BatchNorm1d(3), "b": nn.BatchNorm1d(3)})
    averager = Averager(model, EMA(0.5))
    averager.step()
    averager.recalibrate_batchnorm([VALUES], forward=lambda m, x: (m["a"](x), m["b"](x)))
    averager.recalibrate_batchnorm([VALUES * 2], forward=lambda m, x: m["a"](x))
    found = averager.full_state_dict()
    assert torch.equal(found["a.running_mean"], 2 * VALUES.mean(0))
    assert torch.equal(found["b.running_mean"], VALUES.mean(0))
    state = averager.state_dict()
    model["b"].running_mean.add_(1)
    averager.load_state_dict(state)
    assert torch.equal(averager.full_state_dict()["b.running_mean"], VALUES.mean(0))


def test_a_state_has_only_the_statistics_of_the_average() -> None:
    model = nn.ModuleDict({"a": nn.BatchNorm1d(3), "b": nn.BatchNorm1d(3)})
    averager = Averager(model, EMA(0.5))
    averager.step()
    averager.recalibrate_batchnorm([VALUES], forward=lambda m, x: m["a"](x))
    averager.load_state_dict(averager.state_dict())
    model["b"].running_mean.add_(1)
    assert averager.full_state_dict()["b.running_mean"][0] == 1


def test_statistics_of_tied_layers(tmp_path: Path) -> None:
    untied = nn.ModuleDict({"a": nn.BatchNorm1d(3), "b": nn.BatchNorm1d(3)})
    one = nn.BatchNorm1d(3)
    tied = nn.ModuleDict({"a": one, "b": one})
    for name, model, other in (("untied", untied, tied), ("tied", tied, untied)):
        averager = Averager(model, EMA(0.5))
        averager.step()
        averager.recalibrate_batchnorm([VALUES], forward=lambda m, x: (m["a"](x), m["b"](x)))
        averager.save(tmp_path / name)
        read = Averager(other, EMA(0.5))
        read.load(tmp_path / name)
        found = read.full_state_dict()
        assert torch.equal(found["a.running_mean"], VALUES.mean(0))
        assert torch.equal(found["b.running_mean"], VALUES.mean(0))


def test_what_a_forward_may_do() -> None:
    class Odd(nn.BatchNorm1d):
        def forward(self, values: Tensor) -> Tensor:
            return super().forward(values)

    layer = Odd(3)

    def forward(model: nn.Module, values: Tensor) -> None:
        with torch.enable_grad():
            values.requires_grad_()
            model(values=values).sum().backward()

    recalibrate_batchnorm(layer, [VALUES.clone()], forward=forward)
    assert torch.equal(layer.running_mean, VALUES.mean(0))
    with pytest.raises(distavg.ConfigError, match="a lazy BatchNorm layer has no shape yet"):
        recalibrate_batchnorm(nn.LazyBatchNorm1d(), [VALUES])
    averager = Averager(layer, EMA(0.5))
    averager.step()
    with averager.applied(), pytest.raises(distavg.StateError, match="gives them to the average"):
        recalibrate_batchnorm(layer, [VALUES])
