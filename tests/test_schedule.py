"""Schedules, against a simulation that counts steps and epochs one by one."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distavg.errors import ConfigError
from distavg.rules import EMA, SWA, Rule
from distavg.schedule import Clock, Position, Schedule, Time


def due_steps(rule: Rule, clock: Clock, num_steps: int, begin: Position | None = None) -> list[int]:
    """The steps (counted from 1) after which an update is due."""
    schedule = Schedule("a", rule, clock)
    position, found = begin or Position(), []
    for _ in range(num_steps):
        after = clock.after_step(position)
        if schedule.due(position, after):
            found.append(after.steps)
        position = after
    return found


def message_of(rule: Rule, clock: Clock) -> str:
    with pytest.raises(ConfigError) as caught:
        Schedule("a", rule, clock)
    return str(caught.value)


# ------------------------------------------------------------------------------------------ Time


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("100ba", Fraction(100), "ba"),
        ("0ba", Fraction(0), "ba"),
        ("3ep", Fraction(3), "ep"),
        ("0.1ep", Fraction(1, 10), "ep"),
        ("0.75dur", Fraction(3, 4), "dur"),
        ("1dur", Fraction(1), "dur"),
        ("2.0ba", Fraction(2), "ba"),
    ],
)
def test_times_are_exact(text: str, value: Fraction, unit: str) -> None:
    assert Time.parse(text) == Time(value, unit)


@pytest.mark.parametrize(
    "text",
    ["", "100", "ba", "-1ba", "1 ba", "1ba ", "1ba\n", "1e3ba", ".5ep", "1.ep", "infep", "3sec"],
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Time.parse(text)
    assert str(caught.value) == (
        f"{text!r} is not a time: write a number and a unit, as in '100ba' (optimizer steps), "
        "'3ep' (epochs) or '0.75dur' (share of the run)"
    )


@pytest.mark.parametrize("value", [3, 0.5, None, b"1ba", ["1ba"]])
def test_a_time_is_a_string(value: Any) -> None:
    with pytest.raises(ConfigError, match="is not a time: write a number and a unit"):
        Time.parse(value)


def test_times_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"^'1.5ba': optimizer steps come in whole numbers$"):
        Time.parse("1.5ba")
    with pytest.raises(ConfigError, match=r"^'1.1dur': a run is 1dur long$"):
        Time.parse("1.1dur")


# ----------------------------------------------------------------------------------------- Clock


@pytest.mark.parametrize("steps", [0, -1, 2.0, "10", True])
def test_steps_per_epoch_is_a_positive_integer(steps: int) -> None:
    with pytest.raises(ConfigError) as caught:
        Clock(steps_per_epoch=steps)
    assert str(caught.value) == (
        f"Clock: steps_per_epoch must be a positive integer, not {steps!r}"
    )


@pytest.mark.parametrize("duration", ["0ba", "0ep", "0.5dur", "1dur"])
def test_max_duration_is_a_length_in_steps_or_epochs(duration: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Clock(steps_per_epoch=3, max_duration=duration)
    assert str(caught.value) == (
        f"Clock: max_duration={duration!r}: give a positive length in 'ba' or 'ep'"
    )


def test_max_duration_in_epochs_needs_their_length() -> None:
    with pytest.raises(ConfigError, match=r"'10ep' needs the number of optimizer steps in an"):
        Clock(max_duration="10ep")


@given(st.integers(1, 50), st.integers(0, 200))
def test_an_epoch_ends_exactly_after_its_steps(steps_per_epoch: int, num_steps: int) -> None:
    clock, position = Clock(steps_per_epoch=steps_per_epoch), Position()
    for _ in range(num_steps):
        position = clock.after_step(position)
    assert position == Position(num_steps, Fraction(num_steps, steps_per_epoch))
    assert position.at("ba") == num_steps
    assert position.at("ep") == Fraction(num_steps, steps_per_epoch)


def test_without_an_epochs_length_none_pass() -> None:
    assert Clock().after_step(Position(4, Fraction(2))) == Position(5, Fraction(2))


def test_times_in_steps() -> None:
    clock = Clock(steps_per_epoch=7, max_duration="4ep")
    assert clock.in_steps(Time.parse("3ba")) == 3
    assert clock.in_steps(Time.parse("2.5ep")) == Fraction(35, 2)
    assert clock.in_steps(Time.parse("0.5dur")) == 14
    assert clock.resolve(Time.parse("0.5dur")) == Time(Fraction(2), "ep")
    assert Clock(max_duration="30ba").resolve(Time.parse("0.1dur")) == Time(Fraction(3), "ba")


# ------------------------------------------------------------------------------- when it is due


def test_every_step() -> None:
    assert due_steps(EMA(), Clock(), 4) == [1, 2, 3, 4]


def test_start_is_the_steps_done_after_which_the_next_due_step_is_first() -> None:
    assert due_steps(EMA(start="2ba"), Clock(), 5) == [3, 4, 5]
    assert due_steps(EMA(start="2ba", update_interval="3ba"), Clock(), 10) == [3, 6, 9]
    assert due_steps(EMA(start="3ba", update_interval="3ba"), Clock(), 10) == [6, 9]


def test_end_is_the_last_step_that_may_update() -> None:
    assert due_steps(EMA(end="3ba"), Clock(), 5) == [1, 2, 3]
    assert due_steps(SWA(end="2ep"), Clock(steps_per_epoch=3), 12) == [3, 6]


def test_epochs() -> None:
    assert due_steps(SWA(), Clock(steps_per_epoch=4), 12) == [4, 8, 12]
    assert due_steps(SWA(start="1ep"), Clock(steps_per_epoch=4), 12) == [8, 12]
    # Half epochs of three steps end within a step, which is the one that crosses them.
    assert due_steps(SWA(update_interval="0.5ep"), Clock(steps_per_epoch=3), 6) == [2, 3, 5, 6]


def test_a_tenth_is_exact() -> None:
    # 0.1 is no binary fraction: with floats the multiples 3, 6 and 7 would slip by a step.
    clock = Clock(steps_per_epoch=10)
    assert due_steps(SWA(update_interval="0.1ep"), clock, 30) == list(range(1, 31))


def test_shares_of_the_run() -> None:
    clock = Clock(steps_per_epoch=5, max_duration="4ep")
    assert due_steps(SWA(start="0.5dur"), clock, 20) == [15, 20]
    assert due_steps(EMA(start="0.7dur"), Clock(max_duration="10ba"), 10) == [8, 9, 10]
    assert due_steps(SWA(update_interval="0.25dur"), clock, 20) == [5, 10, 15, 20]
    assert due_steps(EMA(end="0.1dur"), clock, 20) == [1, 2]


def test_no_interval_is_never() -> None:
    assert due_steps(EMA(update_interval=None), Clock(), 5) == []


def test_include_initial_takes_the_weights_at_the_start() -> None:
    at_once = EMA(include_initial=True)
    assert Schedule("a", at_once, Clock()).starts_at_once
    assert not Schedule("a", EMA(), Clock()).starts_at_once
    assert due_steps(at_once, Clock(), 3) == [1, 2, 3]

    later = SWA(include_initial=True, start="3ba", update_interval="4ba")
    assert not Schedule("a", later, Clock()).starts_at_once
    assert due_steps(later, Clock(), 12) == [3, 7, 11]  # counted from the start
    by_hand = EMA(include_initial=True, start="2ba", update_interval=None)
    assert due_steps(by_hand, Clock(), 5) == [2]


def test_an_initial_sample_waits_for_a_whole_step_or_epoch() -> None:
    """As Composer's SWA, which looks for its start after a batch, or after an epoch."""
    in_batches = SWA(start="0.7dur", end="0.97dur", update_interval="3ba", include_initial=True)
    clock = Clock(max_duration="95ba")  # from 66.5 to 92.15
    assert due_steps(in_batches, clock, 95) == [67, 70, 73, 76, 79, 82, 85, 88, 91]
    in_epochs = SWA(start="0.7dur", end="0.97dur", update_interval="1ep", include_initial=True)
    for epochs, first, last in ((9, 7, 8), (10, 7, 9)):  # of 9 epochs 0.7 are 6.3
        clock = Clock(steps_per_epoch=4, max_duration=f"{epochs}ep")
        expected = [4 * epoch for epoch in range(first, last + 1)]
        assert due_steps(in_epochs, clock, 4 * epochs) == expected
    mixed = SWA(start="5ba", update_interval="1ep", include_initial=True)
    assert due_steps(mixed, Clock(steps_per_epoch=4), 16) == [8, 12, 16]
    mixed = SWA(start="1.5ep", update_interval="3ba", include_initial=True)
    assert due_steps(mixed, Clock(steps_per_epoch=5), 16) == [8, 11, 14]


