"""The learning rate around an average's start, against loops as their documentation writes them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    OneCycleLR,
    ReduceLROnPlateau,
)
from torch.optim.swa_utils import SWALR

from distavg import EMA, SWA, Averager, Clock, ConfigError, Rule, ThenSWALR

Rates = list[list[float]]


def rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


class Run:
    """A model, its optimizer with two parameter groups, and an average named swa."""

    def __init__(self, rule: Rule, clock: Clock, *, lr: float | torch.Tensor = 1.0) -> None:
        self.model = nn.Linear(2, 1)
        groups = [{"params": [self.model.weight]}, {"params": [self.model.bias], "lr": lr / 4}]
        self.optimizer = SGD(groups, lr=lr, momentum=0.9)
        self.averager = Averager(self.model, {"swa": rule}, clock=clock)
        self.averager.attach(self.optimizer)


def test_the_example_of_pytorchs_documentation() -> None:
    """300 epochs, swa_start = 160: `if i > swa_start: swa_scheduler.step()`."""
    batches, swa_start = 2, 160

    def before(optimizer: Optimizer) -> LRScheduler:
        return MultiplicativeLR(optimizer, lr_lambda=lambda epoch: 0.98)

    model = nn.Linear(2, 1)
    theirs = SGD(
        [{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), (1.0, 0.25), strict=True)]
    )
    scheduler, swalr = before(theirs), SWALR(theirs, 0.05, 20, "linear")
    expected: Rates = []
    for i in range(300):
        for _ in range(batches):
            expected.append(rates(theirs))
            theirs.step()
        (swalr if i > swa_start else scheduler).step()

    run = Run(SWA(start="161ep"), Clock(steps_per_epoch=batches))
    ours = ThenSWALR(
        before(run.optimizer), run.averager, 0.05, anneal_epochs=20, anneal_strategy="linear"
    )
    found: Rates = []
    for _ in range(300):
        for _ in range(batches):
            found.append(rates(run.optimizer))
            run.optimizer.step()
        ours.step()
    assert found == expected
    assert run.averager["swa"].num_updates == 139
    assert len({rate for rate, _ in found}) == 1 + 161 + 20


def recipe(run: Run, **options: Any) -> ThenSWALR:
    onecycle = OneCycleLR(run.optimizer, max_lr=[1.0, 0.5], epochs=100, steps_per_epoch=4)
    return ThenSWALR(onecycle, run.averager, **{"swa_lr": 0.05, "anneal_epochs": 4, **options})


@pytest.mark.parametrize("swa_lr", [0.05, [0.05, 0.02], (0.05, 0.02)])
def test_the_recipe_of_the_practitioners(swa_lr: float | Sequence[float]) -> None:
    """OneCycle for 80 of 100 epochs, then SWALR per iteration with anneal_epochs=len(loader)."""
    model = nn.Linear(2, 1)
    theirs = SGD([{"params": [p]} for p in model.parameters()], lr=1.0, momentum=0.9)
    onecycle = OneCycleLR(theirs, max_lr=[1.0, 0.5], epochs=100, steps_per_epoch=4)
    swalr = SWALR(theirs, swa_lr, anneal_epochs=4)  # type: ignore[arg-type]
    expected: Rates = []
    for epoch in range(100):
        for _ in range(4):
            expected.append(rates(theirs))
            theirs.step()
            (swalr if epoch >= 80 else onecycle).step()

    run = Run(SWA(start="80ep"), Clock(steps_per_epoch=4, max_duration="100ep"))
    scheduler = recipe(run, swa_lr=swa_lr)
    found: Rates = []
    for _ in range(400):
        found.append(rates(run.optimizer))
        assert scheduler.get_last_lr() == found[-1]
        run.optimizer.step()
        scheduler.step()
    assert found == expected
    assert found[323] != found[324] == found[399]  # 4 steps after step 320 it has arrived
    assert found[399] == ([swa_lr] * 2 if isinstance(swa_lr, float) else list(swa_lr))


@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
def test_annealing_once_per_update_as_composer_says(lr: float | torch.Tensor) -> None:
    """20 steps at an interval of 8 batches anneal over 160 batches; others' steps do not count."""
    rule = SWA(start="100ba", update_interval="8ba", include_initial=True)
    run = Run(rule, Clock(), lr=lr)
    constant = ConstantLR(run.optimizer, factor=1.0)
    scheduler = ThenSWALR(
        constant,
        run.averager,
        0.2,
        anneal_epochs=20,
        anneal_strategy="linear",
        once_per_update=True,
    )
    decaying = LinearLR(run.optimizer, 1.0, 0.5, total_iters=50)  # of a trainer that goes on
    found: Rates = []
    for _ in range(300):
        run.optimizer.step()
        decaying.step()
        scheduler.step()
        found.append(rates(run.optimizer))
        assert [float(rate) for rate in scheduler.get_last_lr()] == found[-1]
    updates = [(99 + 8 * n, n + 1) for n in range(20)]
    for step, count in updates:
        for group, initial in enumerate((0.5, 0.125)):
            expected = initial + (0.2 - initial) * count / 20
            assert found[step][group] == pytest.approx(expected, rel=1e-6 if lr != 1.0 else 1e-12)
    changes = [i for i in range(99, 300) if found[i] != found[i - 1]]
    assert changes == [step for step, _ in updates]
    assert found[-1] == pytest.approx([0.2, 0.2])


