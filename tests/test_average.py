"""One average on one process: its numbers, its memory, its buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import differences, feed, same, storages, torch_average
from models import Awkward, build, floating_buffers, integer_buffers, set_weights, weights_at
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distavg import EMA, SWA, Average, Averager, ConfigError, Rule


def averager_of(model: nn.Module, rule: Rule, **options: Any) -> tuple[Averager, Average]:
    averager = Averager(model, {"a": rule}, **options)
    return averager, averager["a"]


def tensors_of(average: Average) -> dict[str, Tensor]:
    return {shard.fqn: shard.tensor for shard in average.shards()}


@pytest.mark.parametrize("name", ["ema", "swa"])
def test_updates_are_those_of_torch_bit_for_bit(name: str) -> None:
    model = build("plain", Awkward)
    averager, average = averager_of(
        model, {"ema": EMA(0.9), "swa": SWA(update_interval=None)}[name]
    )
    for step in range(5):
        set_weights(model, weights_at(model, step))
        averager.update()
        expected = torch_average(Awkward, name, range(step + 1))
        found = tensors_of(average)
        assert differences(found, {fqn: expected[fqn] for fqn in found}) == []
        assert average.num_updates == step + 1


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_the_first_update_copies_over_nan(dtype: torch.dtype | None) -> None:
    model = build("plain", Awkward)
    averager, average = averager_of(model, EMA(0.9), dtype=dtype)
    for tensor in average.tensors:
        tensor.fill_(torch.nan)
    averager.update()
    expected = {n: w.to(dtype or w.dtype) for n, w in weights_at(model, 0).items()}
    assert differences(tensors_of(average), expected) == []
    averager.update()
    assert not any(tensor.isnan().any() for tensor in average.tensors)


def stalls(dtype: torch.dtype) -> float:
    """Where AveragedModel, started from 1, is after 2000 updates with bf16 or fp32 weights of 2."""
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.ones_(model.weight)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    averaged.update_parameters(model)
    nn.init.constant_(model.weight, 2)
    for _ in range(2000):
        averaged.update_parameters(model)
    value: float = averaged.module.weight.item()
    return value


def test_averages_of_bf16_weights_do_not_stall() -> None:
    assert stalls(torch.bfloat16) == 1.0  # what PyTorch does: the defect
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    averager, average = averager_of(model, EMA(0.999))
    averager.update()
    nn.init.constant_(model.weight, 2)
    for _ in range(2000):
        averager.update()
    (tensor,) = average.tensors
    assert tensor.dtype == torch.float32
    # bf16 holds 1 and 2 exactly, so the fp32 reference sees the same weights: the same bits.
    assert tensor.item() == stalls(torch.float32)


@pytest.mark.parametrize(
    ("live", "dtype", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_the_dtype_of_an_average(
    live: torch.dtype, dtype: torch.dtype | None, expected: torch.dtype
) -> None:
    _, average = averager_of(nn.Linear(3, 2, dtype=live), EMA(0.5), dtype=dtype)
    assert {tensor.dtype for tensor in average.tensors} == {expected}
    assert average.dtypes == {"weight": expected, "bias": expected}
    assert average.nbytes == 8 * expected.itemsize


def test_a_dtype_that_cannot_average_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"average 'a': dtype=torch\.int64 is not a floating"):
        averager_of(nn.Linear(1, 1), EMA(0.5), dtype=torch.int64)


def test_before_the_first_update_it_reads_as_the_live_weights() -> None:
    model = build("plain", Awkward)
    averager, average = averager_of(model, EMA(0.9), buffers="averaged")
    for step in range(2):
        set_weights(model, weights_at(model, step, buffers=True))
        live = storages(model)
        found = tensors_of(average)
        assert differences(found, {fqn: live[fqn] for fqn in found}) == []
    assert average.num_updates == 0
    set_weights(model, weights_at(model, 5))
    averager.update()
    assert same(tensors_of(average)["one"], storages(model)["one"])


def test_its_memory_is_taken_when_it_is_built() -> None:
    model = build("plain", Awkward)
    averager, average = averager_of(model, EMA(0.9))
    pointers = [tensor.data_ptr() for tensor in average.tensors]
    assert average.nbytes == sum(weight.nbytes for weight in weights_at(model, 0).values())
    for _ in range(3):
        averager.update()
    assert [tensor.data_ptr() for tensor in average.tensors] == pointers


def buffers_after(mode: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The average's buffers after three updates, and the live ones at each of them."""
    model = build("plain", Awkward)
    averager = Averager(model, EMA(0.75), buffers=mode)
    seen = []
    for step in range(3):
        set_weights(model, weights_at(model, step, buffers=True))
        for _, buffer in integer_buffers(model):
            buffer.copy_(torch.full_like(buffer, 3 * step + 1))
        averager.step()
        seen.append({name: buffer.clone() for name, buffer in model.named_buffers()})
    set_weights(model, weights_at(model, 9, buffers=True))
    seen.append({name: buffer.clone() for name, buffer in model.named_buffers()})
    whole = averager.full_state_dict()
    return {name: whole[name] for name, _ in model.named_buffers()}, seen


def test_live_buffers_are_read_from_the_model() -> None:
    found, seen = buffers_after("live")
    assert differences(found, seen[-1]) == []


def test_copied_buffers_are_those_of_the_last_update() -> None:
    found, seen = buffers_after("copied")
    assert differences(found, seen[2]) == []


def test_averaged_buffers_follow_the_rule_and_integers_are_copied() -> None:
    found, seen = buffers_after("averaged")
    expected = dict(seen[2])
    for name, _ in floating_buffers(build("plain", Awkward)):
        first, second, third = (each[name] for each in seen[:3])
        expected[name] = torch.lerp(torch.lerp(first, second, 0.25), third, 0.25)
    assert differences(found, expected) == []


def test_buffers_under_every_mode_are_those_of_torch() -> None:
    for mode, use_buffers in (("copied", False), ("averaged", True)):
        model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
        model.register_buffer("scale", torch.zeros(3))
        averaged = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers
        )
        averager = Averager(model, EMA(0.9), buffers=mode)
        for step in range(4):
            set_weights(model, weights_at(model, step, buffers=True))
            averaged.update_parameters(model)
            averager.step()
        assert differences(averager.full_state_dict(), averaged.module.state_dict()) == []


def test_a_decay_of_zero_follows_the_live_weights() -> None:
    model = build("plain", Awkward)
    averager = Averager(model, EMA(0.0))
    feed(averager, model, range(3))
    live = storages(model)
    found = tensors_of(averager["ema"])
    assert differences(found, {fqn: live[fqn] for fqn in found}) == []
