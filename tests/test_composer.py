"""The drop-ins for Composer's algorithms, in the smallest faithful stand-in of its event loop.

Composer pins a torch that is older than the oldest that distavg takes, so the loop below restates
that of `Trainer._train_loop` of Composer 0.32 (the order of events, schedulers and timestamps), and
its algorithms as their sources compute them. `test_in_the_real_trainer` runs the same cases in the
real trainer against the real algorithms where Composer can be imported all the same: it passed once
(2026-11-21) with Composer 0.32.1 installed without its pins beside torch 2.13, and a stub in place
of torchvision.
"""

from __future__ import annotations

import enum
import importlib
import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from checks import differences
from models import batch, build, whole_weights
from ranks import run_ranks
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR, LRScheduler

import distavg
from distavg import ConfigError, UnsupportedError
from distavg.integrations import composer as ours

BATCHES = 6  # in an epoch

# ---------------------------------------------------------------------------------- the stand-in


class Event(enum.Enum):
    """Those of Composer's that matter here, under the names that it gives them."""

    INIT = "init"
    FIT_START = "fit_start"
    BATCH_START = "batch_start"
    BATCH_END = "batch_end"
    EPOCH_END = "epoch_end"
    EVAL_START = "eval_start"
    EVAL_END = "eval_end"


@dataclass
class Time:
    value: Any


@dataclass
class Timestamp:
    batch: Time = field(default_factory=lambda: Time(0))
    epoch: Time = field(default_factory=lambda: Time(0))


@dataclass
class State:
    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    max_duration: str
    schedulers: tuple[LRScheduler, ...] = ()
    timestamp: Timestamp = field(default_factory=Timestamp)

    def get_elapsed_duration(self) -> Time:
        """In the unit of `max_duration`: a run in epochs is counted in whole ones."""
        length, unit = int(self.max_duration[:-2]), self.max_duration[-2:]
        now = self.timestamp.batch if unit == "ba" else self.timestamp.epoch
        return Time(now.value / length)


class Trainer:
    """Runs algorithms as Composer does; `look` sees the state after each batch and epoch."""

    def __init__(
        self, state: State, algorithms: list[Any], look: Callable[[State], object] = lambda s: None
    ) -> None:
        self.state, self.algorithms, self.look = state, algorithms, look
        self.run_event(Event.INIT)

    def run_event(self, event: Event) -> None:
        due = [each for each in self.algorithms if each.match(event, self.state)]
        for algorithm in due:
            algorithm.apply(event, self.state, None)
        if event in (Event.BATCH_END, Event.EPOCH_END):
            self.look(self.state)

    def evaluate(self) -> None:
        with torch.no_grad():
            self.run_event(Event.EVAL_START)
            self.run_event(Event.EVAL_END)

    def fit(self, last_batch: int | None = None) -> None:
        state, now = self.state, self.state.timestamp
        self.run_event(Event.FIT_START)
        while state.get_elapsed_duration().value < 1:
            while True:
                self.run_event(Event.BATCH_START)
                step(state, now.batch.value)
                for scheduler in state.schedulers:
                    scheduler.step()
                now.batch.value += 1
                self.run_event(Event.BATCH_END)
                if now.batch.value == last_batch:
                    return
                is_whole = now.batch.value % BATCHES == 0
                if is_whole or state.get_elapsed_duration().value >= 1:
                    break
            if is_whole:
                now.epoch.value += 1
                self.run_event(Event.EPOCH_END)
                self.evaluate()


def step(state: State, number: int) -> None:
    """A training step whose gradients are a function of its number and of the weights."""
    for index, parameter in enumerate(state.model.parameters()):
        generator = torch.Generator().manual_seed(100 * number + index)
        noise = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
        parameter.grad = noise + parameter.detach()
    state.model.train()
    state.model(torch.full((4, 3), float(number), dtype=torch.float64) + torch.eye(4, 3))
    state.optimizers[0].step()


def state_of(max_duration: str, lr: float = 0.05) -> State:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    return State(model, (SGD(model.parameters(), lr=lr),), max_duration)


# --------------------------------------------------------- Composer's algorithms, by their sources