def test_without_a_target_it_stays_where_it_is_at_the_start() -> None:
    run = Run(SWA(start="50ep"), Clock(steps_per_epoch=4))
    scheduler = recipe(run, swa_lr=None)
    found: Rates = []
    for _ in range(400):
        found.append(rates(run.optimizer))
        run.optimizer.step()
        scheduler.step()
    assert found[199] != found[200] == found[201] == found[399]


def per_update(run: Run) -> ThenSWALR:
    return recipe(run, anneal_epochs=8, once_per_update=True)


def kept(run: Run) -> ThenSWALR:
    return recipe(run, swa_lr=None)


def at_once(run: Run) -> ThenSWALR:
    return recipe(run, anneal_epochs=0)


@pytest.mark.parametrize("is_loaded_first", [False, True])
@pytest.mark.parametrize("build", [recipe, per_update, kept, at_once])
@pytest.mark.parametrize("stop", [5, 319, 320, 321, 322, 330, 333, 390])
def test_a_resume_goes_on_as_if_there_had_been_none(
    build: Callable[[Run], ThenSWALR], stop: int, tmp_path: Any, *, is_loaded_first: bool
) -> None:
    rule, clock = SWA(start="320ba", update_interval="3ba"), Clock()

    def train(run: Run, scheduler: ThenSWALR, num_steps: int) -> Rates:
        found: Rates = []
        for _ in range(num_steps):
            found.append(rates(run.optimizer))
            run.optimizer.step()
            scheduler.step()
        return found

    whole = Run(rule, clock)
    expected = train(whole, build(whole), 400)

    run = Run(rule, clock)
    scheduler = build(run)
    train(run, scheduler, stop)
    run.averager.save(tmp_path / "a")
    content = io.BytesIO()
    torch.save([run.optimizer.state_dict(), scheduler.state_dict()], content)

    resumed = Run(rule, clock)
    content.seek(0)
    optimizer_state, scheduler_state = torch.load(content)  # plain data: weights_only suffices
    if is_loaded_first:
        resumed.optimizer.load_state_dict(optimizer_state)
    scheduler = build(resumed)
    scheduler.load_state_dict(scheduler_state)
    resumed.optimizer.load_state_dict(optimizer_state)
    resumed.averager.load(tmp_path / "a")
    assert scheduler.get_last_lr() == rates(resumed.optimizer) == expected[stop]
    assert train(resumed, scheduler, 400 - stop) == expected[stop:]


def test_annealing_over_no_steps_waits_for_the_start() -> None:
    run = Run(SWA(start="80ep"), Clock(steps_per_epoch=4))
    before = rates(run.optimizer)
    ThenSWALR(ConstantLR(run.optimizer, factor=1.0), run.averager, 0.05, anneal_epochs=0)
    assert rates(run.optimizer) == before


def test_an_optimizers_state_from_before_there_was_one() -> None:
    """The targets are not what an optimizer's state brings along."""
    run = Run(SWA(start="1ba", update_interval="1ba"), Clock())
    state = Run(SWA(), Clock(steps_per_epoch=4)).optimizer.state_dict()
    constant = ConstantLR(run.optimizer, factor=1.0)
    scheduler = ThenSWALR(constant, run.averager, [0.5, 0.25], anneal_epochs=1)
    run.optimizer.load_state_dict(state)
    for _ in range(2):
        run.optimizer.step()
        scheduler.step()
    assert rates(run.optimizer) == [0.5, 0.25]


def test_a_group_that_is_added_later_is_an_error_that_says_so() -> None:
    run = Run(SWA(update_interval="1ba"), Clock())
    scheduler = ThenSWALR(ConstantLR(run.optimizer, factor=1.0), run.averager, 0.5)
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    run.optimizer.step()
    with pytest.raises(ConfigError, match=r"has 3 parameter groups, and had 2: build a new one"):
        scheduler.step()


def test_a_scheduler_that_looks_at_a_metric() -> None:
    run = Run(EMA(start="4ba"), Clock())
    scheduler = ThenSWALR(ReduceLROnPlateau(run.optimizer, patience=0), run.averager, 0.5)
    for _ in range(3):
        run.optimizer.step()
        scheduler.step(metrics=1.0)
    assert rates(run.optimizer) == pytest.approx([0.01, 0.0025])


