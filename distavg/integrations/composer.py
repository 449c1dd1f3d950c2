"""Composer's algorithms `SWA` and `EMA` over an `Averager`: import them from here instead.

They follow Composer's published interface (`match(event, state)`, `apply(event, state, logger)`,
`state_dict()`) without importing it, take its arguments, and update after the same batches and
epochs. What differs: the averages are sharded, models may be sharded too, and bf16 weights are
averaged in fp32. Composer's checkpoints hold the live weights as the model and the average under
its algorithm, never one in place of the other; those of its own algorithms are taken over.
`algorithm.averager` has all else, such as sharded checkpoints. A given `swa_lr` is annealed to, as
documented (Composer 0.32 takes the last one).
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch.optim.lr_scheduler import ConstantLR

from distavg import rules
from distavg.averager import Averager
from distavg.errors import ConfigError
from distavg.foreign import composers_ema_state, composers_swa_state
from distavg.learning_rate import ThenSWALR
from distavg.schedule import Time

__all__ = ["EMA", "SWA"]


class _Algorithm:
    """What both have: an averager of the model as it is when training starts, and its state."""

    find_unused_parameters = False
    backwards_create_graph = False
    events: tuple[str, ...] = ("fit_start", "batch_end", "epoch_end")

    def __init__(self, rule: rules.Rule, start: str, interval: str, *, buffers: str) -> None:
        self.averager: Averager | None = None
        self.is_started = False
        self._rule, self._buffers = rule, buffers
        self._start, self._interval = Time.parse(start), Time.parse(interval)
        is_whole = self._interval.value.denominator == 1 and self._interval.value > 0
        if self._interval.unit == "dur" or not is_whole:
            raise ConfigError(
                f"update_interval={interval!r} must be a whole number of 'ba' or 'ep'"
            )
        self._update_event = {"ba": "batch_end", "ep": "epoch_end"}[self._interval.unit]
        self._state: Mapping[str, Any] = {}  # loaded, for when there will be an averager

    @staticmethod
    def required_on_load() -> bool:
        """Whether a run of Composer's that was saved with it cannot go on without it."""
        return False

    def match(self, event: Any, state: Any) -> bool:
        """Whether `apply` has something to do."""
        is_ready = self.averager is not None or event.value == "fit_start"
        return event.value in self.events and (is_ready or bool(self._state))

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        """Act on an event. Collective."""
        if self.averager is None:
            self._build(state)
            self._state = {}
        elif event.value == "batch_end":
            self.averager.step()  # for its clock: nothing is due
        if event.value == self._update_event and self._is_on(state):
            self._after_interval(state)
            self.is_started = True

    def _is_on(self, state: Any) -> bool:
        return _is_reached(self._start, state)

    def _after_interval(self, state: Any) -> None:
        raise NotImplementedError

    def _build(self, state: Any) -> None:
        self.averager = Averager(state.model, self._rule, buffers=self._buffers)
        for _ in range(state.timestamp.batch.value):
            self.averager.step()
        if self._state.get("num_updates"):
            average = self.averager[self._rule.kind]
            for shard in average.shards():
                part = zip(shard.box.offsets, shard.box.sizes, strict=True)
                box = tuple(slice(offset, offset + size) for offset, size in part)
                shard.tensor.copy_(self._state["average"][shard.fqn][box])
            average.num_updates = self._state["num_updates"]

    def state_dict(self) -> dict[str, Any]:
        """The average as whole tensors, on rank 0, and its counters. Collective."""
        state = {**self._state, "repr": repr(self), "is_started": self.is_started}
        if self.averager is not None:
            state["average"] = self.averager.full_state_dict()
            state["num_updates"] = self.averager[self._rule.kind].num_updates
        return state

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = False) -> None:
        """Take back what `state_dict` gave, here or of Composer's own, once training starts."""
        self.is_started, self._state = state["is_started"], state


class EMA(_Algorithm):
    """Composer's `EMA`: an exponential moving average that is in place during evaluations.

    Args:
        half_life: The time in which a sample's weight halves, in `ba` or `ep`.
        smoothing: In its place: the share of the old average that an update keeps.
        ema_start: Time done when the average begins, in `ba`, `ep` or `dur`.
        update_interval: The time between updates; one unit of `half_life` if not given.

    Raises:
        ConfigError: Not one of `half_life` and `smoothing`, or times that cannot be.
    """

    events = (*_Algorithm.events, "batch_start", "eval_start", "eval_end")

    def __init__(
        self,
        half_life: str | None = "1000ba",
        smoothing: float | None = None,
        ema_start: str = "0.0dur",
        update_interval: str | None = None,
    ) -> None:
        if (half_life is None) == (smoothing is None):
            raise ConfigError(f"EMA: one of half_life={half_life!r} and smoothing={smoothing!r}")
        if update_interval is None:
            update_interval = "1ba" if half_life is None else f"1{Time.parse(half_life).unit}"
        if half_life is not None:
            life, interval = Time.parse(half_life), Time.parse(update_interval)
            if life.unit != interval.unit:
                raise ConfigError(f"EMA: {half_life=} and {update_interval=} have two units")
            smoothing = 2 ** -float(interval.value / life.value) if life.value else 0.0
        rule = rules.EMA(smoothing, update_interval=None)
        super().__init__(rule, ema_start, update_interval, buffers="averaged")
        self._swap = ExitStack()

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        """Act on an event. Collective."""
        self._swap.close()  # also of an evaluation that was interrupted
        super().apply(event, state, logger)
        if event.value == "eval_start" and self.is_started and self.averager is not None:
            self._swap.enter_context(self.averager.applied())

    def _is_on(self, state: Any) -> bool:
        return self.is_started or super()._is_on(state)

    def _after_interval(self, state: Any) -> None:
        now = _now(state, self._interval.unit)
        if self.averager and (not self.is_started or now % self._interval.value == 0):
            self.averager.update()

    def _build(self, state: Any) -> None:
        if "ema_model" in self._state:
            steps = state.timestamp.batch.value
            self._state = composers_ema_state(self._state, state.model, steps)
        super()._build(state)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = False) -> None:
        """Take back what `state_dict` gave, here or of Composer's own, once training starts."""
        if "ema_started" in state:
            state = {**state, "is_started": state["ema_started"]}
        super().load_state_dict(state, strict)


