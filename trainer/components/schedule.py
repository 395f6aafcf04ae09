"""Schedules: pure functions from a position in the run to a factor of the base learning rate.

The position is the number of whole epochs done (`per: epoch`) or of steps done (`per: step`), and every duration among
the arguments is in that unit. Warmup multiplies the curve and does not delay it. There is no state, so there is nothing
to save or restore.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, SupportsFloat

from trainer.config.model_sections import ScheduleConfig
from trainer.config.registry import build, resolve
from trainer.errors import ConfigError

# (position → factor, what the run's header calls it).
Curve = tuple[Callable[[int], float], str]
# What an argument must be: in words, and as a test.
Rule = tuple[str, Callable[[Any], bool]]

POSITIVE: Rule = ("a number above 0", lambda value: 0 < value < math.inf)
FRACTION: Rule = ("a number from 0 to 1", lambda value: 0 <= value <= 1)
COUNT: Rule = (
    "a whole number, 0 or more",
    lambda value: isinstance(value, int) and value >= 0,
)
LENGTH: Rule = (
    "a whole number, 1 or more",
    lambda value: isinstance(value, int) and value >= 1,
)


@dataclass(frozen=True)
class Clock:
    """What a curve may know about the run. `history` is the trainer's own list: it grows during the run."""

    total: int  # the run's length in `unit`
    unit: Literal["epoch", "step"]
    history: list[float]  # `best.metric`, one value per evaluation so far
    mode: Literal["min", "max"]  # min: less of it is better