def floating(model: nn.Module) -> dict[str, Tensor]:
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.detach() for name, tensor in named if tensor.is_floating_point()}


class TheirEma:
    """Cloned at the first event from the start on; updated where the time is a multiple."""

    def __init__(self, smoothing: float, start: Callable[[State], bool], interval: int, unit: str):
        self.smoothing, self.is_reached, self.interval, self.unit = smoothing, start, interval, unit
        self.average: dict[str, Tensor] | None = None

    def match(self, event: Event, state: State) -> bool:
        return event.value == {"ba": "batch_end", "ep": "epoch_end"}[self.unit]

    def apply(self, event: Event, state: State, logger: None) -> None:
        now = state.timestamp.batch if self.unit == "ba" else state.timestamp.epoch
        live = floating(state.model)
        if self.average is None and self.is_reached(state):
            self.average = {name: tensor.clone() for name, tensor in live.items()}
        if self.average is not None and now.value % self.interval == 0:
            for name, tensor in self.average.items():
                tensor.copy_(tensor * self.smoothing + live[name] * (1.0 - self.smoothing))


class TheirSwa:
    """A counter from the start on; at the event that reaches the end it becomes the model."""

    def __init__(
        self,
        start: Callable[[State], bool],
        end: Callable[[State], bool],
        interval: int,
        unit: str,
        anneal: tuple[float, int] | None = None,
    ):
        self.is_reached, self.is_over, self.interval, self.unit = start, end, interval, unit
        self.anneal = anneal
        self.average: dict[str, Tensor] | None = None
        self.counter = self.samples = 0
        self.is_completed = False
        self.first_lr: float | None = None
        self.lr: float | None = None

    def match(self, event: Event, state: State) -> bool:
        return event.value in ("batch_end", "epoch_end") and not self.is_completed

    def apply(self, event: Event, state: State, logger: None) -> None:
        if self.lr is not None:  # as it is documented: the trainer's schedulers do not undo it
            state.optimizers[0].param_groups[0]["lr"] = self.lr
        is_its = event.value == {"ba": "batch_end", "ep": "epoch_end"}[self.unit]
        if not is_its or not self.is_reached(state):
            return
        if self.counter % self.interval == 0:
            live = floating(state.model)
            if self.average is None:
                self.average = {name: tensor.clone() for name, tensor in live.items()}
            for name, parameter in state.model.named_parameters():
                self.average[name] += (parameter.detach() - self.average[name]) / (self.samples + 1)
            for name, buffer in state.model.named_buffers():
                if name in self.average:
                    self.average[name].copy_(buffer)
            self.samples += 1
            if self.anneal is not None:
                self.set_lr(state.optimizers[0].param_groups[0], *self.anneal)
        self.counter += 1
        if self.is_over(state):
            self.is_completed = True
            assert self.average is not None
            with torch.no_grad():
                for name, tensor in floating(state.model).items():
                    tensor.copy_(self.average[name])

    def set_lr(self, group: dict[str, Any], target: float, steps: int) -> None:
        if self.first_lr is None:
            self.first_lr = group["lr"]
        share = min(1, self.samples / steps)
        group["lr"] = self.lr = target * share + self.first_lr * (1 - share)


def since(text: str) -> Callable[[State], bool]:
    if text.endswith("dur"):
        return lambda state: bool(state.get_elapsed_duration().value >= float(text[:-3]))
    if text.endswith("ba"):
        return lambda state: bool(state.timestamp.batch.value >= int(text[:-2]))
    return lambda state: bool(state.timestamp.epoch.value >= int(text[:-2]))


