"""The README's migration table: each row, as it is written there, against the system it replaces.

Against the real package where that installs beside this torch, otherwise against its published
formula. Both see the same weights after every step, in float64.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import distavg
from distavg import Averager, Clock

README = (Path(__file__).parent.parent / "README.md").read_text()
STEPS_PER_EPOCH, EPOCHS = 12, 20


def rows() -> dict[str, str]:
    """What the table says: their code -> ours."""
    table = README.partition("## Coming from another system")[2].partition("\n## ")[0]
    cells = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return {theirs.strip("| `"): ours.strip("| `") for theirs, ours, *_ in cells}


class Theirs:
    """A system's average: told of every optimizer step, it gives its parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps = 0
        self.average = [p.detach().clone() for p in model.parameters()]

    def after_step(self) -> None:
        self.steps += 1
        self.update()

    def update(self) -> None:
        raise NotImplementedError

    def parameters(self) -> list[Tensor]:
        return self.average

    def lerp(self, decay: float) -> None:
        for average, live in zip(self.average, self.model.parameters(), strict=True):
            average.mul_(decay).add_(live.detach(), alpha=1 - decay)


# ---------------------------------------------------------------- with the real packages


def averaged_model(model: nn.Module, **options: Any) -> Any:
    class Averaged(Theirs):
        averaged = AveragedModel(model, **options)

        def parameters(self) -> list[Tensor]:
            return [p.detach() for p in self.averaged.module.parameters()]

    return Averaged


def torch_swa(model: nn.Module) -> Theirs:
    """PyTorch's documentation: `if epoch > swa_start: swa_model.update_parameters(model)`."""

    class Swa(averaged_model(model)):  # type: ignore[misc]
        def update(self) -> None:
            epoch, within = divmod(self.steps - 1, STEPS_PER_EPOCH)
            if within == STEPS_PER_EPOCH - 1 and epoch > 14:  # swa_start
                self.averaged.update_parameters(model)

    return Swa(model)  # type: ignore[no-any-return]


def torch_ema(model: nn.Module) -> Theirs:
    class Ema(averaged_model(model, avg_fn=get_ema_avg_fn(0.99))):  # type: ignore[misc]
        def update(self) -> None:
            self.averaged.update_parameters(model)

    return Ema(model)  # type: ignore[no-any-return]


def lightning(model: nn.Module) -> Theirs:
    """Lightning's own decision and average, asked as its loop does, with a step counted from 0."""
    callbacks = importlib.import_module("lightning.pytorch.callbacks")
    callback = callbacks.EMAWeightAveraging(
        decay=0.99, update_every_n_steps=5, update_starting_at_step=20
    )

    class Lightning(averaged_model(model, **callback._kwargs)):  # type: ignore[misc]
        def update(self) -> None:
            if callback.should_update(step_idx=self.steps - 1):
                self.averaged.update_parameters(model)

    return Lightning(model)  # type: ignore[no-any-return]


def diffusers(**options: Any) -> Callable[[nn.Module], Theirs]:
    def build(model: nn.Module) -> Theirs:
        training_utils = pytest.importorskip(  # it needs Python 3.11 beside what else is pinned
            "diffusers.training_utils"
        )

        class Diffusers(Theirs):
            ema = training_utils.EMAModel(model.parameters(), **options)

            def update(self) -> None:
                self.ema.step(model.parameters())

            def parameters(self) -> list[Tensor]:
                return list(self.ema.shadow_params)

        return Diffusers(model)

    return build


def ema_pytorch(model: nn.Module) -> Theirs:
    package = importlib.import_module("ema_pytorch")

    class EmaPytorch(Theirs):
        ema = package.EMA(model, beta=0.99, update_after_step=30, update_every=10)

        def update(self) -> None:
            torch.set_default_dtype(torch.float64)  # its decay is a tensor, of fp32 otherwise
            try:
                self.ema.update()
            finally:
                torch.set_default_dtype(torch.float32)

        def parameters(self) -> list[Tensor]:
            return [p.detach() for p in self.ema.ema_model.parameters()]

    return EmaPytorch(model)


