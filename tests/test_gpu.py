"""What users do on a GPU, with a twin of each body on the CPU; and what only a GPU shows.

    pytest -m gpu

Values are compared with PyTorch's AveragedModel beside the same run, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checks import cloned, differences
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import distavg
from distavg import EMA, SWA, Averager, Custom, StateError

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
PLACES = pytest.mark.parametrize("place", [None, "cpu"], ids=["beside", "on host"])


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def built(device: torch.device | str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)
    )
    return model.to(device, dtype)


def images(device: torch.device | str, seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)


def train(
    model: nn.Module, optimizer: Optimizer, after_step: Callable[[], object], steps: int = 4
) -> None:
    parameter = next(model.parameters())
    for step in range(steps):
        model(images(parameter.device, step).to(parameter.dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().cpu().clone() for name, each in model.named_parameters()}


def found(averager: Averager, model: nn.Module, name: str = "ema") -> dict[str, Tensor]:
    whole = averager.full_state_dict(name, all_ranks=True)
    return {name: whole[name] for name in parameters(model)}


def check(averager: Averager, oracle: AveragedModel) -> None:
    """The average is the oracle's: bit for bit, but for a GPU's and its host's own roundings."""
    expected = parameters(oracle.module)
    whole = averager.full_state_dict(all_ranks=True)
    got = {name: whole[name] for name in expected}
    devices = {shard.tensor.device.type for shard in averager["ema"].shards()}
    if devices == {next(oracle.parameters()).device.type}:
        assert differences(got, expected) == []
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-7)


def trained(
    on: torch.device | str, **options: Any
) -> tuple[nn.Module, Averager, Optimizer, AveragedModel]:
    model = built(on)
    averager = Averager(model, EMA(0.9), **options)
    optimizer = AdamW(model.parameters(), lr=0.01)
    averager.attach(optimizer)
    oracle = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, optimizer, lambda: oracle.update_parameters(model))
    return model, averager, optimizer, oracle


@PLACES
def test_training_gives_the_bits_of_torch(device: torch.device, place: str | None) -> None:
    _, averager, _, oracle = trained(device, device=place)
    check(averager, oracle)


@PLACES
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_bf16_weights(device: torch.device, place: str | None, dtype: torch.dtype | None) -> None:
    model = built(device, torch.bfloat16)
    averager = Averager(model, EMA(0.5), device=place, dtype=dtype)
    optimizer = SGD(model.parameters(), lr=0.1)
    averager.attach(optimizer)
    expected: dict[str, Tensor] = {}
    kept = dtype or torch.float32

    def follow() -> None:
        for name, live in parameters(model).items():
            old = expected.setdefault(name, live.to(kept))
            torch._foreach_lerp_([old], [live.to(kept)], 0.5)

    train(model, optimizer, follow)
    if kept == torch.float32:
        assert differences(found(averager, model), expected) == []
    else:  # kernels of the two devices round half precision differently
        for name, value in found(averager, model).items():
            torch.testing.assert_close(value, expected[name], rtol=2**-6, atol=2**-8)


@PLACES
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_in_place_and_back(
    device: torch.device, place: str | None, dtype: torch.dtype | None
) -> None:
    model, averager, optimizer, oracle = trained(device, device=place, dtype=dtype)
    before = cloned(model.state_dict())
    generator = torch.get_rng_state()
    with averager.applied():
        model(images(device))
        inside = parameters(model)
        torch.rand(3, device=device)
    assert differences(model.state_dict(), before) == []
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in parameters(oracle.module).items():
        torch.testing.assert_close(inside[name], value, rtol=1e-6, atol=1e-7)
    train(model, optimizer, lambda: oracle.update_parameters(model))
    if dtype is None:
        check(averager, oracle)


