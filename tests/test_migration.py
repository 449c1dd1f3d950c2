"""The README's migration table: each row, as it is written there, against the system it replaces.

Against the real package where that installs beside this torch, otherwise against its published
formula. Both see the same weights after every step: in float64, and in float32 where the original
is a lerp. The run is long enough for every start, interval and end of a warm-up.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_multi_avg_fn,
)

import distavg
from distavg import EMA, Averager, Clock

README = (Path(__file__).parent.parent / "README.md").read_text()
STEPS_PER_EPOCH, EPOCHS = 12, 20


def rows() -> dict[str, str]:
    """What the table says: their code -> ours."""
    table = README.partition("## Coming from another system")[2].partition("\n## ")[0]
    cells = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return {theirs.strip("| `"): ours.strip("| `") for theirs, ours, *_ in cells}


def built(ours: str, model: nn.Module) -> Averager:
    """What a row says on our side: a rule, and perhaps options of the Averager."""
    names = {**vars(distavg), "torch": torch, "row": lambda rule, **options: (rule, options)}
    rule, options = eval(f"row({ours})", names)
    clock = Clock(steps_per_epoch=STEPS_PER_EPOCH, max_duration=f"{EPOCHS}ep")
    return Averager(model, {"a": rule}, clock=clock, **options)


def floating(model: nn.Module, *, buffers: bool) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters())
    if buffers:
        tensors |= {name: each for name, each in model.named_buffers() if each.dim()}
    return {name: tensor.detach() for name, tensor in tensors.items()}


class Theirs:
    """A system's average: told of every optimizer step, it gives its tensors."""

    has_buffers = False  # whether it has a say in them, too

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps = 0
        self.clone()

    def clone(self) -> None:
        live = floating(self.model, buffers=True)
        self.average = {name: tensor.clone() for name, tensor in live.items()}

    def after_step(self) -> None:
        self.steps += 1
        self.update()

    def update(self) -> None:
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        return self.average

    def add(self, decay: float) -> None:
        for name, live in floating(self.model, buffers=True).items():
            self.average[name].mul_(decay).add_(live, alpha=1 - decay)

    def lerp(self, decay: float) -> None:
        for name, live in floating(self.model, buffers=True).items():
            self.average[name].lerp_(live, 1 - decay)


# ---------------------------------------------------------------- with the real packages


def averaged_model(model: nn.Module, **options: Any) -> Any:
    class Averaged(Theirs):
        averaged = AveragedModel(model, **options)
        has_buffers = True

        def tensors(self) -> dict[str, Tensor]:
            return floating(self.averaged.module, buffers=True)

    return Averaged


def torch_swa(**options: Any) -> Callable[[nn.Module], Theirs]:
    """PyTorch's documentation: `if epoch > swa_start: swa_model.update_parameters(model)`."""

    def build(model: nn.Module) -> Theirs:
        class Swa(averaged_model(model, **options)):  # type: ignore[misc]
            def update(self) -> None:
                epoch, within = divmod(self.steps - 1, STEPS_PER_EPOCH)
                if within == STEPS_PER_EPOCH - 1 and epoch > 14:  # swa_start
                    self.averaged.update_parameters(model)

        return Swa(model)  # type: ignore[no-any-return]

    return build


def torch_ema(**options: Any) -> Callable[[nn.Module], Theirs]:
    def build(model: nn.Module) -> Theirs:
        class Ema(averaged_model(model, **options)):  # type: ignore[misc]
            def update(self) -> None:
                self.averaged.update_parameters(model)

        return Ema(model)  # type: ignore[no-any-return]

    return build


def lightning(model: nn.Module) -> Theirs:
    """Lightning's own decision and average, asked as its loop does, with a step counted from 0."""
    callbacks = importlib.import_module("lightning.pytorch.callbacks")
    callback = callbacks.EMAWeightAveraging(
        decay=0.99, update_every_n_steps=5, update_starting_at_step=20
    )
    options = {"use_buffers": callback._use_buffers, **callback._kwargs}

    class Lightning(averaged_model(model, **options)):  # type: ignore[misc]
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

            def tensors(self) -> dict[str, Tensor]:
                names = [name for name, _ in model.named_parameters()]
                return dict(zip(names, self.ema.shadow_params, strict=True))

        return Diffusers(model)

    return build


