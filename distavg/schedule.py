"""Time strings and the clock: is an update due after this optimizer step? Plain Python.

Time is counted in optimizer steps (`"100ba"`, for batch, as in Composer), epochs (`"3ep"`) and
shares of the whole run (`"0.75dur"`). Positions are exact: an epoch position is a `Fraction`, so
an epoch ends exactly after `steps_per_epoch` steps, and a run resumed with another number of
steps per epoch goes on from the same place in the same epoch.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from distavg.errors import ConfigError
from distavg.rules import Rule

__all__ = ["Clock", "Position", "Schedule", "Time"]


@dataclass(frozen=True, slots=True)
class Time:
    """An amount of time in one unit: `ba` (optimizer steps), `ep` (epochs) or `dur` (the run).

    >>> Time.parse("0.75dur")
    Time(value=Fraction(3, 4), unit='dur')
    """

    value: int | Fraction
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Time":
        """Read a time string.

        Raises:
            ConfigError: It is not a non-negative number and one of the three units, a fraction
                of a step, or more than one whole run.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ba|ep|dur)", text) if type(text) is str else None
        if match is None:
            raise ConfigError(
                f"{text!r} is not a time: write a number and a unit, as in '100ba' (optimizer "
                "steps), '3ep' (epochs) or '0.75dur' (share of the run)"
            )
        time = cls(Fraction(match[1]), match[2])
        if time.unit == "ba" and time.value.denominator != 1:
            raise ConfigError(f"{text!r}: optimizer steps come in whole numbers")
        if time.unit == "dur" and time.value > 1:
            raise ConfigError(f"{text!r}: a run is 1dur long")
        return time


@dataclass(frozen=True, slots=True)
class Position:
    """How far training has come: optimizer steps and epochs done."""

    steps: int = 0
    epochs: Fraction = Fraction(0)

    def at(self, unit: str) -> int | Fraction:
        """The position in `ba` or `ep`."""
        return self.steps if unit == "ba" else self.epochs


@dataclass(frozen=True, slots=True)
class Clock:
    """How long an epoch and the run are; needed for the units `ep` and `dur`.

    Attributes:
        steps_per_epoch: Optimizer steps (not micro-batches) in an epoch on one rank.
        max_duration: The length of the run, in `ba` or `ep`.

    Raises:
        ConfigError: A length that is not positive, or a `max_duration` in epochs without
            `steps_per_epoch`.
    """

    steps_per_epoch: int | None = None
    max_duration: str | None = None

    def __post_init__(self) -> None:
        steps = self.steps_per_epoch
        if steps is not None and (type(steps) is not int or steps < 1):
            raise ConfigError(f"Clock: steps_per_epoch must be a positive integer, not {steps!r}")
        if self.max_duration is not None:
            duration = Time.parse(self.max_duration)
            if duration.unit == "dur" or not duration.value:
                raise ConfigError(
                    f"Clock: max_duration={self.max_duration!r}: give a positive length in 'ba' "
                    "or 'ep'"
                )
            self.in_steps(duration)

    def resolve(self, time: Time) -> Time:
        """Turn `dur` into the unit of `max_duration`; other units stay as they are."""
        if time.unit != "dur":
            return time
        if self.max_duration is None:
            raise ConfigError(
                f"'{float(time.value)}dur' needs the length of the run: "
                "pass clock=Clock(max_duration=...), for example '10ep' or '20000ba'"
            )
        duration = Time.parse(self.max_duration)
        return Time(time.value * duration.value, duration.unit)

    def in_steps(self, time: Time) -> int | Fraction:
        """A time in optimizer steps (a fraction, where an epoch position is one)."""
        time = self.resolve(time)
        if time.unit == "ba":
            return time.value
        if self.steps_per_epoch is None:
            raise ConfigError(
                f"'{float(time.value):g}ep' needs the number of optimizer steps in an epoch: "
                "pass clock=Clock(steps_per_epoch=...), for example len(loader)"
            )
        return time.value * self.steps_per_epoch

    def after_step(self, position: Position) -> Position:
        """The position one optimizer step later."""
        if self.steps_per_epoch is None:
            return Position(position.steps + 1, position.epochs)
        return Position(position.steps + 1, position.epochs + Fraction(1, self.steps_per_epoch))


