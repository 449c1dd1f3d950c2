"""Optimizer steps that count, for every optimizer of PyTorch in every form that it has."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from checks import differences
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distavg import EMA, Averager, ConfigError

# Every optimizer of torch.optim, with what it needs beyond a learning rate.
SETTINGS: dict[str, dict[str, Any]] = {
    "ASGD": {},
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {},
    "AdamW": {},
    "Adamax": {},
    "LBFGS": {"max_iter": 3},
    "Muon": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {},
    "Rprop": {},
    "SGD": {"momentum": 0.9},
    "SparseAdam": {},
}
FOUND = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
}
FORMS = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "as it is": {},
}


FUSED_ON_CPU = {"Adagrad", "Adam", "AdamW", "SGD"}
CASES = [
    (name, form)
    for name, cls in FOUND.items()
    for form, options in FORMS.items()
    if all(option in inspect.signature(cls).parameters for option in options)
]


class Tiny(nn.Module):
    """Two matrices, for Muon wants nothing else; the first with sparse gradients on request."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.rows = nn.Embedding(4, 3, sparse=sparse)
        self.head = nn.Embedding(3, 3, sparse=True) if sparse else nn.Linear(3, 3, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens to one number each."""
        hidden = self.rows(tokens)
        if isinstance(self.head, nn.Linear):
            return self.head(hidden).square().sum(-1)  # type: ignore[no-any-return]
        return (hidden * self.head(tokens % 3)).square().sum(-1)  # type: ignore[no-any-return]


TOKENS = torch.tensor([0, 1, 3])


def backward(model: nn.Module, scale: float = 1.0) -> Tensor:
    """One backward pass from zeroed gradients; gives the loss back, as a closure must."""
    model.zero_grad()
    loss: Tensor = model(TOKENS).sum() * scale
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def follow(model: nn.Module) -> tuple[Averager, AveragedModel]:
    """An averager, and the oracle that is to be updated by hand after each step that counts."""
    return Averager(model, EMA(0.9)), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def wrong(averager: Averager, oracle: AveragedModel) -> list[str]:
    assert averager["ema"].num_updates == averager.step_count == int(oracle.n_averaged)
    return differences(averager.full_state_dict(), oracle.module.state_dict())


def test_every_optimizer_of_this_torch_has_its_settings_here() -> None:
    optional = {"Muon"}  # since torch 2.9
    assert FOUND.keys() | optional == SETTINGS.keys()


@pytest.mark.parametrize(("name", "form"), CASES)
def test_each_step_of_each_optimizer_counts_once(name: str, form: str) -> None:
    model = Tiny(sparse=name == "SparseAdam")
    averager, oracle = follow(model)
    if form == "fused" and name not in FUSED_ON_CPU:
        pytest.skip(f"PyTorch has no fused {name} on the CPU")
    optimizer = FOUND[name](model.parameters(), lr=0.01, **SETTINGS[name], **FORMS[form])
    averager.attach(optimizer)
    for _ in range(3):
        backward(model)
        optimizer.step((lambda: backward(model)) if name == "LBFGS" else None)
        oracle.update_parameters(model)
        assert wrong(averager, oracle) == []
    assert averager.step_count == 3


def test_a_closure_is_called_several_times_and_counts_once() -> None:
    model = Tiny()
    averager, oracle = follow(model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    averager.attach(optimizer)
    calls = []

    def closure() -> float:
        calls.append(1)
        return backward(model).item()

    optimizer.step(closure)
    oracle.update_parameters(model)
    assert len(calls) > 1
    assert wrong(averager, oracle) == []


def test_a_group_that_is_added_later_is_averaged_too() -> None:
    model = Tiny()
    averager, oracle = follow(model)
    optimizer = torch.optim.SGD(model.rows.parameters(), lr=0.1)
    averager.attach(optimizer)
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": model.head.parameters(), "lr": 0.2})
        before = model.head.weight.detach().clone()
        backward(model)
        optimizer.step()
        oracle.update_parameters(model)
        assert torch.equal(before, model.head.weight) == (step < 2)
        assert wrong(averager, oracle) == []


@pytest.mark.parametrize("in_one_call", [True, False])
def test_several_optimizers_count_as_one_step_once_all_have_stepped(in_one_call: bool) -> None:
    model = Tiny()
    averager, oracle = follow(model)
    first = torch.optim.SGD(model.rows.parameters(), lr=0.1)
    second = torch.optim.Adam(model.head.parameters(), lr=0.1)
    if in_one_call:
        averager.attach(first, second)
    else:
        averager.attach(first)
        averager.attach(second)
    for _ in range(3):
        backward(model)
        first.step()
        first.step()  # as a critic that steps more often
        assert averager.step_count == int(oracle.n_averaged)
        second.step()
        oracle.update_parameters(model)
        assert wrong(averager, oracle) == []


def test_twice_is_an_error_and_changes_nothing() -> None:
    model = Tiny()
    averager, _ = follow(model)
    optimizer = torch.optim.SGD(model.rows.parameters(), lr=0.1)
    other = torch.optim.SGD(model.head.parameters(), lr=0.1)
    averager.attach(optimizer)
    for again in ((optimizer,), (other, other), (other, optimizer)):
        with pytest.raises(ConfigError, match="this SGD is attached already; a second time"):
            averager.attach(*again)
    optimizer.step()
    assert averager.step_count == 1


@pytest.mark.parametrize("given", [(), (nn.Linear(1, 1),), ("adam",)])
def test_what_is_no_optimizer_is_refused(given: tuple[Any, ...]) -> None:
    averager, _ = follow(Tiny())
    with pytest.raises(ConfigError, match=r"at least one optimizer|is not a torch\.optim\.Opt"):
        averager.attach(*given)


def test_the_handle_detaches_and_lets_attach_again() -> None:
    model = Tiny()
    averager, _ = follow(model)
    first = torch.optim.SGD(model.rows.parameters(), lr=0.1)
    second = torch.optim.SGD(model.head.parameters(), lr=0.1)
    averager.attach(first)
    handle = averager.attach(second)
    first.step()
    assert averager.step_count == 0  # waits for the second
    handle.remove()
    second.step()
    assert averager.step_count == 0
    first.step()
    assert averager.step_count == 1
    handle.remove()  # harmless
    with averager.attach(second):
        first.step()
        second.step()
        assert averager.step_count == 2
    second.step()
    assert averager.step_count == 2


def test_a_round_that_is_under_way_when_optimizers_come_and_go() -> None:
    model = Tiny()
    first = torch.optim.SGD(model.rows.parameters(), lr=0.1)
    second = torch.optim.SGD(model.head.parameters(), lr=0.1)
    averager, _ = follow(model)
    averager.attach(first)
    handle = averager.attach(second)
    second.step()
    handle.remove()
    first.step()
    assert averager.step_count == 1  # the second's step does not count any more
    averager, _ = follow(model)
    averager.attach(first)
    handle = averager.attach(second)
    first.step()
    second.step()
    handle.remove()
    first.step()
    assert averager.step_count == 2  # the first one closes the rounds now
    averager.attach(second)
    first.step()
    second.step()
    assert averager.step_count == 3  # and the second one again


def test_an_optimizer_that_was_rebuilt_takes_the_place_of_the_old_one() -> None:
    model = Tiny()
    averager, _ = follow(model)
    handle = averager.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    rebuilt = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match="AdamW has parameters of the SGD that is attached alr"):
        averager.attach(rebuilt)
    handle.remove()
    averager.attach(rebuilt)
    rebuilt.step()
    assert averager.step_count == 1


def test_an_optimizer_of_another_model_is_refused() -> None:
    averager, _ = follow(Tiny())
    with pytest.raises(ConfigError, match="SGD has no parameter of the averaged model"):
        averager.attach(torch.optim.SGD(Tiny().parameters(), lr=0.1))


def test_two_averagers_may_follow_one_optimizer() -> None:
    model = Tiny()
    averagers = [follow(model)[0] for _ in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for averager in averagers:
        averager.attach(optimizer)
    optimizer.step()
    assert [averager.step_count for averager in averagers] == [1, 1]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_steps_that_a_grad_scaler_skips_do_not_count(cls: type[Optimizer], fused: bool) -> None:
    model = Tiny()
    averager, oracle = follow(model)
    options: dict[str, Any] = {"lr": 0.01, "fused": fused}
    optimizer = cls(model.parameters(), **options)
    averager.attach(optimizer)
    scaler = GradScaler("cpu", init_scale=4.0)
    for step in range(5):
        before = model.rows.weight.detach().clone()
        model.zero_grad()
        scaler.scale(model(TOKENS).sum()).backward()  # type: ignore[no-untyped-call]
        if step in (0, 2):
            assert model.rows.weight.grad is not None
            model.rows.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        is_skipped = torch.equal(before, model.rows.weight)
        assert is_skipped == (step in (0, 2))
        if not is_skipped:
            oracle.update_parameters(model)
        if int(oracle.n_averaged):
            assert wrong(averager, oracle) == []
    assert averager.step_count == 3


def test_gradient_accumulation_counts_steps_and_not_micro_batches() -> None:
    model = Tiny()
    averager, oracle = follow(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    averager.attach(optimizer)
    for micro_batch in range(6):
        model(TOKENS).sum().backward()
        if micro_batch % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
            oracle.update_parameters(model)
            assert wrong(averager, oracle) == []
    assert averager.step_count == 2


@pytest.fixture
def accelerator() -> Iterator[accelerate.Accelerator]:
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_accelerates_wrapper_is_seen_through(accelerator: accelerate.Accelerator) -> None:
    model: Any = Tiny()
    averager, oracle = follow(model)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    averager.attach(optimizer)
    for again in (optimizer, optimizer.optimizer):
        with pytest.raises(ConfigError, match="attached already"):
            averager.attach(again)
    for micro_batch in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(TOKENS).sum())
            optimizer.step()
            optimizer.zero_grad()
        if micro_batch % 2:
            oracle.update_parameters(model)
            assert wrong(averager, oracle) == []
    assert averager.step_count == 3


def test_a_compiled_model_steps_as_well() -> None:
    model = Tiny()
    compiled: Any = torch.compile(model, backend="eager")
    averager, oracle = Averager(compiled, EMA(0.9)), follow(model)[1]
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.01)
    averager.attach(optimizer)
    for _ in range(2):
        backward(compiled)
        optimizer.step()
        oracle.update_parameters(model)
        assert wrong(averager, oracle) == []
    torch.compiler.reset()


@pytest.mark.parametrize("skipped", [0, 1])
def test_a_skipped_step_of_one_of_two_optimizers_does_not_make_the_others_stale(
    skipped: int,
) -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    optimizers = [torch.optim.SGD(layer.parameters(), lr=1.0) for layer in model]
    averager = Averager(model, EMA(0.0))  # the average is the latest sample
    averager.attach(*optimizers)
    for step in range(4):
        for number, (layer, optimizer) in enumerate(zip(model, optimizers, strict=True)):
            layer.weight.grad = torch.ones_like(layer.weight)
            if step != 1 or number != skipped:  # as GradScaler does after an overflow
                optimizer.step()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    assert differences(averager.full_state_dict(), expected) == []
    assert averager.step_count == 3
