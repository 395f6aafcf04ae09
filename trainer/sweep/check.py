"""What would make trials fail one by one, found before the first: a wrong key, value, component argument or metric."""

from __future__ import annotations

import math
from contextlib import nullcontext, suppress
from pathlib import Path

from trainer.config.fields import show
from trainer.config.load import load
from trainer.config.schema import Config
from trainer.core.metrics import TIMINGS
from trainer.errors import ConfigError, DataError, nearest
from trainer.sweep.description import Sweep
from trainer.sweep.space import Values

ROW_VALUES = ("lr", "grad_norm", *TIMINGS)
OWN = ("run.dir", "run.name", "run.resume")  # which the sweep sets
STEPS_PER_EPOCH = 1000  # of a schedule that is built to see whether it takes its arguments


def check(sweep: Sweep, overrides: list[str]) -> Config:
    """Raise a `ConfigError` for what no trial, or not every trial, could take; returns the trials' common config.

    Each parameter is tried at its every choice, or at its ends, with the others at their first.
    """
    if not Path(sweep.program).is_file():
        raise ConfigError("program", f"there is no {sweep.program} here; start where it is ({sweep.file})")
    for parameter in sweep.parameters:
        if parameter.name in OWN:
            raise ConfigError(
                f"parameters.{parameter.name}", f"every trial has its own, given by the sweep ({sweep.file})"
            )
    path, shared = sweep.base()
    base = load(path, [*shared, *overrides])
    first = {parameter.name: parameter.extremes()[0] for parameter in sweep.parameters}
    tried: list[Values] = [first]
    for parameter in sweep.parameters:
        tried += [{**first, parameter.name: value} for value in parameter.extremes()[1:]]
    swept = {parameter.name.partition(".")[0] for parameter in sweep.parameters}
    for values in tried:
        written = [f"{name}={show(value)}" for name, value in values.items()]
        try:
            config = load(path, [*shared, *overrides, *written])
            _try_components(config, swept)
        except ConfigError as error:
            message = error.message.removesuffix(" (the command line)")
            raise ConfigError(error.key, f"{message} ({sweep.file}, a trial with {' '.join(written)})") from None
    _check_metric(sweep, config)
    return base


def _try_components(config: Config, swept: set[str]) -> None:
    """Build what is cheap to build of the sections that the sweep changes."""
    from torch import nn

    if "optimizer" in swept:
        from trainer.components.optimizer import build_optimizer

        build_optimizer(config.optimizer, nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)))
    if "schedule" in swept:
        from trainer.components.schedule import build_schedule

        build_schedule(
            config.schedule,
            total_steps=config.train.epochs * STEPS_PER_EPOCH,
            steps_per_epoch=STEPS_PER_EPOCH,
            history=[],
            mode=config.best.mode,
        )
    if "loss" in swept:
        _metrics(config)
    if "model" in swept:
        from trainer.components.models import build_model

        build_model(config.model, seed=0, num_classes=config.model.num_classes or 10, in_channels=3)
    if "data" in swept:
        from trainer.data.datasets import build_datasets

        with suppress(DataError):  # its files may lie on the trials' machine alone
            build_datasets(config.data, nullcontext)


def _metrics(config: Config) -> list[str]:
    from trainer.components.task import build_task

    return ["loss", *build_task(config.loss, config.model.num_classes).metrics]


def _check_metric(sweep: Sweep, config: Config) -> None:
    names = _metrics(config)
    known = [f"{phase}{name}" for phase in ("val/", "train/", "train/epoch_") for name in names]
    known.append(f"best/{config.best.metric}")
    if sweep.metric not in [*known, *ROW_VALUES]:
        raise ConfigError(
            "metric.name",
            f'"{sweep.metric}" is not logged{nearest(sweep.metric, known)}; a run logs {", ".join(known)} '
            f"({sweep.file})",
        )
    least = sweep.hyperband.least if sweep.hyperband else 0
    evaluations = math.ceil(config.train.epochs / config.train.evaluate_every)
    if sweep.metric.startswith("val/") and least > evaluations:
        raise ConfigError(
            "early_terminate.min_iter",
            f"a trial logs {sweep.metric} {evaluations} times, never the {least} times before it may be stopped "
            f"({sweep.file})",
        )