EMAS: list[tuple[dict[str, Any], Callable[[], TheirEma]]] = [
    ({"half_life": "3ba"}, lambda: TheirEma(2 ** (-1 / 3), since("0ba"), 1, "ba")),
    ({"half_life": "1ep"}, lambda: TheirEma(0.5, since("0ba"), 1, "ep")),
    (
        {"half_life": "10ba", "update_interval": "4ba"},
        lambda: TheirEma(2 ** (-4 / 10), since("0ba"), 4, "ba"),
    ),
    (
        {"half_life": None, "smoothing": 0.8, "ema_start": "0.3dur", "update_interval": "1ba"},
        lambda: TheirEma(0.8, since("0.3dur"), 1, "ba"),
    ),
    (
        {"half_life": "2ep", "ema_start": "2ep"},
        lambda: TheirEma(2 ** (-1 / 2), since("2ep"), 1, "ep"),
    ),
    (
        {"half_life": "5ba", "ema_start": "7ba", "update_interval": "3ba"},
        lambda: TheirEma(2 ** (-3 / 5), since("7ba"), 3, "ba"),
    ),
]
SWAS: list[tuple[dict[str, Any], Callable[[], TheirSwa]]] = [
    (
        {"swa_start": "0.3dur", "swa_end": "0.8dur"},
        lambda: TheirSwa(since("0.3dur"), since("0.8dur"), 1, "ep"),
    ),
    (
        {"swa_start": "1ep", "swa_end": "3ep", "update_interval": "4ba"},
        lambda: TheirSwa(since("1ep"), since("3ep"), 4, "ba"),
    ),
    (
        {"swa_start": "0.2dur", "swa_end": "0.7dur", "update_interval": "2ba"},
        lambda: TheirSwa(since("0.2dur"), since("0.7dur"), 2, "ba"),
    ),
]
ANNEALED: dict[str, Any] = {
    "swa_start": "0.25dur",
    "swa_end": "0.75dur",
    "update_interval": "2ba",
    "schedule_swa_lr": True,
    "anneal_steps": 4,
    "swa_lr": 0.01,
}
Row = tuple[int, float, list[Tensor], dict[str, Tensor] | None]


def rows_of(state: State, algorithm: Any) -> list[Row]:
    """Batch, learning rate, weights and average at each event."""
    rows: list[Row] = []

    def look(state: State) -> None:
        weights = [tensor.clone() for tensor in floating(state.model).values()]
        lr = state.optimizers[0].param_groups[0]["lr"]
        rows.append((state.timestamp.batch.value, lr, weights, average_of(algorithm)))

    Trainer(state, [algorithm], look).fit()
    return rows


def average_of(algorithm: Any) -> dict[str, Tensor] | None:
    if isinstance(algorithm, (TheirEma, TheirSwa)):
        average = algorithm.average
    elif algorithm.is_started:
        (name,) = algorithm.averager.names
        average = {shard.fqn: shard.tensor for shard in algorithm.averager[name].shards()}
    else:
        average = None
    if average is None:
        return None
    return {name: tensor.clone() for name, tensor in sorted(average.items()) if tensor.dim()}


def compare(found: list[Row], expected: list[Row]) -> None:
    assert len(found) == len(expected) > 20
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_duration", ["4ep", "22ba"])
@pytest.mark.parametrize("case", range(len(EMAS)))
def test_ema_has_the_numbers_of_composers(case: int, max_duration: str) -> None:
    arguments, theirs = EMAS[case]
    found = rows_of(state_of(max_duration), ours.EMA(**arguments))
    expected = rows_of(state_of(max_duration), theirs())
    compare(found, expected)


@pytest.mark.parametrize("max_duration", ["4ep", "22ba"])
@pytest.mark.parametrize("case", range(len(SWAS)))
def test_swa_has_the_numbers_of_composers(case: int, max_duration: str) -> None:
    arguments, theirs = SWAS[case]
    found = rows_of(state_of(max_duration), ours.SWA(**arguments))
    expected = rows_of(state_of(max_duration), theirs())
    compare(found, expected)
    changed = [torch.equal(row[2][0], row[3]["0.weight"]) for row in found if row[3] is not None]
    assert any(changed)  # the average became the model