def test_frameworks_take_it_for_a_scheduler() -> None:
    run = Run(EMA(), Clock())
    assert isinstance(recipe(run), LRScheduler)
    assert recipe(run).optimizer is run.optimizer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheduler": None}, "ThenSWALR: None is not a scheduler of torch.optim.lr_scheduler"),
        (
            {"swa_lr": [0.1] * 3},
            "ThenSWALR: swa_lr=[0.1, 0.1, 0.1] for an optimizer of 2 parameter",
        ),
        ({"anneal_strategy": "step"}, "ThenSWALR: anneal_strategy must be one of"),
        ({"anneal_epochs": -1}, "ThenSWALR: anneal_epochs must be equal or greater than 0"),
        ({"name": "ema"}, "there are no average 'ema', only"),
        ({"swa_lr": math.nan}, "ThenSWALR: swa_lr"),
        ({"swa_lr": math.inf}, "ThenSWALR: swa_lr"),
        ({"swa_lr": -0.1}, "ThenSWALR: swa_lr"),
        ({"swa_lr": [0.1, -0.1]}, "ThenSWALR: swa_lr"),
        ({"swa_lr": "0.1"}, "ThenSWALR: swa_lr"),
    ],
)
def test_what_cannot_be(arguments: dict[str, Any], message: str) -> None:
    run = Run(SWA(update_interval="1ba"), Clock())
    good = {"scheduler": ConstantLR(run.optimizer), "averager": run.averager, "swa_lr": 0.1}
    with pytest.raises(ConfigError) as caught:
        ThenSWALR(**{**good, **arguments})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("once_per_update", "expected"),
    [(False, [1.0] * 4 + [0.75, 0.5]), (True, [1.0] * 5 + [0.75])],
)
def test_it_goes_by_the_average_that_is_named(
    expected: list[float], *, once_per_update: bool
) -> None:
    run = Run(EMA(), Clock())
    early, late = (SWA(start=s, update_interval=i) for s, i in (("1ba", "1ba"), ("4ba", "3ba")))
    averager = Averager(run.model, {"a": early, "b": late})
    averager.attach(run.optimizer)
    before = ConstantLR(run.optimizer, factor=1)
    with pytest.raises(ConfigError, match="several averages: name one of"):
        ThenSWALR(before, averager, 0.5)
    scheduler = ThenSWALR(
        before,
        averager,
        0.5,
        name="b",
        anneal_epochs=2,
        anneal_strategy="linear",
        once_per_update=once_per_update,
    )
    found = []
    for _ in range(6):
        run.optimizer.step()
        scheduler.step()
        found.append(rates(run.optimizer)[0])
    assert found == expected


def linear(run: Run) -> ThenSWALR:
    before = ConstantLR(run.optimizer, factor=1)
    return ThenSWALR(before, run.averager, 0.5, anneal_epochs=4, anneal_strategy="linear")


def test_its_rate_holds_whoever_sets_another_one() -> None:
    run = Run(SWA(start="2ba", update_interval="1ba"), Clock())
    scheduler, found = linear(run), []
    for step in range(7):
        run.optimizer.step()
        if step > 2:
            for group in run.optimizer.param_groups:
                group["lr"] = 7.0
        scheduler.step()
        found.append(rates(run.optimizer)[0])
    assert found == [1, 1, 0.875, 0.75, 0.625, 0.5, 0.5]


def test_a_rate_that_is_a_tensor_stays_that_tensor() -> None:
    run = Run(SWA(start="1ba", update_interval="1ba"), Clock(), lr=torch.tensor(1.0))
    scheduler, last = linear(run), []
    own = run.optimizer.param_groups[0]["lr"]
    for _ in range(5):
        run.optimizer.step()
        scheduler.step()
        last.append(scheduler.get_last_lr()[0])
    assert run.optimizer.param_groups[0]["lr"] is own
    assert [float(rate) for rate in last] == [1, 0.875, 0.75, 0.625, 0.5]


def test_updates_from_before_it_was_built_do_not_count() -> None:
    run = Run(SWA(update_interval="8ba"), Clock())
    for _ in range(9):
        run.optimizer.step()
    before = ConstantLR(run.optimizer, factor=1)
    scheduler = ThenSWALR(before, run.averager, 0.5, anneal_epochs=1, once_per_update=True)
    run.optimizer.step()
    scheduler.step()
    assert rates(run.optimizer)[0] == 1.0


def test_the_defaults_are_swalrs() -> None:
    run = Run(SWA(update_interval="1ba"), Clock())
    ours = ThenSWALR(ConstantLR(run.optimizer, factor=1), run.averager, 0.5)._swalr
    theirs = SWALR(run.optimizer, 0.5)
    assert ours.anneal_epochs == theirs.anneal_epochs
    assert ours._anneal_strategy == theirs._anneal_strategy  # type: ignore[attr-defined]
