"""Whether a sweep's metric is to be minimised or maximised, where its file does not say."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from trainer.components.directions import Direction, direction_of
from trainer.components.metrics import (
    MetricFacts,
    NamedMetric,
    build_metrics,
    direction_among,
)
from trainer.components.task import build_task
from trainer.config.schema import Config
from trainer.errors import ConfigError
from trainer.sweep.description import Sweep

GOALS: dict[Direction, Literal["minimize", "maximize"]] = {
    "min": "minimize",
    "max": "maximize",
}


def with_goal(sweep: Sweep, config: Config) -> Sweep:
    """The sweep with a goal: its file's, else the one that its metric is known to have; `config` is a trial's.

    Raises `ConfigError` if nobody knows whether less or more of the metric is better.
    """
    if sweep.goal is not None:
        return sweep
    task = build_task(config.loss, config.model.num_classes)
    named = named_metrics(config)
    direction = direction_among(named, sweep.metric) or direction_of(sweep.metric, task)
    if sweep.metric in (config.best.metric, f"best/{config.best.metric}"):
        direction = config.best.mode or direction
    if direction is None:
        raise ConfigError(
            "metric.goal",
            f"is needed for {sweep.metric}: write minimize or maximize ({sweep.file})",
        )
    return replace(sweep, goal=GOALS[direction])


def named_metrics(config: Config) -> list[NamedMetric]:
    """The config's `metrics`, as far as they are known without data."""
    if not config.metrics:
        return []
    # Of two classes, if the config does not say: the data that would tell is not read here.
    classes = config.model.num_classes or 2
    facts = MetricFacts("class", classes, num_labels=classes, ignore_index=None)
    return build_metrics(config.metrics, facts)


def goal_note(sweep: Sweep) -> str:
    """What to say of a goal that the file leaves out and W&B's server would take for another; "" if nothing."""
    if sweep.is_goal_given or sweep.goal != "maximize":
        return ""
    return (
        f"{sweep.file} has no metric.goal: {sweep.metric} is maximized, as it is known; W&B's server would minimize "
        f"it, so write goal: maximize"
    )