def test_an_initial_sample_alone_is_an_update_only_if_it_comes_later() -> None:
    late = SWA(start="9ba", update_interval="5ba", include_initial=True)
    assert due_steps(late, Clock(max_duration="10ba"), 10) == [9]
    at_once = SWA(update_interval="11ba", include_initial=True)
    assert "never update: the first update would come after step 11, the last" in message_of(
        at_once, Clock(max_duration="10ba")
    )


def test_pytorchs_documented_swa_example() -> None:
    """300 epochs, `if epoch > swa_start: update_parameters` with swa_start = 160."""
    expected = [epoch + 1 for epoch in range(300) if epoch > 160]
    rule = SWA(start="161ep")
    assert due_steps(rule, Clock(steps_per_epoch=1), 300) == expected
    assert len(expected) == 139
    assert len(due_steps(rule, Clock(steps_per_epoch=4, max_duration="300ep"), 1200)) == 139


def test_the_practitioners_recipe() -> None:
    """100 epochs, `if epoch > 80`, counted from 0: 19 epochs of averaging."""
    clock = Clock(steps_per_epoch=7, max_duration="100ep")
    expected = [7 * (epoch + 1) for epoch in range(100) if epoch > 80]
    assert due_steps(SWA(start="81ep"), clock, 700) == expected
    assert len(expected) == 19
    every_step = due_steps(SWA(start="81ep", update_interval="1ba"), clock, 700)
    assert len(every_step) == 19 * 7