@pytest.mark.parametrize("max_duration", ["4ep", "22ba"])
@pytest.mark.parametrize("has_scheduler", [False, True])
def test_swa_anneals_once_per_update_whatever_the_trainers_scheduler_does(
    max_duration: str, *, has_scheduler: bool
) -> None:
    def state() -> State:
        state = state_of(max_duration)
        if has_scheduler:
            state.schedulers = (LinearLR(state.optimizers[0], 1.0, 0.1, total_iters=24),)
        return state

    theirs = TheirSwa(since("0.25dur"), since("0.75dur"), 2, "ba", anneal=(0.01, 4))
    found = rows_of(state(), ours.SWA(**ANNEALED))
    compare(found, rows_of(state(), theirs))
    assert len({lr for _, lr, _, _ in found if lr > 0}) >= 5
    if not has_scheduler:
        assert found[-1][1] == pytest.approx(0.01)


def test_without_a_target_the_learning_rate_stays() -> None:
    state = state_of("4ep")
    state.schedulers = (LinearLR(state.optimizers[0], 1.0, 0.1, total_iters=24),)
    rows = rows_of(state, ours.SWA(**{**ANNEALED, "swa_lr": None}))
    during = {lr for batch, lr, _, average in rows if average is not None and 7 <= batch <= 17}
    assert len(during) == 1


def test_the_ema_is_the_model_during_an_evaluation() -> None:
    algorithm = ours.EMA("3ba", ema_start="1ep", update_interval="1ba")
    seen: list[bool] = []

    class Look:
        def match(self, event: Event, state: State) -> bool:
            return event in (Event.EVAL_START, Event.BATCH_START)

        def apply(self, event: Event, state: State, logger: None) -> None:
            if event == Event.EVAL_START:
                live = {s.fqn: s.tensor for s in algorithm.averager["ema"].live}  # type: ignore[index]
                now = {s.fqn: s.tensor for s in algorithm.averager["ema"].shards()}  # type: ignore[index]
                seen.append(all(live[name].data_ptr() == now[name].data_ptr() for name in live))

    state = state_of("4ep")
    Trainer(state, [algorithm, Look()]).fit()
    assert seen == [False, True, True, True]  # it has not begun when the first epoch ends
    plain = state_of("4ep")
    Trainer(plain, []).fit()
    assert all(map(torch.equal, state.model.parameters(), plain.model.parameters()))


@pytest.mark.parametrize("last_batch", [3, 9, 12, 17])
@pytest.mark.parametrize(
    "make",
    [
        lambda: ours.EMA("5ba", update_interval="2ba", ema_start="1ep"),
        lambda: ours.SWA(**ANNEALED),
        lambda: ours.SWA("0.3dur", "0.8dur"),
    ],
)
def test_a_resume(make: Callable[[], Any], last_batch: int) -> None:
    whole_state, whole = state_of("4ep"), make()
    Trainer(whole_state, [whole]).fit()

    state, first = state_of("4ep"), make()
    Trainer(state, [first]).fit(last_batch)
    content = io.BytesIO()
    saved = state.model.state_dict(), state.optimizers[0].state_dict(), first.state_dict()
    torch.save(saved, content)
    content.seek(0)
    weights, optimizer, algorithm = torch.load(content)
    resumed_state, resumed = state_of("4ep", lr=1.0), make()
    trainer = Trainer(resumed_state, [resumed])
    resumed_state.model.load_state_dict(weights)
    resumed_state.optimizers[0].load_state_dict(optimizer)
    resumed_state.timestamp = state.timestamp
    resumed.load_state_dict(algorithm)
    if last_batch == 12:  # saved when the epoch's last batch was done, and not yet the epoch
        resumed_state.timestamp.epoch.value += 1
        trainer.run_event(Event.FIT_START)
        trainer.run_event(Event.EPOCH_END)
    trainer.fit()
    compare_states(resumed_state, whole_state)
    torch.testing.assert_close(average_of(resumed), average_of(whole), rtol=0, atol=0)