class Schedule:
    """The factor by which each step's learning rate differs from `optimizer.lr`."""

    def __init__(
        self, curve: Curve, section: ScheduleConfig, steps_per_position: int
    ) -> None:
        self._curve, self._phrase = curve
        self._section = section
        self._steps_per_position = steps_per_position
        warmup_steps = section.warmup * steps_per_position
        if math.isinf(warmup_steps):
            raise ConfigError("schedule.warmup", f"{section.warmup} never ends")
        self._warmup_steps = round(warmup_steps)

    def factor(self, step_index: int) -> float:
        """The factor of the step with `step_index` steps before it."""
        try:
            factor = self._curve(step_index // self._steps_per_position)
        except OverflowError:
            raise ConfigError(
                "schedule",
                f"the factor of the learning rate is too large for a number at step {step_index + 1}",
            ) from None
        if step_index + 1 < self._warmup_steps:
            start = self._section.warmup_start
            factor *= start + (1 - start) * (step_index + 1) / self._warmup_steps
        return factor

    def note(self, total_steps: int) -> str:
        """What the header says of a warmup that a run of so many steps does not complete; else an empty string."""
        if self._warmup_steps <= total_steps:
            return ""
        return (
            f"the warmup takes {self._warmup_steps:,} steps and the run {total_steps:,}, so optimizer.lr is never "
            f"reached; lower schedule.warmup, whose unit is that of schedule.per={self._section.per}"
        )

    def describe(self) -> str:
        """One short phrase, such as `step: ×0.1 every 7 epochs, warmup 1 epoch`."""
        if not self._warmup_steps:
            return self._phrase
        start = (
            f" from {_times(self._section.warmup_start)}"
            if self._section.warmup_start
            else ""
        )
        return f"{self._phrase}, warmup {_count(self._section.warmup, self._section.per)}{start}"


def build_schedule(
    section: ScheduleConfig,
    *,
    total_steps: int,
    steps_per_epoch: int,
    history: list[float],
    mode: Literal["min", "max"],
) -> Schedule:
    """The schedule that `section` names. Only `plateau` reads `history`, afresh at each call of `factor`.

    An import path names a function `f(position, total, **arguments) -> factor`, both in the unit `schedule.per`.
    """
    steps_per_position = steps_per_epoch if section.per == "epoch" else 1
    clock = Clock(
        math.ceil(total_steps / steps_per_position), section.per, history, mode
    )
    target = resolve("schedule", section.name, CURVES)
    if target in CURVES.values():
        curve = build("schedule", target, section.args, clock)
    else:
        curve = _imported(section, target, clock.total)
    return Schedule(curve, section, steps_per_position)


def constant(clock: Clock) -> Curve:
    """The base learning rate, all the time."""
    return lambda position: 1.0, "constant"


def step(clock: Clock, *, step_size: int | None = None, gamma: float = 0.1) -> Curve:
    """Multiplied by `gamma` every `step_size`, by default 7 epochs, as torch's StepLR."""
    if step_size is None:
        step_size = _default_step_size(clock)
    _check(LENGTH, step_size=step_size)
    _check(POSITIVE, gamma=gamma)

    def factor(position: int) -> float:
        exponent: int = position // step_size
        return gamma**exponent

    return factor, f"step: {_times(gamma)} every {_count(step_size, clock.unit)}"


def _default_step_size(clock: Clock) -> int:
    if clock.unit == "step":
        # 7 steps would be over before the first epoch.
        raise ConfigError(
            "schedule.step_size",
            "is 7 epochs by default; schedule.per=step needs a number of steps",
        )
    return 7


def multi_step(clock: Clock, *, milestones: list[int], gamma: float = 0.1) -> Curve:
    """Multiplied by `gamma` at each of the `milestones`, as torch's MultiStepLR."""
    if not isinstance(milestones, list) or not milestones:
        raise ConfigError(
            "schedule.milestones", f"{milestones} is not a list such as [30, 60]"
        )
    for milestone in milestones:
        _check(LENGTH, milestones=milestone)
    _check(POSITIVE, gamma=gamma)
    ordered = sorted(milestones)

    def factor(position: int) -> float:
        milestones_passed = bisect_right(ordered, position)
        return gamma**milestones_passed

    return (
        factor,
        f"multi_step: {_times(gamma)} at {clock.unit} {', '.join(map(str, ordered))}",
    )


def cosine(clock: Clock, *, min_factor: float = 0.0) -> Curve:
    """Half a cosine from 1 to `min_factor` over the run (Loshchilov and Hutter, 2017), as torch's."""
    _check(FRACTION, min_factor=min_factor)
    total = clock.total

    def factor(position: int) -> float:
        return _cosine_between(1.0, min_factor, min(position / total, 1.0))

    return factor, f"cosine: to {_times(min_factor)} over {_count(total, clock.unit)}"


def polynomial(clock: Clock, *, power: float = 1.0, min_factor: float = 0.0) -> Curve:
    """From 1 to `min_factor` over the run, as (1 - done / total) ** power; torch's PolynomialLR ends at 0."""
    _check(POSITIVE, power=power)
    _check(FRACTION, min_factor=min_factor)
    total = clock.total

    def factor(position: int) -> float:
        remaining: float = max(0.0, 1 - position / total) ** power
        return min_factor + (1 - min_factor) * remaining

    return (
        factor,
        f"polynomial: power {power:g} to {_times(min_factor)} over {_count(total, clock.unit)}",
    )


def one_cycle(
    clock: Clock,
    *,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    anneal: Literal["cos", "linear"] = "cos",
) -> Curve:
    """Up to the base learning rate and down again (Smith and Topin, 2018), as torch's OneCycleLR.

    The first step has `optimizer.lr` / `div_factor`; the peak, at the share `pct_start` of the run, is `optimizer.lr`;
    the last step has the first step's rate / `final_div_factor`. The momentum is not cycled.
    """
    _check(FRACTION, pct_start=pct_start)
    _check(POSITIVE, div_factor=div_factor, final_div_factor=final_div_factor)
    if anneal not in ("cos", "linear"):
        raise ConfigError("schedule.anneal", f'"{anneal}" is not one of cos, linear')
    between = _cosine_between if anneal == "cos" else _line_between
    first = 1 / div_factor
    last = 1 / (div_factor * final_div_factor)
    end = clock.total - 1
    # A position; it need not be whole, and in a very short run it is below 0.
    peak = pct_start * clock.total - 1

    def factor(position: int) -> float:
        if peak > 0 and position <= peak:
            return between(first, 1.0, position / peak)
        if position < end:
            return between(1.0, last, (position - peak) / (end - peak))
        return last

    duration = _count(clock.total, clock.unit)
    return (
        factor,
        f"one_cycle: {_times(first)} to {_times(1)} to {_times(last)} over {duration}",
    )


def plateau(
    clock: Clock,
    *,
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    cooldown: int = 0,
    min_factor: float = 0.0,
) -> Curve:
    """Multiplied by `factor` after more than `patience` evaluations without a better value.

    For the next `cooldown` evaluations nothing is counted. As torch's ReduceLROnPlateau with a relative threshold, but
    without its smallest change (`eps`).
    """
    if clock.unit == "step":
        raise ConfigError(
            "schedule.per",
            "plateau counts evaluations, not steps; use schedule.per=epoch",
        )
    _check(FRACTION, threshold=threshold, min_factor=min_factor)
    _check(("a number between 0 and 1", lambda value: 0 < value < 1), factor=factor)
    _check(COUNT, patience=patience, cooldown=cooldown)
    rule = _Plateau(clock.mode, factor, patience, threshold, cooldown, min_factor)
    last_history: list[float] = []
    last_factor = 1.0

    def factor_now(position: int) -> float:
        nonlocal last_history, last_factor
        if last_history != clock.history:  # it grew, or a resumed run replaced it
            last_history = list(clock.history)
            last_factor = rule.factor_after(last_history)
        return last_factor

    return (
        factor_now,
        f"plateau: {_times(factor)} after {patience} evaluations without a better one",
    )


@dataclass(frozen=True)
class _Plateau:
    mode: Literal["min", "max"]
    factor: float
    patience: int
    threshold: float
    cooldown: int
    min_factor: float

    def factor_after(self, values: list[float]) -> float:
        """ReduceLROnPlateau's factor after `values`. A NaN is not better than anything."""
        sign = 1 if self.mode == "min" else -1
        factor = 1.0
        best = sign * math.inf
        without_gain = 0  # evaluations since the best one
        cooldown_left = 0
        for value in values:
            if sign * value < sign * best * (1 - sign * self.threshold):
                best = value
                without_gain = 0
            else:
                without_gain += 1
            if cooldown_left:
                cooldown_left -= 1
                without_gain = 0
            if without_gain > self.patience:
                factor = max(factor * self.factor, self.min_factor)
                without_gain = 0
                cooldown_left = self.cooldown
        return factor


CURVES: dict[str, Callable[..., Curve]] = {
    "step": step,
    "multi_step": multi_step,
    "cosine": cosine,
    "one_cycle": one_cycle,
    "polynomial": polynomial,
    "constant": constant,
    "plateau": plateau,
}


def _imported(
    section: ScheduleConfig, function: Callable[..., float], total: int
) -> Curve:
    if isinstance(function, type):
        raise ConfigError(
            "schedule.name",
            f'"{section.name}" is a class; name a function (position, total) → factor',
        )
    # Names a wrong argument before the run starts.
    first = build("schedule", function, section.args, 0, total)
    if not isinstance(first, SupportsFloat):
        raise ConfigError(
            "schedule.name",
            f'"{section.name}" gave {first!r} as a factor, not a number',
        )

    @lru_cache(maxsize=1)  # per epoch, the same position is asked for in every step
    def factor(position: int) -> float:
        return float(function(position, total, **section.args))

    return factor, section.name


def _check(rule: Rule, **arguments: Any) -> None:
    """Raise a `ConfigError` that names the first argument that breaks `rule`."""
    requirement, is_met_by = rule
    for name, value in arguments.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not is_met_by(value):
            raise ConfigError(f"schedule.{name}", f"{value} is not {requirement}")


def _cosine_between(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def _line_between(start: float, end: float, share: float) -> float:
    return start + (end - start) * share


def _times(factor: float) -> str:
    return f"\N{MULTIPLICATION SIGN}{factor:g}"


def _count(number: float, unit: str) -> str:
    return f"{number:g} {unit}" if number == 1 else f"{number:g} {unit}s"