def test_pytorchs_documented_ema_example() -> None:
    """`ema_model.update_parameters(model)` after every `optimizer.step()`."""
    assert due_steps(EMA(0.9), Clock(), 40) == list(range(1, 41))


@pytest.mark.parametrize(("share", "updates"), [("0.75dur", 25), ("0.8dur", 20)])
def test_the_advice_to_begin_after_75_to_80_percent(share: str, updates: int) -> None:
    clock = Clock(steps_per_epoch=3, max_duration="100ep")
    assert len(due_steps(SWA(start=share), clock, 300)) == updates


def test_one_epoch_is_enough_for_intervals_in_steps() -> None:
    clock = Clock(steps_per_epoch=50, max_duration="1ep")
    rule = SWA(start="0.7dur", update_interval="5ba")
    assert due_steps(rule, clock, 50) == [40, 45, 50]
    assert "never update" in message_of(SWA(start="0.7dur", end="0.9dur"), clock)


def test_a_run_that_is_longer_after_a_resume_begins_its_average_later() -> None:
    position = Position()
    for _ in range(60):
        position = Clock(max_duration="80ba").after_step(position)
    rule = SWA(start="0.75dur", update_interval="10ba")
    assert due_steps(rule, Clock(max_duration="80ba"), 20, position) == [70, 80]
    assert due_steps(rule, Clock(max_duration="120ba"), 60, position) == [100, 110, 120]


