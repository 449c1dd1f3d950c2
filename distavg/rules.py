"""Rules: the number of updates made so far -> the weight of the next one.

Every rule is `average += weight * (live - average)` and differs only in the weight, so one fused
lerp serves them all. A rule is a frozen record: it holds no tensors, and its schedule (`start`,
`end`, `update_interval`, as time strings) is interpreted by `distavg.schedule`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from distavg.errors import ConfigError

__all__ = ["EMA", "SWA", "Rule"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What all rules share: when to update.

    Attributes:
        start: Time done after which the next due step is the first update: `"100ba"` (optimizer
            steps), `"3ep"` (epochs) or `"0.75dur"` (share of the clock's `max_duration`).
        end: Time after which there are no more updates; None for never.
        update_interval: An update is due whenever the time passes a multiple of this; None for
            never: then only `Averager.update()` updates.
        include_initial: Whether the weights at `start` count as the first sample, as in
            EMAOptimizer and timm. PyTorch and Composer do not count them.
    """

    kind: ClassVar[str]

    start: str = "0ba"
    end: str | None = None
    update_interval: str | None = "1ba"
    include_initial: bool = False

    def weight(self, num_updates: int) -> float:
        """The weight of the live weights in the next update, after `num_updates` updates.

        The first update copies: `weight(0) == 1`.
        """
        raise NotImplementedError

    def resolved(self, updates_in: Callable[[str], float]) -> "Rule":
        """This rule with every time in its formula turned into a number.

        Args:
            updates_in: The number of update intervals in a time string (may be infinite).
        """
        return self

    def record(self) -> dict[str, Any]:
        """The rule as plain data for a manifest: the inverse of `rule_from_record`."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class SWA(Rule):
    """Stochastic weight averaging: the plain mean of the weights at every update.

    `weight(n) = 1 / (n + 1)` (Izmailov et al., 2018).

    >>> [SWA().weight(n) for n in range(4)]
    [1.0, 0.5, 0.3333333333333333, 0.25]
    """

    kind: ClassVar[str] = "swa"

    update_interval: str | None = "1ep"

    def weight(self, num_updates: int) -> float:
        """See `Rule.weight`."""
        return 1 / (num_updates + 1)


@dataclass(frozen=True)
class EMA(Rule):
    """Exponential moving average: `average = decay * average + (1 - decay) * live`.

    Attributes:
        decay: The share of the old average that an update keeps, in [0, 1]; 0.999 where neither
            this nor `half_life` is given.
        half_life: In place of `decay`: the time in which the weight of a sample halves, so that
            `decay = 2 ** (-update_interval / half_life)`, as in Composer. `"0ba"` copies.

    >>> EMA(0.9).weight(0), EMA(0.75).weight(1)
    (1.0, 0.25)
    >>> EMA(1.2)
    Traceback (most recent call last):
    distavg.errors.ConfigError: EMA: decay must be in [0, 1], not 1.2
    """

    kind: ClassVar[str] = "ema"

    decay: float | None = None
    half_life: str | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.half_life is None and self.decay is None:
            object.__setattr__(self, "decay", 0.999)
        elif self.half_life is not None and self.decay is not None:
            raise ConfigError(
                f"EMA: decay={self.decay} and half_life={self.half_life!r} are two ways to say "
                "one thing: give one of them"
            )
        if self.half_life is not None and self.update_interval is None:
            raise ConfigError(
                f"EMA: half_life={self.half_life!r} needs an update_interval to be turned into "
                "a decay; for updates by hand give decay"
            )
        decay = self.decay
        if decay is not None and (
            not isinstance(decay, (int, float)) or not 0 <= decay <= 1  # NaN fails this, too
        ):
            raise ConfigError(f"EMA: decay must be in [0, 1], not {decay!r}")

    def weight(self, num_updates: int) -> float:
        """See `Rule.weight`."""
        if self.decay is None:
            raise ConfigError(
                f"EMA: half_life={self.half_life!r} has no weight before an Averager has resolved "
                "it with its clock"
            )
        return 1.0 if num_updates == 0 else 1.0 - self.decay

    def resolved(self, updates_in: Callable[[str], float]) -> "EMA":
        """See `Rule.resolved`: a half-life becomes a decay."""
        if self.half_life is None:
            return self
        updates = updates_in(self.half_life)
        decay = 2.0 ** (-1 / updates) if updates else 0.0
        return dataclasses.replace(self, half_life=None, decay=decay)


def rule_from_record(record: Mapping[str, Any]) -> Rule:
    """Rebuild a rule from a manifest: the inverse of `Rule.record`.

    Raises:
        ConfigError: An unknown kind or field, or a value that the rule refuses.
    """
    kinds: dict[Any, type[Rule]] = {cls.kind: cls for cls in (SWA, EMA)}
    fields = {key: value for key, value in record.items() if key != "kind"}
    try:
        return kinds[record.get("kind")](**fields)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"not a rule of this release: {dict(record)}") from error
