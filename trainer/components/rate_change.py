"""What a resume does to the learning rate: a run of another length, or with another schedule, bends or jumps."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from trainer.components.schedule import Schedule, build_schedule
from trainer.config.fields import read_section
from trainer.config.model_sections import ScheduleConfig
from trainer.config.schema import Config
from trainer.errors import LockstepError
from trainer.exact.plan import Plan

# The keys that a rate depends on, besides the section `schedule` and the base rate.
LENGTH_KEYS = ("epochs", "max_steps")


def describe_rate_change(
    before: Mapping[str, Any],
    now: Config,
    schedule: Schedule,
    *,
    plan: Plan,
    history: list[float],
    steps_done: int,
) -> str:
    """One line on how the rate goes on after `steps_done` steps; "" if it goes on as it would have.

    `before` is the config in the checkpoint, `schedule` the one of the resumed run, whose config is `now`.
    """
    if not 0 < steps_done < plan.total_steps:
        return ""
    earlier = None
    # A config of another version, or with a reference to the environment: not worth a failure.
    with suppress(LockstepError, KeyError, TypeError, ValueError):
        earlier = _earlier_schedule(before, now, plan, history)
    if earlier is None:
        return ""
    old_schedule, old_lr, old_total = earlier
    lr = now.optimizer.lr
    # The step before the resume is compared too: the next one may lie beyond the earlier run's end.
    compared = [step for step in (steps_done - 1, steps_done) if step < old_total]
    is_same = all(
        old_schedule.factor(step) * old_lr == schedule.factor(step) * lr
        for step in compared
    )
    if is_same:
        return ""
    last_rate = old_schedule.factor(min(steps_done, old_total) - 1) * old_lr
    next_rate = schedule.factor(steps_done) * lr
    return (
        f"the learning rate goes from {last_rate:.3g} to {next_rate:.3g} at step {steps_done + 1}"
        f"{_reason(before, now)}"
    )


def _earlier_schedule(
    before: Mapping[str, Any], now: Config, plan: Plan, history: list[float]
) -> tuple[Schedule, float, int]:
    """The schedule of the checkpoint's config, its base rate and its length in steps."""
    train = before["train"]
    total_steps = int(train["epochs"]) * plan.steps_per_epoch
    if train.get("max_steps") is not None:
        total_steps = min(total_steps, int(train["max_steps"]))
    mode = before.get("best", {}).get("mode") or now.best.mode or "min"
    schedule = build_schedule(
        read_section(ScheduleConfig, before["schedule"]),
        total_steps=total_steps,
        steps_per_epoch=plan.steps_per_epoch,
        history=history,
        mode=mode,
    )
    return schedule, float(before["optimizer"]["lr"]), total_steps


def _reason(before: Mapping[str, Any], now: Config) -> str:
    """The changed keys in brackets: ` (train.epochs was 10 and is 20)`."""
    changes = []
    for name in LENGTH_KEYS:
        old = before["train"].get(name)
        new = getattr(now.train, name)
        if old != new:
            changes.append(f"train.{name} was {_null(old)} and is {_null(new)}")
    if before["schedule"] != now.schedule.to_dict():
        changes.append("schedule is another")
    if before["optimizer"]["lr"] != now.optimizer.lr:
        changes.append("optimizer.lr is another")
    return f" ({', '.join(changes)})" if changes else ""


def _null(value: Any) -> Any:
    return "null" if value is None else value
