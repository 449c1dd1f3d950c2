"""The drop-in for EMAOptimizer, against the formula that its source computes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checks import differences, error_of
from models import backward, build, whole_weights
from ranks import run_ranks
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from distavg import CheckpointMismatch, StateError, UnsupportedError
from distavg.integrations import EMAOptimizer


class Original:
    """Clones before the first step; updates while a counter from 0 is a multiple."""

    def __init__(self, parameters: Iterable[Tensor], decay: float, every_n_steps: int = 1) -> None:
        self.parameters, self.decay, self.every_n_steps = list(parameters), decay, every_n_steps
        self.current_step = 0
        self.ema: list[Tensor] = []

    def before_step(self) -> None:
        new = self.parameters[len(self.ema) :]
        self.ema += [parameter.detach().clone() for parameter in new]

    def after_step(self) -> None:
        if self.current_step % self.every_n_steps == 0:
            for ema, parameter in zip(self.ema, self.parameters, strict=True):
                ema.mul_(self.decay).add_(parameter.detach(), alpha=1 - self.decay)
        self.current_step += 1


def set_gradients(parameters: Iterable[Tensor], value: float = 1.0) -> None:
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * value


def ema_of(optimizer: EMAOptimizer) -> list[Tensor]:
    return [shard.tensor.clone() for shard in optimizer.averager["ema"].shards()]


def double_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def train(
    optimizer: EMAOptimizer, original: Original, num_steps: int, parameters: list[nn.Parameter]
) -> None:
    for _ in range(num_steps):
        set_gradients(parameters)
        original.before_step()
        optimizer.step()
        original.after_step()
        close(ema_of(optimizer), original.ema)
        optimizer.zero_grad()


@pytest.mark.parametrize("every_n_steps", [1, 4])
def test_the_numbers_of_the_original(every_n_steps: int) -> None:
    model = double_model()
    parameters = list(model.parameters())
    optimizer = EMAOptimizer(SGD(parameters, lr=0.5), torch.device("cpu"), 0.9, every_n_steps)
    original = Original(parameters, 0.9, every_n_steps)
    with torch.no_grad():
        model[0].weight.fill_(3)  # weights that are loaded before the first step are the first
    train(optimizer, original, 12, parameters)


def test_the_defaults_and_a_step_to_begin_at() -> None:
    model = double_model()
    assert EMAOptimizer(SGD(model.parameters(), lr=0.5), "cpu").decay == 0.9999
    optimizer = EMAOptimizer(SGD(model.parameters(), lr=0.5), "cpu", 0.5, 2, 1)
    optimizer.step()
    assert (optimizer.current_step, optimizer.averager["ema"].num_updates) == (2, 1)


def test_weights_are_swapped_and_put_back() -> None:
    model = double_model()
    optimizer = EMAOptimizer(SGD(model.parameters(), lr=0.5), "cpu", 0.9)
    set_gradients(model.parameters())
    optimizer.step()
    live = [parameter.detach().clone() for parameter in model.parameters()]
    ema = ema_of(optimizer)
    with optimizer.swap_ema_weights():
        assert all(map(torch.equal, model.parameters(), ema))
    assert all(map(torch.equal, model.parameters(), live))
    with optimizer.swap_ema_weights(enabled=False):
        assert all(map(torch.equal, model.parameters(), live))
    with pytest.raises(KeyError), optimizer.swap_ema_weights():
        raise KeyError
    assert all(map(torch.equal, model.parameters(), live))
    set_gradients(model.parameters())
    with pytest.raises(StateError, match="inside applied"), optimizer.swap_ema_weights():
        optimizer.step()


def test_it_is_an_optimizer_to_schedulers_and_closures() -> None:
    model = double_model()
    inner = SGD(model.parameters(), lr=0.25)
    optimizer = EMAOptimizer(inner, "cpu", 0.9)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3, dtype=torch.float64)).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        losses.append(float(optimizer.step(closure).detach()))  # type: ignore[arg-type, union-attr]
        scheduler.step()
    assert losses[2] < losses[0]  # the closure is called, and the steps reach the weights
    assert inner.param_groups[0]["lr"] == 0.5**5
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_gradscaler_skips_do_not_count(*, fused: bool) -> None:
    model = double_model().float()
    parameters = list(model.parameters())
    optimizer = EMAOptimizer(Adam(parameters, lr=0.5, fused=fused), "cpu", 0.5, 2)
    scaler = GradScaler("cpu", init_scale=4.0)
    for step in range(5):
        loss = scaler.scale(model(torch.ones(1, 3)).sum())  # type: ignore[no-untyped-call]
        loss.backward()
        if step in (1, 2):
            assert parameters[0].grad is not None
            parameters[0].grad[0, 0] = torch.inf
        before = parameters[0].detach().clone(), ema_of(optimizer), optimizer.current_step
        scaler.step(optimizer)
        scaler.update()
        is_skipped = torch.equal(before[0], parameters[0])
        assert is_skipped == (step in (1, 2))
        assert optimizer.current_step == before[2] + (not is_skipped)
        if is_skipped:
            assert all(map(torch.equal, before[1], ema_of(optimizer)))
        optimizer.zero_grad()
    assert not hasattr(optimizer.optimizer, "found_inf")
    assert optimizer.averager["ema"].num_updates == 1 + 2  # after the steps 1 and 3


def test_a_group_that_is_added_later() -> None:
    model = double_model()
    optimizer = EMAOptimizer(SGD(model[0].parameters(), lr=0.5), "cpu", 0.9)
    original = Original(model[0].parameters(), 0.9)
    train(optimizer, original, 3, list(model[0].parameters()))
    optimizer.add_param_group({"params": model[1].parameters()})
    original.parameters = list(model.parameters())
    train(optimizer, original, 3, original.parameters)


def saved(state: dict[str, Any]) -> dict[str, Any]:
    content = io.BytesIO()
    torch.save(state, content)
    content.seek(0)
    return torch.load(content)  # type: ignore[no-any-return]  # weights_only


def test_a_resume() -> None:
    whole, parts = double_model(), double_model()
    parts.load_state_dict(whole.state_dict())
    optimizers = [
        EMAOptimizer(SGD(model.parameters(), lr=0.5, momentum=0.9), "cpu", 0.9, 2)
        for model in (whole, parts)
    ]
    for step in range(7):
        if step == 3:
            state = saved(optimizers[1].state_dict())
            resumed = SGD(parts.parameters(), lr=0.5, momentum=0.9)
            optimizers[1] = EMAOptimizer(resumed, "cpu", 0.1, 5)  # what is saved goes
            optimizers[1].load_state_dict(state)
        for model, optimizer in zip((whole, parts), optimizers, strict=True):
            torch.manual_seed(step)
            set_gradients(model.parameters())
            optimizer.step()
    assert all(map(torch.equal, *map(ema_of, optimizers)))
    assert all(map(torch.equal, whole.parameters(), parts.parameters()))


def test_before_the_first_step_there_is_nothing_to_save() -> None:
    model = double_model()
    optimizer = EMAOptimizer(SGD(model.parameters(), lr=0.5), "cpu", 0.9)
    state = saved(optimizer.state_dict())
    assert state["ema"] == ()
    optimizer.load_state_dict(state)
    train(optimizer, Original(model.parameters(), 0.9), 2, list(model.parameters()))


def test_a_state_of_the_original_is_taken_over() -> None:
    model = double_model()
    model[0].bias.requires_grad_(False)  # the original keeps frozen parameters, too
    parameters = list(model.parameters())
    inner = SGD(parameters, lr=0.5)
    ema = tuple(torch.randn_like(parameter).requires_grad_() for parameter in parameters)
    theirs = {
        "opt": inner.state_dict(),
        "ema": ema,
        "current_step": 5,
        "decay": 0.9,
        "every_n_steps": 4,
    }
    optimizer = EMAOptimizer(inner, "cpu")
    optimizer.load_state_dict(saved(theirs))
    held = [tensor for i, tensor in enumerate(ema) if i != 1]
    assert all(map(torch.equal, ema_of(optimizer), held))
    assert not any(tensor.requires_grad for tensor in optimizer.state_dict()["ema"])
    live = [parameter for i, parameter in enumerate(parameters) if i != 1]
    original = Original(live, 0.9, 4)
    original.ema, original.current_step = [tensor.detach().clone() for tensor in held], 5
    train(optimizer, original, 6, live)


@pytest.mark.parametrize("ema", [(torch.ones(4, 3),), (torch.ones(3, 4),) * 4])
def test_a_state_of_another_model_is_refused(ema: tuple[Tensor, ...]) -> None:
    model = double_model()
    optimizer = EMAOptimizer(SGD(model.parameters(), lr=0.5), "cpu")
    before = optimizer.state_dict()
    with pytest.raises(CheckpointMismatch, match=r"no EMA in the state of 0\.\d at \(0,"):
        optimizer.load_state_dict({k: v for k, v in before.items() if k != "boxes"} | {"ema": ema})
    assert optimizer.averager["ema"].num_updates == 0


def test_another_device_is_refused_until_it_can_be_had() -> None:
    with pytest.raises(UnsupportedError, match="device"):
        EMAOptimizer(SGD(double_model().parameters(), lr=0.5), "meta")


# --------------------------------------------------------------------------------- several ranks


def on_ranks(layout: str) -> list[str]:
    """What a run with a sharded EMA does not do as one on the whole weights would."""
    model = build(layout)
    inner = SGD(model.parameters(), lr=0.1)
    optimizer = EMAOptimizer(inner, "cpu", 0.5, model=model)
    ema = whole_weights(model)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        for name, tensor in whole_weights(model).items():
            ema[name] = ema[name].lerp(tensor, 0.5)
    live = whole_weights(model)
    with optimizer.swap_ema_weights():
        offences = differences(whole_weights(model), ema)
    offences += differences(whole_weights(model), live)
    resumed = EMAOptimizer(inner, "cpu", 0.5, model=model)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    with resumed.swap_ema_weights():
        offences += differences(whole_weights(model), ema)
    return offences


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "fsdp2-keep", "fsdp1"])
def test_a_sharded_ema_is_the_whole_one(layout: str) -> None:
    assert run_ranks(on_ranks, 2, layout) == [[], []]


def test_without_the_model_each_rank_swaps_for_itself() -> None:
    assert run_ranks(alone, 2) == [[], []]


def alone() -> list[str]:
    model = build("ddp")
    optimizer = EMAOptimizer(SGD(model.parameters(), lr=0.1), "cpu", 0.5)
    backward(model)
    optimizer.step()
    held = sum(tensor.numel() for tensor in ema_of(optimizer))
    if dist.get_rank() == 0:  # with a collective in it this would never end
        live = [parameter.detach().clone() for parameter in model.parameters()]
        with optimizer.swap_ema_weights():
            swapped = [
                not torch.equal(*pair) for pair in zip(model.parameters(), live, strict=True)
            ]
        assert any(swapped)
        assert optimizer.state_dict()["current_step"] == 1
    whole = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return [] if held == whole else [f"{held} elements of {whole} are held"]


def test_it_is_not_copied() -> None:
    optimizer = EMAOptimizer(SGD(double_model().parameters(), lr=0.5), "cpu")
    with pytest.raises(TypeError, match=r"not copied or pickled: use its state_dict\(\)"):
        copy.deepcopy(optimizer)


def test_a_state_without_an_ema_is_refused() -> None:
    inner = SGD(double_model().parameters(), lr=0.5)
    with pytest.raises(CheckpointMismatch, match=r"no EMA in the state of 0\.0 at"):
        EMAOptimizer(inner, "cpu").load_state_dict(inner.state_dict())


class Zeroing(SGD):
    """An optimizer with a `zero_grad` of its own."""

    calls = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.calls += 1
        super().zero_grad(set_to_none)


def test_the_inner_optimizer_zeroes_its_gradients() -> None:
    inner = Zeroing(double_model().parameters(), lr=0.5)
    EMAOptimizer(inner, "cpu").zero_grad()
    assert inner.calls == 1


def on_one_rank_only() -> str:
    """Rank 1 loads what rank 0 saved."""
    model = build("ddp")
    optimizer = EMAOptimizer(SGD(model.parameters(), lr=0.1), "cpu", model=model)
    backward(model)
    optimizer.step()
    states: list[Any] = [None, None]
    dist.all_gather_object(states, optimizer.state_dict())
    return error_of(optimizer.load_state_dict, states[0])


def test_a_refusal_on_one_rank_is_one_on_all() -> None:
    first, second = run_ranks(on_one_rank_only, 2)
    assert first.startswith("CheckpointMismatch: EMAOptimizer.load_state_dict() failed. rank 1: ")
    assert second.startswith("CheckpointMismatch: EMAOptimizer: no EMA in the state of ")


def refusals() -> list[str]:
    errors = []
    for layout in ("fsdp2", "fsdp1", "fsdp1-flat"):
        model = build(layout)
        make: Callable[[], object] = lambda: EMAOptimizer(SGD(model.parameters(), lr=0.1), "cpu")  # noqa: B023, E731
        errors.append(error_of(make))
    model = build("ddp")
    optimizer = EMAOptimizer(SGD(model.parameters(), lr=0.1), "cpu", model=model)
    backward(model)
    optimizer.step()
    states: list[Any] = [None, None]
    dist.all_gather_object(states, optimizer.state_dict())
    errors.append(error_of(optimizer.load_state_dict, states[1 - dist.get_rank()]))
    return errors


def test_what_is_refused_on_ranks() -> None:
    for errors in run_ranks(refusals, 2):
        sharded = "ConfigError: EMAOptimizer: the parameters are sharded: pass model=, wrapped"
        assert errors[:3] == [sharded] * 3
        assert errors[3].startswith("CheckpointMismatch: EMAOptimizer")
        assert "no EMA in the state of " in errors[3]
