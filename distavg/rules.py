"""Rules: the number of updates made so far -> the weight of the next one.

Every rule but `Custom` is `average += weight * (live - average)` and differs only in the weight, so
one fused lerp serves them all. A rule is a frozen record: it holds no tensors, and its schedule
(`start`, `end`, `update_interval`, as time strings) is interpreted by `distavg.schedule`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from distavg.errors import ConfigError

__all__ = ["EMA", "SWA", "Custom", "Imported", "PowerEMA", "Rule", "Warmup"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What all rules share: when to update.

    Attributes:
        start: Time done after which the next due step is the first update: `"100ba"` (optimizer
            steps), `"3ep"` (epochs) or `"0.75dur"` (share of the clock's `max_duration`).
        end: Time after which there are no more updates; None for never.
        update_interval: An update is due whenever the time passes a multiple of this; None for
            never: then only `Averager.update()` updates.
        include_initial: Whether the weights at `start` are the first sample, as in EMAOptimizer,
            timm and Composer; those before the training, if it is 0. Intervals count from there.
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
class Warmup:
    """A decay that grows with the updates n: `1 - (1 + (n + offset) / inv_gamma) ** -power`.

    Without arguments `n / (n + 1)`: the plain mean of all samples, until `EMA.decay` is reached.
    `Warmup(inv_gamma=9, offset=1)` is `(1 + n) / (10 + n)`, TensorFlow's, and `Warmup(power=2/3)`
    that of diffusers, timm and ema-pytorch.

    Attributes:
        inv_gamma: The updates after which the decay is `1 - 2^-power`.
        power: How fast the decay approaches 1.
        offset: Updates that count besides those made. A negative one makes as many updates more
            copies.

    >>> Warmup().decay(3), Warmup(inv_gamma=9, offset=1).decay(2)
    (0.75, 0.25)
    """

    inv_gamma: float = 1.0
    power: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        for name, lowest in (("inv_gamma", 0), ("power", 0), ("offset", -math.inf)):
            value = getattr(self, name)
            if not _is_number(value) or not lowest < value < math.inf:
                raise ConfigError(f"Warmup: {name} must be a number above {lowest}, not {value!r}")

    def decay(self, num_updates: int) -> float:
        """The decay of the next update."""
        return 1 - self.weight(num_updates)

    def weight(self, num_updates: int) -> float:
        """`1 - decay`, without its rounding; 1 until the first update that counts."""
        share = (num_updates + self.offset) / self.inv_gamma
        return float((1 + share) ** -self.power) if share > 0 else 1.0


@dataclass(frozen=True)
class EMA(Rule):
    """Exponential moving average: `average = decay * average + (1 - decay) * live`.

    Attributes:
        decay: The share of the old average that an update keeps, in [0, 1]; 0.999 where neither
            this nor `half_life` is given.
        half_life: In place of `decay`: the time in which the weight of a sample halves, so that
            `decay = 2 ** (-update_interval / half_life)`, as in Composer. `"0ba"` copies, and
            under `"inf"` the average stays at its first sample.
        warmup: A smaller decay in the beginning; None for none.
        min_decay: The smallest decay of the warm-up.

    >>> EMA(0.9).weight(0), EMA(0.75).weight(1)
    (1.0, 0.25)
    >>> EMA(1.2)
    Traceback (most recent call last):
    distavg.errors.ConfigError: EMA: decay must be in [0, 1], not 1.2
    """

    kind: ClassVar[str] = "ema"

    decay: float | None = None
    half_life: str | None = dataclasses.field(default=None, kw_only=True)
    warmup: Warmup | None = dataclasses.field(default=None, kw_only=True)
    min_decay: float = dataclasses.field(default=0.0, kw_only=True)

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
        if isinstance(self.warmup, Mapping):  # of a record
            object.__setattr__(self, "warmup", Warmup(**self.warmup))
        if not (self.warmup is None or isinstance(self.warmup, Warmup)):
            raise ConfigError(f"EMA: warmup must be a distavg.Warmup, not {self.warmup!r}")
        for name in ("decay", "min_decay"):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or not 0 <= value <= 1):
                raise ConfigError(f"EMA: {name} must be in [0, 1], not {value!r}")
        highest = 1.0 if self.decay is None else self.decay
        if self.min_decay and (self.warmup is None or self.min_decay > highest):
            raise ConfigError(
                f"EMA: min_decay={self.min_decay} bounds the decay of a warmup from below; here "
                f"warmup is {self.warmup} and decay {self.decay}"
            )

    def weight(self, num_updates: int) -> float:
        """See `Rule.weight`."""
        if self.decay is None:
            raise ConfigError(
                f"EMA: half_life={self.half_life!r} has no weight before an Averager has resolved "
                "it with its clock"
            )
        if num_updates == 0:
            return 1.0
        weight = 1.0 - self.decay
        if self.warmup is not None:
            growing = self.warmup.weight(num_updates)
            bounded = min(growing, 1.0 - self.min_decay) if growing < 1 else 1.0
            weight = max(weight, bounded)
        return weight

    def resolved(self, updates_in: Callable[[str], float]) -> "EMA":
        """See `Rule.resolved`: a half-life becomes a decay."""
        if self.half_life is None:
            return self
        updates = math.inf if self.half_life == "inf" else updates_in(self.half_life)
        decay = 2.0 ** (-1 / updates) if updates else 0.0
        return dataclasses.replace(self, half_life=None, decay=decay)


@dataclass(frozen=True)
class PowerEMA(Rule):
    """Power-function EMA: old samples count by a power of their age in the run (EDM2).

    At time `t` after `start` the sample of time `s` has a share that grows as `s ** gamma`, so that
    the average's width stays the same share of the run: there is no decay to choose. The next
    weight is `1 - (n / (n + 1)) ** (gamma + 1)`, which is exact for any interval: Karras et al.,
    "Analyzing and Improving the Training Dynamics of Diffusion Models", 2023, have
    `beta = (1 - interval / t) ** (gamma + 1)`, where `t` is `(n + 1)` intervals.

    Attributes:
        sigma_rel: The standard deviation of the samples' times as a share of the run, in
            (0, 1/sqrt(12)]; 0.05 and 0.10 are usual, the largest is the plain mean.

    >>> round(PowerEMA(0.05).gamma, 2), round(PowerEMA(0.10).gamma, 2)
    (16.97, 6.94)
    """

    kind: ClassVar[str] = "power"

    sigma_rel: float

    def __post_init__(self) -> None:
        if not _is_number(self.sigma_rel) or not 0 < self.sigma_rel <= 12**-0.5:
            raise ConfigError(
                f"PowerEMA: sigma_rel must be in (0, 1/sqrt(12)], not {self.sigma_rel!r}"
            )

    @functools.cached_property
    def gamma(self) -> float:
        """The power, of which `sigma_rel ** 2` is `(gamma + 1) / ((gamma + 2)**2 (gamma + 3))`."""
        low, high = 0.0, 1 / self.sigma_rel
        while low < (middle := (low + high) / 2) < high:
            width = (middle + 1) / ((middle + 2) ** 2 * (middle + 3))
            low, high = (middle, high) if width > self.sigma_rel**2 else (low, middle)
        return high

    def weight(self, num_updates: int) -> float:
        """See `Rule.weight`."""
        if num_updates == 0:
            return 1.0
        return -math.expm1(-(self.gamma + 1) * math.log1p(1 / num_updates))


@dataclass(frozen=True)
class Custom(Rule):
    """A rule in one of the two forms of PyTorch's `AveragedModel`; the first update copies.

    The functions see this rank's pieces of the tensors, in the average's dtype, so they must be
    elementwise. They run under `no_grad`. A checkpoint records their names only.

    Attributes:
        avg_fn: `avg_fn(averaged, live, num_updates) -> new average`, called for each piece.
        multi_avg_fn: `multi_avg_fn(averaged, live, num_updates)`, which changes the tensors of
            its first list in place. `num_updates` is an int.
    """

    kind: ClassVar[str] = "custom"

    avg_fn: Callable[[Any, Any, int], Any] | None = None
    multi_avg_fn: Callable[[Any, Any, int], object] | None = None

    def __post_init__(self) -> None:
        given = [fn for fn in (self.avg_fn, self.multi_avg_fn) if fn is not None]
        if len(given) != 1 or not callable(given[0]):
            raise ConfigError(
                f"Custom: give one function, avg_fn or multi_avg_fn, not {self.avg_fn!r} and "
                f"{self.multi_avg_fn!r}"
            )

    def weight(self, num_updates: int) -> float:
        """1 for the first update, which copies; NaN afterwards, where only the function knows."""
        return 1.0 if num_updates == 0 else math.nan

    def apply(self, averaged: list[Any], live: list[Any], num_updates: int) -> None:
        """Update tensors in place, by whichever function there is."""
        if self.multi_avg_fn is not None:
            self.multi_avg_fn(averaged, live, num_updates)
        elif self.avg_fn is not None:
            for old, new in zip(averaged, live, strict=True):
                old.copy_(self.avg_fn(old, new, num_updates))

    def record(self) -> dict[str, Any]:
        """See `Rule.record`; the functions are recorded by name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("avg_fn", "multi_avg_fn"):
            fn = fields[name]
            fields[name] = None if fn is None else getattr(fn, "__qualname__", type(fn).__name__)
        return {"kind": self.kind, **fields}


