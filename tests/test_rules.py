"""Rules: closed forms of the weights, and records that come back as the same rule."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distavg.errors import ConfigError
from distavg.rules import EMA, SWA, Custom, PowerEMA, Rule, Warmup, rule_from_record


def shares(rule: Rule, num_updates: int) -> list[float]:
    """What each sample contributes to the average after this many updates."""
    found: list[float] = []
    for n in range(num_updates):
        weight = rule.weight(n)
        found = [share * (1 - weight) for share in found] + [weight]
    return found


@pytest.mark.parametrize(
    "rule",
    [
        SWA(),
        EMA(),
        EMA(0.0),
        EMA(1.0),
        EMA(0.3),
        EMA(0.9, warmup=Warmup(offset=5), min_decay=0.5),
        PowerEMA(0.05),
        Custom(avg_fn=lambda averaged, live, n: live),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_the_first_update_copies(rule: Rule) -> None:
    assert rule.weight(0) == 1


@given(st.integers(1, 60))
def test_swa_is_the_mean(n: int) -> None:
    # n roundings of 2**-53 each.
    assert shares(SWA(), n) == pytest.approx([1 / n] * n, rel=n * 2**-52)


@given(st.integers(0, 10**9))
def test_swa_weight_is_correctly_rounded(n: int) -> None:
    assert SWA().weight(n) == float(Fraction(1, n + 1))


@given(st.floats(0, 1), st.integers(1, 30))
def test_ema_shares_decay(decay: float, n: int) -> None:
    expected = [decay ** (n - 1), *((1 - decay) * decay ** (n - 1 - i) for i in range(1, n))]
    # The weight 1 - decay is rounded, by up to 2**-53, and so is 1 - weight.
    assert shares(EMA(decay), n) == pytest.approx(expected, rel=1e-12, abs=n * 2**-52)


def test_ema_keeps_0_999_where_nothing_is_given() -> None:
    assert EMA().decay == 0.999
    assert EMA().weight(7) == 1 - 0.999


def test_the_decays_at_the_edges() -> None:
    assert [EMA(0).weight(n) for n in range(3)] == [1, 1, 1]  # always the live weights
    assert [EMA(1).weight(n) for n in range(3)] == [1, 0, 0]  # for ever the first sample


@pytest.mark.parametrize("decay", [1.2, -0.1, math.nan, math.inf, -math.inf, math.nextafter(1, 2)])
def test_decay_outside_0_to_1(decay: float) -> None:
    with pytest.raises(ConfigError) as caught:
        EMA(decay)
    assert str(caught.value) == f"EMA: decay must be in [0, 1], not {decay}"


def test_decay_and_half_life_are_one_too_many() -> None:
    with pytest.raises(ConfigError) as caught:
        EMA(0.9, half_life="10ba")
    assert str(caught.value) == (
        "EMA: decay=0.9 and half_life='10ba' are two ways to say one thing: give one of them"
    )


def test_half_life_needs_an_interval() -> None:
    with pytest.raises(ConfigError) as caught:
        EMA(half_life="10ba", update_interval=None)
    assert str(caught.value) == (
        "EMA: half_life='10ba' needs an update_interval to be turned into a decay; for updates by "
        "hand give decay"
    )
    assert EMA(0.9, update_interval=None).weight(1) == 1 - 0.9


def test_half_life_has_no_weight_before_it_is_resolved() -> None:
    with pytest.raises(ConfigError, match="half_life='10ba' has no weight before an Averager"):
        EMA(half_life="10ba").weight(0)


@pytest.mark.parametrize("updates", [1.0, 2.0, 10.0, 0.5, 1000.0])
def test_after_a_half_life_a_share_has_halved(updates: float) -> None:
    rule = EMA(half_life="10ba").resolved(lambda text: updates)
    assert rule.decay == 2 ** (-1 / updates)
    assert rule.decay**updates == pytest.approx(0.5, rel=1e-12)  # `updates` roundings
    assert rule.half_life is None


def test_a_half_life_of_nothing_copies() -> None:
    assert EMA(half_life="0ba").resolved(lambda text: 0.0).decay == 0
    assert EMA(half_life="0ba").resolved(lambda text: 0.0).weight(5) == 1


def test_resolving_asks_for_the_half_life_and_changes_nothing_else() -> None:
    asked = []
    rule = EMA(half_life="3ep", start="5ba", end="1dur", update_interval="2ba")
    resolved = rule.resolved(lambda text: asked.append(text) or 4.0)  # type: ignore[func-returns-value]
    assert asked == ["3ep"]
    assert resolved == dataclasses.replace(rule, half_life=None, decay=2**-0.25)
    assert EMA(0.9).resolved(lambda text: pytest.fail(text)) == EMA(0.9)
    assert SWA().resolved(lambda text: pytest.fail(text)) == SWA()


def test_under_an_infinite_half_life_nothing_moves() -> None:
    rule = EMA(half_life="inf").resolved(lambda text: pytest.fail(text))
    assert rule.decay == 1
    assert [rule.weight(n) for n in range(3)] == [1, 0, 0]


# ---------------------------------------------------------------------------------- warm-ups


@given(st.integers(1, 10**6))
def test_a_warmup_without_arguments_is_the_mean(n: int) -> None:
    assert EMA(1.0, warmup=Warmup()).weight(n) == pytest.approx(SWA().weight(n), rel=1e-15)


@given(st.integers(1, 10**6))
def test_the_warmup_of_tensorflow(n: int) -> None:
    rule = EMA(0.9999, warmup=Warmup(inv_gamma=9, offset=1))
    assert 1 - rule.weight(n) == pytest.approx(min(0.9999, (1 + n) / (10 + n)), abs=1e-15)


@given(st.integers(1, 10**6), st.floats(0.1, 100), st.floats(0.1, 2), st.floats(0, 0.5))
def test_the_warmup_of_diffusers(n: int, inv_gamma: float, power: float, lowest: float) -> None:
    rule = EMA(0.99, warmup=Warmup(inv_gamma, power), min_decay=lowest)
    expected = max(lowest, min(0.99, 1 - (1 + n / inv_gamma) ** -power))
    assert 1 - rule.weight(n) == pytest.approx(expected, abs=1e-15)


def test_a_warmup_ends_where_the_decay_is_reached() -> None:
    rule = EMA(0.75, warmup=Warmup())
    assert [rule.weight(n) for n in range(6)] == [1, 1 / 2, 1 / 3, 1 / 4, 1 / 4, 1 / 4]
    halved = EMA(half_life="2ba", warmup=Warmup()).resolved(lambda text: 2.0)
    assert [halved.weight(n) for n in (1, 2, 50)] == [1 / 2, 1 / 3, 1 - 2**-0.5]


def test_a_warmup_that_begins_later_copies_until_then() -> None:
    rule = EMA(0.9, warmup=Warmup(offset=-2), min_decay=0.6)
    expected = [1, 1, 1, 0.4, 1 / 3, 1 / 4]  # the third copies too, as the first of a mean
    assert [rule.weight(n) for n in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Warmup(inv_gamma=0), "Warmup: inv_gamma must be a number above 0, not 0"),
        (lambda: Warmup(power=-1), "Warmup: power must be a number above 0, not -1"),
        (lambda: Warmup(offset=-math.inf), "Warmup: offset must be a number above -inf, not -inf"),
        (lambda: Warmup(offset="1"), "Warmup: offset must be a number above -inf, not '1'"),
        (lambda: Warmup(inv_gamma=math.nan), "inv_gamma must be a number above 0, not nan"),
        (lambda: Warmup(power=math.inf), "power must be a number above 0, not inf"),
        (lambda: EMA(warmup="mean"), "EMA: warmup must be a distavg.Warmup, not 'mean'"),
        (lambda: EMA(min_decay=2, warmup=Warmup()), "EMA: min_decay must be in [0, 1], not 2"),
        (lambda: EMA(min_decay=0.5), "min_decay=0.5 bounds the decay of a warmup from below; here"),
        (lambda: EMA(0.1, warmup=Warmup(), min_decay=0.5), "min_decay=0.5 bounds the decay of"),
        (lambda: PowerEMA(0), "PowerEMA: sigma_rel must be in (0, 1/sqrt(12)], not 0"),
        (lambda: PowerEMA(0.3), "PowerEMA: sigma_rel must be in (0, 1/sqrt(12)], not 0.3"),
        (lambda: PowerEMA(math.nan), "PowerEMA: sigma_rel must be in"),
        (lambda: Custom(), "Custom: give one function, avg_fn or multi_avg_fn, not None and None"),
        (lambda: Custom(max, min), "Custom: give one function, avg_fn or multi_avg_fn"),
        (lambda: Custom(0.9), "Custom: give one function, avg_fn or multi_avg_fn, not 0.9"),
    ],
)
def test_what_is_no_rule(build: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build()
    assert text in str(caught.value)


# ---------------------------------------------------------------------------------- PowerEMA


@pytest.mark.parametrize("sigma", [0.05, 0.10, 0.25])
def test_gamma_is_the_root_that_numpy_finds(sigma: float) -> None:
    """Of the polynomial in the code of EDM2."""
    roots = np.roots([1, 7, 16 - sigma**-2, 12 - sigma**-2])
    assert PowerEMA(sigma).gamma == pytest.approx(roots.real.max(), rel=1e-9)


@pytest.mark.parametrize("sigma", [0.05, 0.10])
@pytest.mark.parametrize("interval", [1, 100])
def test_a_width_comes_out_at_any_interval(sigma: float, interval: int) -> None:
    """The standard deviation of the steps, each taken with its share, over the steps of the run."""
    steps = 20_000
    rule = PowerEMA(sigma)
    at = np.arange(interval, steps + 1, interval, dtype=float)
    weights = np.array([rule.weight(n) for n in range(len(at))])
    shares = weights * np.append(np.cumprod((1 - weights)[:0:-1])[::-1], 1.0)
    assert shares.sum() == pytest.approx(1, rel=1e-9)
    mean = (shares * at).sum()
    width = ((shares * (at - mean) ** 2).sum()) ** 0.5 / steps
    assert width == pytest.approx(sigma, rel=0.01)


@given(st.integers(1, 10**6), st.sampled_from([1, 7, 100]))
def test_the_weight_is_that_of_the_published_formula(n: int, interval: int) -> None:
    rule, t = PowerEMA(0.1), (n + 1) * interval
    assert 1 - rule.weight(n) == pytest.approx((1 - interval / t) ** (rule.gamma + 1), rel=1e-12)


def test_the_widest_is_the_mean() -> None:
    rule = PowerEMA(12**-0.5)
    assert [rule.weight(n) for n in range(50)] == pytest.approx(
        [1 / (n + 1) for n in range(50)], rel=1e-6
    )


# ---------------------------------------------------------------------------------- records


def test_defaults() -> None:
    assert SWA().update_interval == "1ep"
    assert EMA().update_interval == "1ba"
    for rule in (SWA(), EMA()):
        assert (rule.start, rule.end, rule.include_initial) == ("0ba", None, False)


def test_rules_are_frozen_and_compare_by_value() -> None:
    assert EMA(0.9) == EMA(0.9)
    assert EMA(0.9) != EMA(0.8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        EMA(0.9).decay = 0.5  # type: ignore[misc]


def test_the_base_rule_has_no_weight() -> None:
    with pytest.raises(NotImplementedError):
        Rule().weight(0)


TIMES = st.sampled_from(["0ba", "100ba", "3ep", "0.75dur"])
SCHEDULES = {
    "start": TIMES,
    "end": st.none() | TIMES,
    "update_interval": TIMES,
    "include_initial": st.booleans(),
}
RULES: st.SearchStrategy[Rule] = st.one_of(
    st.builds(SWA, **SCHEDULES),
    st.builds(EMA, st.floats(0, 1), **SCHEDULES),
    st.builds(EMA, half_life=TIMES | st.just("inf"), **SCHEDULES),
    st.builds(
        EMA,
        st.just(0.5),
        warmup=st.builds(Warmup, st.floats(0.1, 9), st.floats(0.1, 9), st.floats(0, 9)),
        min_decay=st.floats(0, 0.5),
        **SCHEDULES,
    ),
    st.builds(PowerEMA, st.floats(0.001, 0.28), **SCHEDULES),
)


@given(RULES)
def test_a_rule_comes_back_from_its_record_as_json(rule: Rule) -> None:
    assert rule_from_record(json.loads(json.dumps(rule.record()))) == rule


def test_a_record_is_plain_and_named_by_kind() -> None:
    assert EMA(0.9).record() == {
        "kind": "ema",
        "decay": 0.9,
        "half_life": None,
        "warmup": None,
        "min_decay": 0.0,
        "start": "0ba",
        "end": None,
        "update_interval": "1ba",
        "include_initial": False,
    }


def test_of_custom_functions_the_names_are_recorded() -> None:
    record = Custom(multi_avg_fn=shares, update_interval="5ba").record()
    assert (record["kind"], record["avg_fn"], record["multi_avg_fn"]) == ("custom", None, "shares")
    assert record["update_interval"] == "5ba"
    with pytest.raises(ConfigError, match="a custom rule's functions are not in the file"):
        rule_from_record(record)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({}, "not a rule of this release: {}"),
        ({"kind": "lawa"}, "not a rule of this release: {'kind': 'lawa'}"),
        ({"kind": []}, "not a rule of this release"),
        ({"kind": "swa", "decay": 0.9}, "not a rule of this release"),
        ({"kind": "ema", "decay": "much"}, "decay must be in [0, 1], not 'much'"),
        ({"kind": "ema", "decay": 2}, "decay must be in"),
        ({"kind": "ema", "warmup": {"speed": 1}}, "not a rule of this release"),
        ({"kind": "ema", "warmup": {"power": "2"}}, "Warmup: power must be a number"),
        ({"kind": "ema", "warmup": [1]}, "EMA: warmup must be a distavg.Warmup, not [1]"),
    ],
)
def test_what_is_no_record(record: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rule_from_record(record)
    assert text in str(caught.value)