@st.composite
def times(draw: st.DrawFn, units: tuple[str, ...] = ("ba", "ep", "dur")) -> str:
    unit = draw(st.sampled_from(units))
    if unit == "ba":
        return f"{draw(st.integers(0, 40))}ba"
    tenths = draw(st.integers(0, 60 if unit == "ep" else 10))
    return f"{tenths / 10}{unit}"


@st.composite
def runs(draw: st.DrawFn) -> tuple[Rule, Clock, int]:
    """A rule, a clock, and the steps of a whole run."""
    steps_per_epoch = draw(st.integers(1, 9))
    duration = draw(times(("ba", "ep")).filter(lambda text: Time.parse(text).value > 0))
    clock = Clock(steps_per_epoch=steps_per_epoch, max_duration=duration)
    rule = EMA(
        0.9,
        start=draw(times()),
        end=draw(st.none() | times()),
        update_interval=draw(times().filter(lambda text: Time.parse(text).value > 0)),
        include_initial=draw(st.booleans()),
    )
    # A run ends with the last step that its duration has room for.
    return rule, clock, clock.in_steps(Time.parse(duration)).__floor__()


def steps_by_definition(rule: Rule, clock: Clock, num_steps: int) -> list[int]:
    """Which steps cross a multiple of the interval, after the start and not after the end.

    All in steps, as fractions; the multiples are listed, not divided out. With an initial sample
    they are counted from the first whole step or epoch from the start on, which is one of them.
    """

    def in_steps(text: str) -> Fraction:
        return clock.in_steps(Time.parse(text))

    start, interval = in_steps(rule.start), in_steps(str(rule.update_interval))
    multiples = [interval * i for i in range(1, int(num_steps / interval) + 1)]
    if rule.include_initial:
        unit = clock.resolve(Time.parse(str(rule.update_interval))).unit
        whole = in_steps(f"1{unit}")
        first = next(whole * i for i in range(10_000) if whole * i >= start)
        multiples = [first] * (first > 0) + [first + multiple for multiple in multiples]
        start = first - 1
    return [
        step
        for step in range(1, num_steps + 1)
        if step - 1 >= start
        and (rule.end is None or step <= in_steps(rule.end))
        and any(step - 1 < multiple <= step for multiple in multiples)
    ]


@given(runs())
@example((EMA(0.9, start="0.5dur"), Clock(max_duration="1ba"), 1))
@example((EMA(0.9, start="10ba"), Clock(max_duration="10ba"), 10))
@example((EMA(0.9, start="9ba"), Clock(max_duration="10ba"), 10))
def test_a_schedule_is_refused_exactly_if_it_never_updates(case: tuple[Rule, Clock, int]) -> None:
    rule, clock, num_steps = case
    expected = steps_by_definition(rule, clock, num_steps)
    if expected:
        assert due_steps(rule, clock, num_steps) == expected
    else:
        assert "never update: the first update would come after step" in message_of(rule, clock)


@given(runs(), st.integers(1, 12))
def test_a_resumed_run_goes_on_from_the_same_epoch(
    case: tuple[Rule, Clock, int], steps_per_epoch: int
) -> None:
    """Half a run with one number of steps per epoch, half with another."""
    first = Clock(steps_per_epoch=case[1].steps_per_epoch)
    second = Clock(steps_per_epoch=steps_per_epoch)
    position = Position()
    for _ in range(case[2]):
        position = first.after_step(position)
    begin, crossed = position, []
    for _ in range(3 * steps_per_epoch):
        before, position = position, second.after_step(position)
        if position.epochs.__floor__() > before.epochs.__floor__():
            crossed.append(position.steps)
    assert due_steps(SWA(), second, 3 * steps_per_epoch, begin) == crossed
    assert len(crossed) == 3
    # Where the epoch was whole, the next one ends after exactly the new number of steps.
    if begin.epochs.denominator == 1:
        assert crossed[0] == begin.steps + steps_per_epoch