@PLACES
def test_checkpoints_and_exports(device: torch.device, place: str | None, tmp_path: Path) -> None:
    _, averager, _, _ = trained(device, device=place)
    expected = averager.full_state_dict()
    averager.save(tmp_path / "now")
    handle = averager.save(tmp_path / "later", block=False)
    averager.export(tmp_path / "export")
    handle.wait()
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert differences(exported, expected) == []
    for path in ("now", "later"):
        resumed = Averager(built("cpu"), EMA(0.9))
        resumed.load(tmp_path / path)
        averager.load(tmp_path / path)
        for name in averager["ema"].dtypes:
            assert torch.equal(resumed.full_state_dict()[name], expected[name])
            assert torch.equal(averager.full_state_dict()[name], expected[name])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@PLACES
def test_state_for_dcp(device: torch.device, place: str | None, tmp_path: Path) -> None:
    _, averager, _, _ = trained(device, device=place)
    dcp.save({"a": averager}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    resumed = Averager(built(device), EMA(0.9), device=place)
    dcp.load({"a": resumed}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for name in averager["ema"].dtypes:
        assert torch.equal(resumed.full_state_dict()[name], averager.full_state_dict()[name])


@PLACES
def test_recalibration(device: torch.device, place: str | None) -> None:
    model, averager, _, _ = trained(device, device=place)
    batches = [images("cpu", seed) for seed in range(3)]  # moved to the model's device
    averager.recalibrate_batchnorm(batches)
    twin = built("cpu").double()
    with torch.no_grad():
        for name, value in found(averager, model).items():
            twin.get_parameter(name).copy_(value)
    distavg.recalibrate_batchnorm(twin, [batch.double() for batch in batches])
    with averager.applied():
        for key in ("running_mean", "running_var"):
            torch.testing.assert_close(
                model[1].get_buffer(key).cpu().double(), twin[1].get_buffer(key)
            )


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_overflow_do_not_count(device: torch.device, fused: bool) -> None:
    model = built(device)
    averager = Averager(model, EMA(0.9))
    optimizer = AdamW(model.parameters(), lr=0.01, fused=fused)
    averager.attach(optimizer)
    oracle = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    scaler = GradScaler(device.type, init_scale=2.0**10)
    for step in range(5):
        before = parameters(model)
        batch = images(device, step) * (1e30 if step in (0, 3) else 1.0)  # its square overflows
        scaler.scale(model[4](model[0](batch).flatten(1)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        is_skipped = differences(parameters(model), before) == []
        assert is_skipped == (step in (0, 3))
        if not is_skipped:
            oracle.update_parameters(model)
    assert averager.step_count == 3
    check(averager, oracle)


@pytest.mark.filterwarnings("ignore")  # of the compilers, while they are imported
def test_a_compiled_model(device: torch.device) -> None:
    model = built(device)
    compiled = torch.compile(model, backend="inductor" if device.type == "cuda" else "aot_eager")
    averager = Averager(compiled, EMA(0.9))
    optimizer = SGD(model.parameters(), lr=0.1)
    averager.attach(optimizer)
    oracle = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(compiled, optimizer, lambda: oracle.update_parameters(model), steps=2)
    compiled.eval()
    live = compiled(images(device)).detach().clone()
    with averager.applied():
        average = compiled(images(device)).detach()
        torch.testing.assert_close(average, oracle.module.eval()(images(device)))
    torch.testing.assert_close(compiled(images(device)), live)


@contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    """A job of one rank, over NCCL on a GPU."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@PLACES
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_a_job_of_one_rank(
    device: torch.device, wrapper: str, place: str | None, tmp_path: Path
) -> None:
    with one_rank(device):
        model = built(device)
        expected = trained(device)[3]
        if wrapper == "ddp":
            wrapped: nn.Module = DistributedDataParallel(model)
        else:
            wrapped = fully_shard(model, mesh=init_device_mesh(device.type, (1,)))
        averager = Averager(wrapped, EMA(0.9), device=place)
        optimizer = AdamW(wrapped.parameters(), lr=0.01)
        averager.attach(optimizer)
        train(wrapped, optimizer, lambda: None)
        averager.recalibrate_batchnorm([images(device)])
        with averager.applied():
            wrapped(images(device))
        averager.save(tmp_path / "c")
        averager.load(tmp_path / "c")
        whole = averager.full_state_dict(all_ranks=True)
    for name, value in parameters(expected.module).items():
        torch.testing.assert_close(whole[name], value, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------- only on a GPU

_LONG = 200_000_000  # cycles of a GPU: a tenth of a second


@pytest.mark.gpu
@PLACES
def test_an_update_comes_after_the_optimizer(place: str | None) -> None:
    model = nn.Linear(64, 64, bias=False, device="cuda")
    averager = Averager(model, SWA(update_interval="1ba"), device=place)
    optimizer = SGD(model.parameters(), lr=1.0)
    averager.attach(optimizer)
    with torch.no_grad():
        model.weight.zero_()
    for _ in range(3):
        model.weight.grad = torch.full_like(model.weight, -1.0)
        torch.cuda._sleep(_LONG)  # the step is queued long before it is done
        optimizer.step()
    assert (averager.full_state_dict()["weight"] == 2.0).all()  # of 1, 2 and 3


@pytest.mark.gpu
@PLACES
def test_the_next_step_waits_for_the_update(place: str | None) -> None:
    def slow_sum(averaged: list[Tensor], live: list[Tensor], num_updates: int) -> None:
        if place is None:
            torch.cuda._sleep(_LONG)  # in which the optimizer could write to the weights
        torch._foreach_add_(averaged, live)

    model = nn.Linear(64, 64, bias=False, device="cuda")
    averager = Averager(model, {"a": Custom(multi_avg_fn=slow_sum)}, device=place)
    optimizer = SGD(model.parameters(), lr=1.0)
    averager.attach(optimizer)
    with torch.no_grad():
        model.weight.zero_()
    averager.synchronize()
    for _ in range(5):
        model.weight.grad = torch.full_like(model.weight, -1.0)
        optimizer.step()
    with averager.applied():  # which writes to the weights, too
        assert (model.weight == 1 + 2 + 3 + 4 + 5).all()
    assert (model.weight == 5.0).all()


@pytest.mark.gpu
@PLACES
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_steady_step_neither_waits_nor_allocates(
    place: str | None, dtype: torch.dtype | None
) -> None:
    model = built("cuda")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = SGD(model.parameters(), lr=0.1, fused=True)  # it allocates nothing itself

    def allocations(steps: int) -> int:
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(steps):
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return torch.cuda.memory_stats()["allocation.all.allocated"] - before

    allocations(3)
    alone = allocations(2)
    averager = Averager(
        model, {"ema": EMA(), "swa": SWA(update_interval="1ba")}, device=place, dtype=dtype
    )
    averager.attach(optimizer)
    allocations(3)  # the first update copies
    averager.synchronize()
    assert allocations(2) == alone


@pytest.mark.gpu
def test_host_memory_is_pinned() -> None:
    averager = trained("cuda", device="cpu")[1]
    for shard in averager["ema"].shards():
        assert shard.tensor.device.type == "cpu"
        assert shard.tensor.is_pinned()


@pytest.mark.gpu
def test_an_optimizer_in_a_cuda_graph() -> None:
    model = nn.Linear(8, 8, bias=False, device="cuda")
    optimizer = SGD(model.parameters(), lr=1.0)
    averager = Averager(model, SWA(update_interval="1ba"))
    model.weight.grad = torch.full_like(model.weight, -1.0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        optimizer.step()  # warm-up
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad():
        model.weight.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
        with pytest.raises(StateError, match="step\\(\\) after each replay"):
            averager.step()
    for _ in range(3):
        graph.replay()
        averager.step()
    assert (averager.full_state_dict()["weight"] == 2.0).all()