class Schedule:
    """When one rule updates, under one clock.

    An update is due after a step that takes the position to or across a multiple of the rule's
    `update_interval`, if `start` had been reached before that step and `end` is not passed. With
    `include_initial` the first is due when `start` is reached (for an interval in epochs, at the
    end of that epoch), and intervals count from there.

    Raises:
        ConfigError: A time that the clock cannot resolve, or a schedule that never updates.
    """

    def __init__(self, name: str, rule: Rule, clock: Clock) -> None:
        self.name = name
        self.rule = rule
        self.clock = clock
        try:
            self._start = self._time(rule.start)
            self._end = self._time(rule.end) if rule.end is not None else None
            interval = rule.update_interval
            self._interval = self._time(interval) if interval is not None else None
            if self._interval and not self._interval.value:
                raise ConfigError(f"update_interval={interval!r} must be positive")
            self._unit = (self._interval or self._start).unit
            self._anchor = self._find_anchor()
            self.resolved_rule = rule.resolved(self._updates_in)
            self._check_updates_ever()
        except ConfigError as error:
            raise ConfigError(f"average {name!r}: {error}") from None

    def _time(self, text: str) -> Time:
        time = Time.parse(text)
        self.clock.in_steps(time)  # a unit that cannot be resolved is found here, not in training
        time = self.clock.resolve(time)
        # Whole numbers are compared after each step, for which a Fraction is slow.
        return time if time.value.denominator > 1 else Time(int(time.value), time.unit)

    def _updates_in(self, text: str) -> float:
        time = self._time(text)
        interval = self._interval
        if interval is None:
            raise ConfigError(f"{text!r} needs an update_interval")
        if time.unit == interval.unit:
            return float(time.value / interval.value)
        return float(self.clock.in_steps(time) / self.clock.in_steps(interval))

    @property
    def starts_at_once(self) -> bool:
        """Whether the weights before the first step are the first sample."""
        return self._anchor == 0

    def is_started(self, position: Position) -> bool:
        """Whether the weights at a position can be a sample."""
        if self._anchor is None:
            return position.at(self._start.unit) > self._start.value
        return position.at(self._unit) >= self._anchor

    def is_over(self, position: Position) -> bool:
        """Whether `end` is reached, so that no update is due any more."""
        return self._end is not None and position.at(self._end.unit) >= self._end.value

    @property
    def ends_in_last_epoch(self) -> bool:
        """Whether less than an epoch of the run is left at `end`."""
        clock = self.clock
        if self._end is None or clock.max_duration is None or clock.steps_per_epoch is None:
            return False
        rest = clock.in_steps(Time.parse(clock.max_duration)) - clock.in_steps(self._end)
        return rest < clock.steps_per_epoch

    def _find_anchor(self) -> int | None:
        """Where intervals count from, in their unit, if the weights there are a sample."""
        if not self.rule.include_initial:
            return None
        if self._start.unit == self._unit:
            return math.ceil(self._start.value)
        per_unit = self.clock.in_steps(Time(Fraction(1), self._unit))
        return math.ceil(self.clock.in_steps(self._start) / per_unit)

    def _check_updates_ever(self) -> None:
        if self._interval is None:
            return
        interval = self.clock.in_steps(self._interval)
        if self._anchor:
            first = math.ceil(self.clock.in_steps(Time(self._anchor, self._unit)))
        else:
            # The first multiple of the interval that is crossed by a step later than the start.
            start = math.ceil(self.clock.in_steps(self._start))
            first = math.ceil((start // interval + 1) * interval)
        limits = [self._end] if self._end is not None else []
        if self.clock.max_duration is not None:
            limits.append(Time.parse(self.clock.max_duration))
        last = min((math.floor(self.clock.in_steps(limit)) for limit in limits), default=None)
        if last is not None and first > last:
            raise ConfigError(
                f"start={self.rule.start!r}, end={self.rule.end!r} and update_interval="
                f"{self.rule.update_interval!r} never update: the first update would come after "
                f"step {first}, the last possible one after step {last}"
            )

    def due(self, before: Position, after: Position) -> bool:
        """Whether an update is due after the step that led from `before` to `after`."""
        if self._end is not None and after.at(self._end.unit) > self._end.value:
            return False
        was, now = before.at(self._unit), after.at(self._unit)
        if self._anchor is None:
            is_started = before.at(self._start.unit) >= self._start.value
        else:
            was, now = was - self._anchor, now - self._anchor
            if was < 0 <= now:
                return True
            is_started = was >= 0
        interval = self._interval
        return is_started and interval is not None and now // interval.value > was // interval.value