def timm(model: nn.Module) -> Theirs:
    """The module file of timm alone: the package wants torchvision, which wants another torch."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("timm is not installed (launch/setup.sh does that, without what it requires)")
    path = Path(spec.submodule_search_locations[0], "utils", "model_ema.py")
    file = importlib.util.spec_from_file_location("timm_model_ema", path)
    assert file is not None
    assert file.loader is not None
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)

    class Timm(Theirs):
        has_buffers = True
        ema = module.ModelEmaV3(
            model,
            decay=0.9,
            min_decay=0.1,
            use_warmup=True,
            warmup_gamma=2,
            warmup_power=0.8,
            update_after_step=15,
        )

        def update(self) -> None:
            self.ema.update(model, step=self.steps)

        def tensors(self) -> dict[str, Tensor]:
            return floating(self.ema.module, buffers=True)

    return Timm(model)


def ema_pytorch(model: nn.Module) -> Theirs:
    package = importlib.import_module("ema_pytorch")

    class EmaPytorch(Theirs):
        has_buffers = True
        ema = package.EMA(model, beta=0.9, update_after_step=30, update_every=10)

        def update(self) -> None:
            torch.set_default_dtype(torch.float64)  # its decay is a tensor, of fp32 otherwise
            try:
                self.ema.update()
            finally:
                torch.set_default_dtype(torch.float32)

        def tensors(self) -> dict[str, Tensor]:
            return floating(self.ema.ema_model, buffers=True)

    return EmaPytorch(model)


# ---------------------------------------------------------------- by their published formulas


class EmaOptimizer(Theirs):
    """Of NeMo: cloned before the first step; updated when the counter is a multiple."""

    def update(self) -> None:
        self.add(0.99)


class ComposerEma(Theirs):
    """Cloned at the first batch from the start on; `smoothing = 2 ** (-interval / half_life)`."""

    has_buffers = True

    def update(self) -> None:
        if self.steps == 24:
            self.clone()
        if self.steps >= 24:
            self.add(2 ** (-1 / 50))


class ComposerSwa(Theirs):
    """Looks after each epoch: fresh at the start, then every second time, up to the end."""

    has_buffers = True
    start, end, interval = 0.7, 0.95, 2
    counter = samples = 0
    is_completed = False

    def update(self) -> None:
        elapsed = self.steps / (STEPS_PER_EPOCH * EPOCHS)
        if self.steps % STEPS_PER_EPOCH or elapsed < self.start or self.is_completed:
            return
        if self.counter % self.interval == 0:
            self.add(self.samples / (self.samples + 1))
            for name, buffer in floating(self.model, buffers=True).items():
                if "running" in name:  # AveragedModel copies buffers
                    self.average[name].copy_(buffer)
            self.samples += 1
        self.counter += 1
        self.is_completed = elapsed >= self.end


class OlderComposerSwa(ComposerSwa):
    """Before it had an end and an interval: after each epoch from a share of the run on."""

    start, end, interval = 0.8, 1.1, 1


class TimmFormula(Theirs):
    """ModelEmaV3 with `update(model, step)`: s = max(0, step - update_after_step - 1)."""

    has_buffers = True

    def update(self) -> None:
        s = max(0, self.steps - 15 - 1)
        warm = 1 - (1 + s / 2.0) ** -0.8
        self.lerp(0.0 if s == 0 else max(0.1, min(warm, 0.9)))


class Torchtitan(Theirs):
    """Cloned when it is built; `decay` fixed."""

    def update(self) -> None:
        self.lerp(0.99)


class TorchtitanHalfLife(Theirs):
    """`decay = 2 ** (-1 / (half_life_fraction * firings))`."""

    def update(self) -> None:
        self.lerp(2 ** (-1 / (0.05 * self.steps)))


THEIRS: dict[str, list[Callable[[nn.Module], Theirs]]] = {
    "if epoch > 14: AveragedModel.update_parameters": [torch_swa()],
    "AveragedModel(avg_fn=get_ema_avg_fn(0.99))": [torch_ema(avg_fn=get_ema_avg_fn(0.99))],
    "AveragedModel(avg_fn=get_ema_avg_fn(0.99), use_buffers=True)": [
        torch_ema(avg_fn=get_ema_avg_fn(0.99), use_buffers=True)
    ],
    "EMAOptimizer(decay=0.99)": [EmaOptimizer],
    'Composer EMA(half_life="50ba", ema_start="24ba")': [ComposerEma],
    'Composer SWA(swa_start="0.7dur", swa_end="0.95dur", update_interval="2ep")': [ComposerSwa],
    "Composer, older: SWA(swa_start=0.8)": [OlderComposerSwa],
    "Lightning EMAWeightAveraging(decay=0.99, update_every_n_steps=5, "
    "update_starting_at_step=20)": [lightning],
    "diffusers EMAModel(decay=0.9, update_after_step=25)": [
        diffusers(decay=0.9, update_after_step=25)
    ],
    "diffusers EMAModel(decay=0.9, use_ema_warmup=True, min_decay=0.2)": [
        diffusers(decay=0.9, use_ema_warmup=True, min_decay=0.2)
    ],
    "timm ModelEmaV3(decay=0.9, min_decay=0.1, use_warmup=True, warmup_gamma=2, warmup_power=0.8, "
    "update_after_step=15)": [TimmFormula, timm],
    "ema_pytorch.EMA(beta=0.9, update_after_step=30, update_every=10)": [ema_pytorch],
    "torchtitan EMA(decay=0.99)": [Torchtitan],
    "torchtitan EMA(half_life_fraction=0.05)": [TorchtitanHalfLife],
}
# Those that are a lerp, and so the same bits in fp32.
LERPS: list[tuple[str, Callable[[nn.Module], Theirs]]] = [
    (next(iter(THEIRS)), torch_swa(multi_avg_fn=get_swa_multi_avg_fn())),
    (
        "AveragedModel(avg_fn=get_ema_avg_fn(0.99))",
        torch_ema(multi_avg_fn=get_ema_multi_avg_fn(0.99)),
    ),
    (
        "AveragedModel(avg_fn=get_ema_avg_fn(0.99), use_buffers=True)",
        torch_ema(multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True),
    ),
    *((row, each) for row, all_of in THEIRS.items() if row.startswith("t") for each in all_of),
]


def test_the_table_has_each_row_and_no_other() -> None:
    assert list(rows()) == list(THEIRS)


def follow(row: str, theirs: Callable[[nn.Module], Theirs], dtype: torch.dtype) -> int:
    """Feed both sides a run; the number of updates on ours."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(dtype)
    averager, other = built(rows()[row], model), theirs(model)
    tolerance = 1e-12 if dtype == torch.float64 else 0
    for _ in range(STEPS_PER_EPOCH * EPOCHS):
        with torch.no_grad():
            for tensor in floating(model, buffers=True).values():
                tensor.add_(torch.randn_like(tensor))
        averager.step()
        other.after_step()
        if averager["a"].num_updates:
            found = {shard.fqn: shard.tensor for shard in averager["a"].shards()}
            expected = other.tensors()
            assert found.keys() >= floating(model, buffers=other.has_buffers).keys()
            for name in floating(model, buffers=other.has_buffers):
                torch.testing.assert_close(
                    found[name], expected[name], rtol=tolerance, atol=tolerance
                )
    rule = averager["a"].rule
    if isinstance(rule, EMA) and rule.warmup is not None:  # its end is met, too
        assert averager["a"].weight == pytest.approx(0.1)
    return averager["a"].num_updates


@pytest.mark.filterwarnings("ignore")  # of the packages, while they are imported
@pytest.mark.parametrize(
    ("row", "theirs"), [(row, theirs) for row, all_of in THEIRS.items() for theirs in all_of]
)
def test_a_row_gives_the_numbers_it_replaces(
    row: str, theirs: Callable[[nn.Module], Theirs]
) -> None:
    assert follow(row, theirs, torch.float64) >= 3


@pytest.mark.parametrize(("row", "theirs"), LERPS)
def test_a_row_gives_the_bits_it_replaces(row: str, theirs: Callable[[nn.Module], Theirs]) -> None:
    assert follow(row, theirs, torch.float32) >= 3