# ---------------------------------------------------------------- by their published formulas


class EmaOptimizer(Theirs):
    """Of NeMo: cloned before the first step; updated when the counter is a multiple."""

    def update(self) -> None:
        if self.steps % 4 == 0:
            self.lerp(0.99)


class ComposerEma(Theirs):
    """Cloned at the first batch from the start on; `smoothing = 2 ** (-interval / half_life)`."""

    def update(self) -> None:
        if self.steps == 24:  # 0.1 of 240
            self.average = [p.detach().clone() for p in self.model.parameters()]
        if self.steps >= 24:
            self.lerp(2 ** (-1 / 50))


class ComposerSwa(Theirs):
    """Looks after each epoch: fresh at the start, then every second time, up to the end."""

    counter = samples = 0
    is_completed = False

    def update(self) -> None:
        elapsed = self.steps / (STEPS_PER_EPOCH * EPOCHS)
        if self.steps % STEPS_PER_EPOCH or elapsed < 0.7 or self.is_completed:
            return
        if self.counter % 2 == 0:
            self.lerp(self.samples / (self.samples + 1))
            self.samples += 1
        self.counter += 1
        self.is_completed = elapsed >= 0.95


class Timm(Theirs):
    """ModelEmaV3 with `update(model, step)`: s = max(0, step - update_after_step - 1)."""

    def update(self) -> None:
        s = max(0, self.steps - 15 - 1)
        warm = 1 - (1 + s / 2.0) ** -0.8
        self.lerp(0.0 if s == 0 else max(0.1, min(warm, 0.99)))


THEIRS: dict[str, Callable[[nn.Module], Theirs]] = {
    "if epoch > 14: AveragedModel.update_parameters": torch_swa,
    "AveragedModel(avg_fn=get_ema_avg_fn(0.99))": torch_ema,
    "EMAOptimizer(decay=0.99, every_n_steps=4)": EmaOptimizer,
    'Composer EMA(half_life="50ba", ema_start="0.1dur")': ComposerEma,
    'Composer SWA(swa_start="0.7dur", swa_end="0.95dur", update_interval="2ep")': ComposerSwa,
    "Lightning EMAWeightAveraging(decay=0.99, update_every_n_steps=5, "
    "update_starting_at_step=20)": lightning,
    "diffusers EMAModel(decay=0.99, update_after_step=25)": diffusers(
        decay=0.99, update_after_step=25
    ),
    "diffusers EMAModel(decay=0.99, use_ema_warmup=True, min_decay=0.2)": diffusers(
        decay=0.99, use_ema_warmup=True, min_decay=0.2
    ),
    "timm ModelEmaV3(decay=0.99, min_decay=0.1, use_warmup=True, warmup_gamma=2, warmup_power=0.8, "
    "update_after_step=15)": Timm,
    "ema_pytorch.EMA(beta=0.99, update_after_step=30, update_every=10)": ema_pytorch,
}


def test_the_table_has_each_row_and_no_other() -> None:
    assert list(rows()) == list(THEIRS)


@pytest.mark.filterwarnings("ignore")  # of the packages, while they are imported
@pytest.mark.parametrize("theirs", THEIRS)
def test_a_row_gives_the_numbers_it_replaces(theirs: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    rule = eval(rows()[theirs], {**vars(distavg)})
    clock = Clock(steps_per_epoch=STEPS_PER_EPOCH, max_duration=f"{EPOCHS}ep")
    averager = Averager(model, {"a": rule}, clock=clock)
    other = THEIRS[theirs](model)
    compared = 0
    for _ in range(STEPS_PER_EPOCH * EPOCHS):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        averager.step()
        other.after_step()
        if averager["a"].num_updates:
            compared += 1
            found = [shard.tensor for shard in averager["a"].shards()]
            torch.testing.assert_close(found, other.parameters(), rtol=1e-12, atol=1e-12)
    assert compared >= STEPS_PER_EPOCH * 3
    assert averager["a"].num_updates >= 3