def compare_states(found: State, expected: State) -> None:
    torch.testing.assert_close(
        found.model.state_dict(), expected.model.state_dict(), rtol=0, atol=0
    )
    assert found.optimizers[0].param_groups[0]["lr"] == expected.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ours.EMA("1ba", 0.9), "EMA: one of half_life='1ba' and smoothing=0.9"),
        (lambda: ours.EMA(None), "EMA: one of half_life=None and smoothing=None"),
        (lambda: ours.EMA("1ep", update_interval="1ba"), "EMA: half_life='1ep' and"),
        (lambda: ours.EMA("0.1dur"), "update_interval='1dur' must be a whole"),
        (lambda: ours.EMA("1ba", update_interval="0ba"), "update_interval='0ba' must be a whole"),
        (lambda: ours.SWA(update_interval="0.5ep"), "update_interval='0.5ep' must be a whole"),
        (lambda: ours.SWA(anneal_strategy="step"), "SWA: anneal_strategy='step' and"),
        (lambda: ours.SWA(anneal_steps=0), "SWA: anneal_strategy='linear' and anneal_steps=0"),
        (lambda: ours.SWA("0.9dur", "0.8dur"), "SWA: swa_end='0.8dur' must be later"),
        (lambda: ours.SWA("1ep", "0.8dur"), "SWA: swa_end='0.8dur' must be later"),
        (lambda: ours.SWA(update_interval="1"), "'1' is not a time"),
    ],
)
def test_what_cannot_be(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_the_defaults_are_composers() -> None:
    assert ours.EMA("0ba")._rule == distavg.EMA(0.0, update_interval=None)
    assert ours.EMA(None, 0.9)._update_event == "batch_end"
    swa = ours.SWA(schedule_swa_lr=True, anneal_strategy="COSINE")
    assert (str(swa._start.value), str(swa._end.value)) == ("7/10", "97/100")
    assert swa._annealing == (None, 10, "cos")
    assert not ours.EMA().match(Event.EVAL_START, state_of("4ep"))


# ---------------------------------------------------------------------- states of Composer's own


def theirs_at(algorithm: Any, last_batch: int) -> tuple[State, dict[str, Tensor]]:
    """A run with one of Composer's, up to a batch, and its average in fp64."""
    state = state_of("4ep")
    Trainer(state, [algorithm]).fit(last_batch)
    return state, dict(algorithm.average)


def goes_on(state: State, algorithm: Any, expected: Any) -> None:
    """Train to the end, and compare with a run of Composer's that was never stopped."""
    whole = state_of("4ep")
    Trainer(whole, [expected]).fit()
    Trainer(state, [algorithm]).fit()
    torch.testing.assert_close(floating(state.model), floating(whole.model), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(average_of(algorithm), average_of(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("is_active", [False, True])
@pytest.mark.parametrize("is_old", [False, True])
def test_a_state_of_composers_own_ema_goes_on(
    prefix: str, *, is_active: bool, is_old: bool
) -> None:
    """Where the average was the model, the training weights come back from beside it."""
    make = lambda: TheirEma(2 ** (-4 / 10), since("0ba"), 4, "ba")  # noqa: E731
    state, average = theirs_at(make(), 9)
    training = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    average = training | average
    apart = {prefix + name: t for name, t in (training if is_active else average).items()}
    theirs: dict[str, Any] = {"ema_weights_active": is_active, "ema_started": True}
    if is_old:
        both = {"ema_model": average, "training_model": training}
        theirs |= {k: {prefix + n: t for n, t in v.items()} for k, v in both.items()}
    else:
        parameters = {prefix + name for name, _ in state.model.named_parameters()}
        theirs["ema_model"] = {
            "named_parameters_dict": {n: t for n, t in apart.items() if n in parameters},
            "named_buffers_dict": {n: t for n, t in apart.items() if n not in parameters},
        }
    state.model.load_state_dict(average if is_active else training)
    algorithm = ours.EMA("10ba", update_interval="4ba")
    algorithm.load_state_dict(theirs)
    goes_on(state, algorithm, make())


def test_a_state_of_composers_own_swa_goes_on() -> None:
    make = lambda: TheirSwa(since("1ep"), since("3ep"), 4, "ba")  # noqa: E731
    stopped = make()
    state, average = theirs_at(stopped, 13)
    algorithm = ours.SWA("1ep", "3ep", update_interval="4ba")
    theirs = {
        "swa_model": {
            "n_averaged": torch.tensor(stopped.samples),
            **{f"module.{n}": t for n, t in (state.model.state_dict() | average).items()},
        },
        "swa_completed": False,
        "swa_started": True,
        "step_counter": stopped.counter,
        "swa_scheduler": None,
    }
    algorithm.load_state_dict(theirs)
    goes_on(state, algorithm, make())
    with pytest.raises(UnsupportedError, match="the learning rate schedule in this state"):
        algorithm.load_state_dict({**theirs, "swa_scheduler": {"last_epoch": 1}})


# --------------------------------------------------------------------- odd ways through a trainer


def resumed_at(last_batch: int, make: Callable[[], Any]) -> tuple[State, Any, Any]:
    state, first = state_of("4ep"), make()
    Trainer(state, [first]).fit(last_batch)
    resumed = make()
    resumed.load_state_dict(first.state_dict())
    return state, first, resumed


def test_an_evaluation_alone_after_a_resume_is_of_the_average() -> None:
    state, first, resumed = resumed_at(9, lambda: ours.EMA("3ba"))
    seen: list[Tensor] = []
    trainer = Trainer(state, [resumed])
    trainer.run_event(Event.EVAL_START)
    seen += [parameter.detach().clone() for parameter in state.model.parameters()]
    trainer.run_event(Event.EVAL_END)
    average = {shard.fqn: shard.tensor for shard in first.averager["ema"].shards()}
    names = [name for name, _ in state.model.named_parameters()]
    assert all(torch.equal(average[name], tensor) for name, tensor in zip(names, seen, strict=True))


@pytest.mark.parametrize("make", [lambda: ours.EMA("3ba"), lambda: ours.SWA(**ANNEALED)])
def test_what_is_saved_before_training_is_what_was_loaded(make: Callable[[], Any]) -> None:
    _, first, resumed = resumed_at(9, make)
    again = make()
    again.load_state_dict(resumed.state_dict())
    found, expected = again.state_dict(), first.state_dict()
    assert found.keys() == expected.keys()
    assert found["num_updates"] == expected["num_updates"] > 0
    torch.testing.assert_close(found["average"], expected["average"], rtol=0, atol=0)
    assert found.get("scheduler") == expected.get("scheduler")


def test_a_state_from_before_training() -> None:
    resumed = ours.SWA("1ep", "3ep")
    resumed.load_state_dict(ours.SWA("1ep", "3ep").state_dict())
    Trainer(state_of("4ep"), [resumed]).fit()
    assert resumed.is_completed


def test_no_whole_copy_stays() -> None:
    state, _, resumed = resumed_at(9, lambda: ours.EMA("3ba"))
    Trainer(state, [resumed]).fit()
    assert resumed._state == {}


def test_training_goes_on_after_an_evaluation_that_was_interrupted() -> None:
    state, algorithm = state_of("4ep"), ours.EMA("3ba")
    trainer = Trainer(state, [algorithm])
    trainer.fit(9)
    live = [parameter.detach().clone() for parameter in state.model.parameters()]
    trainer.run_event(Event.EVAL_START)
    trainer.run_event(Event.EVAL_START)  # another one
    assert not torch.equal(next(state.model.parameters()), live[0])
    trainer.run_event(Event.BATCH_START)
    assert all(map(torch.equal, state.model.parameters(), live))
    trainer.fit()


def test_a_run_that_is_made_longer_does_not_begin_again() -> None:
    state, algorithm = state_of("4ep"), ours.EMA("3ba", ema_start="0.5dur")
    trainer = Trainer(state, [algorithm])
    trainer.fit(14)
    num_updates = algorithm.averager["ema"].num_updates  # type: ignore[index]
    state.max_duration = "40ep"
    trainer.fit(17)
    assert algorithm.averager["ema"].num_updates == num_updates + 3  # type: ignore[index]


# --------------------------------------------------------------------------------- several ranks


def on_ranks(layout: str) -> list[str]:
    """What a run under a wrapper does not do as the mean of the whole weights would."""
    model = build(layout)
    algorithm = ours.SWA("1ep", "3ep", update_interval="2ba")
    state = State(model, (SGD(model.parameters(), lr=0.1),), "4ep")
    now = state.timestamp
    algorithm.apply(Event.FIT_START, state, None)
    samples = []
    offences: list[str] = []
    for number in range(4 * BATCHES):
        model(batch(number)).square().sum().backward()
        state.optimizers[0].step()
        state.optimizers[0].zero_grad()
        now.batch.value += 1
        is_sampled = now.epoch.value >= 1 and algorithm._counter % 2 == 0
        if is_sampled and not algorithm.is_completed:
            samples.append(whole_weights(model))
        if algorithm.match(Event.BATCH_END, state):
            was_completed = algorithm.is_completed
            algorithm.apply(Event.BATCH_END, state, None)
            if algorithm.is_completed and not was_completed:
                mean = dict(samples[0])
                for count, sample in enumerate(samples[1:], start=2):
                    mean = {n: tensor.lerp(sample[n], 1 / count) for n, tensor in mean.items()}
                offences += differences(whole_weights(model), mean)
        if now.batch.value % BATCHES == 0:
            now.epoch.value += 1
            algorithm.apply(Event.EPOCH_END, state, None)
    saved = algorithm.state_dict()
    everyones: list[Any] = [None, None]
    torch.distributed.all_gather_object(everyones, saved)
    resumed = ours.SWA("1ep", "3ep", update_interval="2ba")
    resumed.load_state_dict(everyones[0])  # the first rank's file, as Composer does
    resumed.is_completed = False  # so that it builds
    resumed.apply(Event.FIT_START, state, None)
    assert resumed.averager is not None
    assert algorithm.averager is not None
    again = resumed.averager.full_state_dict(all_ranks=True)
    offences += differences(again, algorithm.averager.full_state_dict(all_ranks=True))
    assert len(samples) == 7
    return offences


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "fsdp1"])
def test_on_ranks(layout: str) -> None:
    assert run_ranks(on_ranks, 2, layout) == [[], []]


# ------------------------------------------------------------------------------- the real package


def in_the_trainer(composer: Any, algorithm: Any, max_duration: str) -> list[Row]:
    """The same rows, from a real run."""
    models = importlib.import_module("composer.models")
    rows: list[Row] = []

    class Model(models.ComposerModel):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = state_of("1ep").model

        def forward(self, batch: Any) -> Any:
            return self.net(batch[0])

        def loss(self, outputs: Tensor, batch: Any) -> Any:
            return (outputs - batch[1]).square().mean()

    class Look(composer.Callback):  # type: ignore[misc, name-defined]
        def batch_end(self, state: Any, logger: Any) -> None:
            weights = [tensor.clone() for tensor in floating(state.model).values()]
            lr = state.optimizers[0].param_groups[0]["lr"]
            rows.append((state.timestamp.batch.value, lr, weights, None))

        epoch_end = eval_start = batch_end

    torch.manual_seed(1)
    model = Model()
    data = torch.utils.data.TensorDataset(
        torch.randn(8 * BATCHES, 3).double(), torch.randn(8 * BATCHES, 1).double()
    )
    composer.Trainer(
        model=model,
        train_dataloader=torch.utils.data.DataLoader(data, batch_size=8),
        eval_dataloader=torch.utils.data.DataLoader(data, batch_size=24),
        max_duration=max_duration,
        optimizers=SGD(model.parameters(), lr=0.05),
        algorithms=[algorithm],
        callbacks=[Look()],
        device="cpu",
        progress_bar=False,
    ).fit()
    return rows


@pytest.mark.filterwarnings("ignore")
def test_in_the_real_trainer() -> None:
    """Weights in training, in evaluations (the EMA's own), and after the end of SWA."""
    composer = pytest.importorskip("composer", reason="Composer pins torch<2.7.1: see above")
    algorithms = importlib.import_module("composer.algorithms")
    cases = [("EMA", arguments) for arguments, _ in EMAS]
    cases += [("SWA", arguments) for arguments, _ in SWAS]
    for (name, arguments), max_duration in itertools.product(cases, ["4ep", "22ba"]):
        found = in_the_trainer(composer, getattr(ours, name)(**arguments), max_duration)
        theirs = in_the_trainer(composer, getattr(algorithms, name)(**arguments), max_duration)
        compare(found, theirs)
