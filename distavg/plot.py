"""How much each past step counts in an average, in numbers and in a picture."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from distavg.errors import ConfigError, UnsupportedError
from distavg.rules import EMA, PowerEMA, Rule, rule_from_record
from distavg.schedule import Clock, Position, Schedule, Time

__all__ = ["draw", "rule_from_text", "shares"]

# What may stand without its name, and what is a number.
_FIRST = {EMA.kind: "decay", PowerEMA.kind: "sigma_rel"}
_NUMBERS = {"decay", "sigma_rel"}


def rule_from_text(text: str) -> Rule:
    """Read a rule such as `"ema:half_life=1000ba"`, `"power:0.05"` or `"swa:start=0.75dur"`.

    Raises:
        ConfigError: It is none.
    """
    kind, _, rest = text.partition(":")
    record: dict[str, object] = {"kind": kind}
    for setting in filter(None, rest.split(",")):
        name, has_name, value = setting.partition("=")
        if not has_name:
            name, value = _FIRST.get(kind, name), name
        try:
            record[name] = float(value) if name in _NUMBERS else value
        except ValueError:
            raise ConfigError(f"{text!r}: {name}={value} is not a number") from None
    return rule_from_record(record)


def shares(rule: Rule, clock: Clock) -> list[tuple[int, float]]:
    """The steps after which an average takes samples, with each one's share at the run's end.

    The shares add up to 1.

    Args:
        rule: Any rule that has weights.
        clock: With a `max_duration`, and what else the rule's times need.
    """
    if clock.max_duration is None:
        raise ConfigError("how much each step counts depends on Clock(max_duration=)")
    schedule = Schedule("a", rule, clock)
    samples = [0] if schedule.starts_at_once else []
    position = Position()
    for _ in range(math.floor(clock.in_steps(Time.parse(clock.max_duration)))):
        after = clock.after_step(position)
        if schedule.due(position, after):
            samples.append(after.steps)
        position = after
    found: list[float] = []
    rest = 1.0
    for number in reversed(range(len(samples))):
        weight = schedule.resolved_rule.weight(number)
        found.append(rest * weight)
        rest *= 1 - weight
    return list(zip(samples, reversed(found), strict=True))


def draw(rules: Sequence[str], clock: Clock, path: Path) -> None:
    """Draw the shares of rules, given as text, over a run.

    A sample's share is spread over the steps since the one before, so that the area under each
    curve is 1 whatever the interval.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    curves = {text: shares(rule_from_text(text), clock) for text in rules}
    try:
        from matplotlib.figure import Figure  # slow to import, and not for training
    except ImportError as error:
        raise UnsupportedError("plot needs matplotlib: pip install 'distavg[plot]'") from error
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="share of a step in the average")
    for text, samples in curves.items():
        steps = [step for step, _ in samples]
        gaps = [after - before for before, after in itertools.pairwise(steps)]
        gaps = [gaps[0] if gaps else 1, *gaps]
        heights = [share / gap for (_, share), gap in zip(samples, gaps, strict=True)]
        edges = [steps[0] - gaps[0], *steps]
        axes.stairs(heights, edges, label=text, linewidth=1.5)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