def test_two_ranks_resume_on_one() -> None:
    # 5 steps an epoch on two ranks, 10 on one; stopped at epoch 1.4.
    position = Position()
    for _ in range(7):
        position = Clock(steps_per_epoch=5).after_step(position)
    assert position == Position(7, Fraction(7, 5))
    assert due_steps(SWA(), Clock(steps_per_epoch=10), 16, position) == [13, 23]


# -------------------------------------------------------------------------------------- half-life


@pytest.mark.parametrize(
    ("half_life", "interval", "clock", "updates"),
    [
        ("10ba", "1ba", Clock(), 10),
        ("10ba", "4ba", Clock(), 2.5),
        ("2ep", "1ba", Clock(steps_per_epoch=8), 16),
        ("4ba", "1ep", Clock(steps_per_epoch=8), 0.5),
        ("0.5dur", "1ep", Clock(steps_per_epoch=8, max_duration="6ep"), 3),
        ("3ep", "0.5ep", Clock(steps_per_epoch=7), 6),
    ],
)
def test_half_life(half_life: str, interval: str, clock: Clock, updates: float) -> None:
    rule = EMA(half_life=half_life, update_interval=interval)
    resolved = Schedule("a", rule, clock).resolved_rule
    assert resolved == EMA(2 ** (-1 / updates), update_interval=interval)


# ----------------------------------------------------------------------------------------- errors


def test_units_that_the_clock_cannot_resolve() -> None:
    epochs = (
        "average 'a': '3ep' needs the number of optimizer steps in an epoch: pass "
        "clock=Clock(steps_per_epoch=...), for example len(loader)"
    )
    duration = (
        "average 'a': '0.75dur' needs the length of the run: pass clock=Clock(max_duration=...), "
        "for example '10ep' or '20000ba'"
    )
    for option in ("start", "end", "update_interval", "half_life"):
        assert message_of(EMA(**{option: "3ep"}), Clock()) == epochs
        assert message_of(EMA(**{option: "0.75dur"}), Clock(steps_per_epoch=3)) == duration
    assert "'1ep' needs the number" in message_of(SWA(), Clock())


def test_an_interval_of_nothing() -> None:
    assert message_of(EMA(update_interval="0ba"), Clock()) == (
        "average 'a': update_interval='0ba' must be positive"
    )


def test_the_text_of_never() -> None:
    rule = EMA(start="10ba", end="10ba", update_interval="4ba")
    assert message_of(rule, Clock()) == (
        "average 'a': start='10ba', end='10ba' and update_interval='4ba' never update: the first "
        "update would come after step 12, the last possible one after step 10"
    )


def test_a_time_that_is_none_names_the_average() -> None:
    assert message_of(EMA(start="soon"), Clock()).startswith("average 'a': 'soon' is not a time")


def test_by_hand_is_never_refused() -> None:
    schedule = Schedule("a", EMA(update_interval=None, end="0ba"), Clock())
    assert schedule.resolved_rule == EMA(update_interval=None, end="0ba")


@pytest.mark.parametrize("include_initial", [False, True])
@pytest.mark.parametrize("start", ["0ba", "1ba", "9ba", "1.5ep", "2ep", "0.5dur"])
@pytest.mark.parametrize("interval", ["1ba", "1ep"])
def test_started_is_when_a_step_can_give_a_sample(
    interval: str, start: str, *, include_initial: bool
) -> None:
    rule = SWA(start=start, update_interval=interval, include_initial=include_initial)
    clock = Clock(steps_per_epoch=4, max_duration="5ep")
    schedule, position, started = Schedule("a", rule, clock), Position(), []
    for _ in range(20):
        position = clock.after_step(position)
        if schedule.is_started(position):
            started.append(position.steps)
    first = due_steps(rule, clock, 20)[0]
    assert started == list(range(started[0], 21))
    assert started[0] <= first
    if interval == "1ba" or (include_initial and not schedule.starts_at_once):
        assert started[0] == first
    assert schedule.is_started(Position()) == schedule.starts_at_once