class SWA(_Algorithm):
    """Composer's `SWA`: the mean from `swa_start` on, which at `swa_end` becomes the model.

    Args:
        swa_start: Time done when averaging begins, in `dur` or `ep`.
        swa_end: When the average becomes the model and training goes on from it.
        update_interval: The time between updates, in `ba` or `ep`.
        schedule_swa_lr: Whether to anneal the learning rate meanwhile.
        anneal_strategy: `"linear"` or `"cos"`.
        anneal_steps: Over how many updates.
        swa_lr: The learning rate to end at; None for the one at the start.

    Raises:
        ConfigError: Times or settings that cannot be.
    """

    def __init__(
        self,
        swa_start: str = "0.7dur",
        swa_end: str = "0.97dur",
        update_interval: str = "1ep",
        schedule_swa_lr: bool = False,
        anneal_strategy: str = "linear",
        anneal_steps: int = 10,
        swa_lr: float | None = None,
    ) -> None:
        super().__init__(
            rules.SWA(update_interval=None), swa_start, update_interval, buffers="copied"
        )
        self._end = Time.parse(swa_end)
        if self._end.unit != self._start.unit or self._end.value <= self._start.value:
            raise ConfigError(f"SWA: {swa_end=} must be later than {swa_start=}, in the same unit")
        strategies: dict[str, Any] = {"lin": "linear", "cosine": "cos"}
        strategy = strategies.get(anneal_strategy.lower(), anneal_strategy.lower())
        if strategy not in ("linear", "cos") or anneal_steps < 1:
            raise ConfigError(f"SWA: {anneal_strategy=} and {anneal_steps=} cannot be")
        self._annealing = (swa_lr, anneal_steps, strategy) if schedule_swa_lr else None
        self._scheduler: ThenSWALR | None = None
        self._counter = 0
        self.is_completed = False

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        """Act on an event. Collective."""
        if not self.is_completed:
            super().apply(event, state, logger)
            if self._scheduler is not None and self.is_started:
                self._scheduler.step()  # the trainer's schedulers go on: this one has the last word
            if event.value == self._update_event and _is_reached(self._end, state):
                self.is_completed = True
                if self.averager is not None:
                    self.averager.copy_to()

    def _after_interval(self, state: Any) -> None:
        if self.averager is not None and self._counter % self._interval.value == 0:
            self.averager.update()
        self._counter += 1

    def _build(self, state: Any) -> None:
        super()._build(state)
        if self._annealing and self.averager is not None:
            swa_lr, steps, strategy = self._annealing
            (optimizer,) = state.optimizers
            self._scheduler = ThenSWALR(
                ConstantLR(optimizer, factor=1.0),
                self.averager,
                swa_lr,
                anneal_epochs=steps,
                anneal_strategy=strategy,
                once_per_update=True,
            )
            if self._state.get("scheduler"):
                self._scheduler.load_state_dict(self._state["scheduler"])

    def state_dict(self) -> dict[str, Any]:
        """The average as whole tensors, on rank 0, and its counters. Collective."""
        state = super().state_dict()
        state.update(counter=self._counter, is_completed=self.is_completed)
        if self._scheduler is not None:
            state["scheduler"] = self._scheduler.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = False) -> None:
        """Take back what `state_dict` gave, here or of Composer's own, once training starts."""
        if "swa_started" in state:
            state = composers_swa_state(state)
        super().load_state_dict(state, strict)
        self._counter, self.is_completed = state["counter"], state["is_completed"]


def _now(state: Any, unit: str) -> int:
    timestamp = state.timestamp
    return int((timestamp.batch if unit == "ba" else timestamp.epoch).value)


def _is_reached(time: Time, state: Any) -> bool:
    if time.unit != "dur":
        return _now(state, time.unit) >= time.value
    elapsed = state.get_elapsed_duration()
    return elapsed is not None and elapsed.value >= float(time.value)
