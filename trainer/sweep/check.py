"""Finds what would make trials fail one by one, before the first: a wrong key, value, component argument or metric."""

from __future__ import annotations

import math
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from trainer.components.task import build_task
from trainer.config.load import load
from trainer.config.run_sections import BestConfig
from trainer.config.schema import Config
from trainer.core.evaluated_weights import logged_phases
from trainer.core.logged_metrics import LoggedMetrics, epoch_column
from trainer.core.mean_iou import NAME as MEAN_IOU
from trainer.core.metrics import TIMINGS
from trainer.errors import ConfigError, DataError, nearest
from trainer.sweep.description import Sweep, format_overrides
from trainer.sweep.goal import named_metrics, with_goal
from trainer.sweep.space import Values

ROW_VALUES = ("lr", "grad_norm", *TIMINGS)
# Which the sweep sets for each trial.
SWEEP_KEYS = ("run.dir", "run.name", "run.resume")
# Any number: a schedule is built only to see whether it takes its arguments.
STEPS_PER_EPOCH = 1000


def check(sweep: Sweep, overrides: list[str]) -> Config:
    """Raise a `ConfigError` for what not every trial could take; returns the config that the trials share.

    Each parameter is tried at all its choices, or at its ends, with the others at their first value. All
    combinations could be thousands.
    """
    if not Path(sweep.program).is_file():
        raise ConfigError(
            "program",
            f"there is no {sweep.program} here; start where it is ({sweep.file})",
        )
    for parameter in sweep.parameters:
        if parameter.name in SWEEP_KEYS:
            raise ConfigError(
                f"parameters.{parameter.name}",
                f"every trial has its own, set by the sweep ({sweep.file})",
            )
    path, shared = sweep.base()
    # Without any trial's values: the overrides that all share must be right by themselves.
    base = load(path, [*shared, *overrides])
    config = base
    for values in _list_samples(sweep):
        arguments = format_overrides(values)
        try:
            config = load(path, [*shared, *overrides, *arguments])
            _try_components(config, {name.partition(".")[0] for name in values})
        except ConfigError as error:
            # The trial's values come from the sweep's file, not from the command line that starts it.
            message = error.message.removesuffix(" (the command line)")
            raise ConfigError(
                error.key,
                f"{message} ({sweep.file}, a trial with {' '.join(arguments)})",
            ) from None
    _check_metric(sweep, config)
    with_goal(sweep, config)  # refuses a metric of unknown direction
    return base


def _list_samples(sweep: Sweep) -> list[Values]:
    """The first value of every parameter, then each other value of one parameter beside the first of the others."""
    first = {
        parameter.name: parameter.list_extremes()[0] for parameter in sweep.parameters
    }
    samples = [first]
    for parameter in sweep.parameters:
        for value in parameter.list_extremes()[1:]:
            samples.append({**first, parameter.name: value})
    return samples


def _try_components(config: Config, sections: set[str]) -> None:
    """Build what is cheap to build of the sections that the sweep changes."""
    from torch import nn

    if "optimizer" in sections:
        from trainer.components.optimizer import build_optimizer

        # The patterns are of the real model's names.
        groups = [{**group, "match": ""} for group in config.optimizer.groups]
        # With BatchNorm, because settings such as weight decay may split its parameters off.
        build_optimizer(
            replace(config.optimizer, groups=groups),
            nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)),
        )
    if "schedule" in sections:
        from trainer.components.schedule import build_schedule

        build_schedule(
            config.schedule,
            total_steps=config.train.epochs * STEPS_PER_EPOCH,
            steps_per_epoch=STEPS_PER_EPOCH,
            history=[],
            mode=config.best.mode or "min",
        )
    if "loss" in sections:
        build_task(config.loss, config.model.num_classes)
    if "model" in sections:
        from trainer.components.models import build_model

        build_model(
            config.model,
            seed=0,
            num_classes=config.model.num_classes or 10,
            in_channels=3,
        )
    if "data" in sections:
        from trainer.data.datasets import build_datasets

        with suppress(DataError):  # the files may be on the trials' machine alone
            build_datasets(config.data, nullcontext)


def _check_metric(sweep: Sweep, config: Config) -> None:
    """Refuse a metric that no run logs, and early stopping at a rung that no run reaches."""
    task = build_task(config.loss, config.model.num_classes)
    validation = [f"val/{name}" for name in config.data.val] or ["val"]
    evaluated = logged_phases(config.ema, validation)
    tested = ["test"] if config.data.test is not None else []
    metrics = LoggedMetrics(task, named_metrics(config), [*evaluated, *tested])
    best = config.best.metric
    if best == BestConfig().metric:
        best = metrics.default
    # Means of an epoch have names of their own.
    of_training = [name for name in metrics.names if name.startswith("train/")]
    of_epochs = [epoch_column(name) for name in of_training]
    logged = [*metrics.names, *of_epochs, f"best/{best}"]
    # Whether targets are masks, only the data tell.
    unasked = [f"{phase}/{MEAN_IOU}" for phase in [*evaluated, *tested]]
    is_known = metrics.may_have(sweep.metric) or sweep.metric in unasked
    if not is_known and sweep.metric not in [*logged, *ROW_VALUES]:
        suggestion = nearest(sweep.metric, logged)
        names = ", ".join(logged)
        raise ConfigError(
            "metric.name",
            f'"{sweep.metric}" is not logged{suggestion}; a run logs {names} ({sweep.file})',
        )
    is_by_epochs = config.train.evaluate_every_steps is None
    phases = tuple(f"{phase}/" for phase in evaluated)
    is_of_evaluations = sweep.metric.startswith(phases) and is_by_epochs
    if sweep.hyperband is None or not is_of_evaluations:
        return
    evaluations = math.ceil(config.train.epochs / config.train.evaluate_every)
    if sweep.hyperband.min_iter > evaluations:
        raise ConfigError(
            "early_terminate.min_iter",
            f"a trial logs {sweep.metric} {evaluations} times, never the {sweep.hyperband.min_iter} times before it "
            f"may be stopped ({sweep.file})",
        )