@dataclass(frozen=True)
class Imported(Rule):
    """In place of a rule in a checkpoint that another system's file was converted to.

    Whatever rule an Averager has goes on with such an average.

    Attributes:
        source: Which system's average it was.
        unknown: What of the clock the file did not say: `"steps"`, `"epochs"`.
    """

    kind: ClassVar[str] = "imported"

    source: str
    unknown: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """See `Rule.record`."""
        return {"kind": self.kind, "source": self.source, "unknown": list(self.unknown)}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def rule_from_record(record: Mapping[str, Any]) -> Rule:
    """Rebuild a rule from a manifest: the inverse of `Rule.record`.

    Raises:
        ConfigError: An unknown kind or field, or a value that the rule refuses.
    """
    kinds: dict[Any, type[Rule]] = {cls.kind: cls for cls in (SWA, EMA, PowerEMA)}
    if record.get("kind") == Custom.kind:
        raise ConfigError(
            f"a custom rule's functions are not in the file, only their names: {dict(record)}"
        )
    if record.get("kind") == Imported.kind:
        raise ConfigError(f"{record.get('source')} came without its rule: give one")
    fields = {key: value for key, value in record.items() if key != "kind"}
    try:
        return kinds[record.get("kind")](**fields)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"not a rule of this release: {dict(record)}") from error
