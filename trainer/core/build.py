"""Config → `Run`: everything that training, evaluation and inspection share.

The `Trainer` builds what only training needs: an optimizer and a reduction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from trainer.components.freezing import Freezing
from trainer.components.metrics import Metrics, NamedMetric
from trainer.components.task import Task, collate_of, loss_arguments
from trainer.config.run_sections import BestConfig
from trainer.config.schema import Config
from trainer.core.build_data import run_data
from trainer.core.build_evaluation import run_evaluation_sets
from trainer.core.build_input import RunInput, build_input
from trainer.core.build_model import ModelAndTask, build_model_and_task
from trainer.core.early_stop import with_early_stop_metric
from trainer.core.evaluated_weights import logged_phases
from trainer.core.evaluation_metrics import EvaluationMetrics
from trainer.core.first_samples import channels_note
from trainer.core.forward import Forward
from trainer.core.further import LossState
from trainer.core.logged_metrics import LoggedMetrics
from trainer.core.mix import Mix, build_mix
from trainer.core.precision import Precision
from trainer.core.preflight import RankFacts, check_ranks
from trainer.core.run import Run
from trainer.core.run_metrics import run_metrics
from trainer.data.bad_samples import Quarantine
from trainer.data.datasets import Datasets, MapDataset
from trainer.data.short_side import with_short_side
from trainer.exact.shards import original_class
from trainer.process.device import check_reproducibility
from trainer.process.ranks import Ranks
from trainer.process.working_directory import WorkingDirectory


def build_run(
    config: Config,
    *,
    model: nn.Module | None = None,
    train_data: MapDataset | None = None,
    val_data: MapDataset | Mapping[str, MapDataset] | None = None,
    test_data: MapDataset | None = None,
    task: Task | nn.Module | None = None,
    metrics: Metrics = (),
    classes: Sequence[str] | None = None,
) -> Run:
    """Build what `config` describes; a model, data or a task that is passed replaces the config's.

    `val_data` is one set, or a dict of sets by name.

    `metrics`, a list of torchmetrics' objects or a mapping of names to them, come after those of the config.

    With `classes`, those that a model was trained on, the data's class ids become the model's, matched by name.
    A collective: every rank of a run calls it with the same config. Raises `ConfigError` or `DataError`.
    """
    config = _with_names(config, model=model, data=train_data, loss=task)
    config = with_short_side(_with_collate(config, task))
    ranks = Ranks(config.train.precision, config.run.timeout)
    check_reproducibility(ranks.device.type, config.run.reproducibility)
    facts_of_ranks = check_ranks(config, ranks)
    precision = Precision(config.train.precision, ranks.device)
    dtype = precision.dtype

    build_data = partial(run_data, config, ranks, train_data, val_data, test_data)
    run_input = build_input(config, ranks, build_data, classes=classes, dtype=dtype)
    trained = build_model_and_task(config, ranks, run_input, model, task, dtype=dtype)
    # The last change of the config: which metrics there are, the task and the data have to tell.
    config, named_metrics = _with_metrics(
        config, ranks, metrics, run_input, trained.task
    )
    return _assemble(
        config,
        ranks,
        run_input,
        trained,
        named_metrics,
        facts_of_ranks=facts_of_ranks,
        precision=precision,
    )


def _assemble(
    config: Config,
    ranks: Ranks,
    run_input: RunInput,
    trained: ModelAndTask,
    named_metrics: Sequence[NamedMetric],
    *,
    facts_of_ranks: list[RankFacts],
    precision: Precision,
) -> Run:
    """The run of a config that is complete: with its forward, and what evaluates. A collective."""
    quarantine = _quarantine(config, ranks)
    metrics = _evaluation_metrics(
        config, ranks, run_input, trained.task, named_metrics, dtype=precision.dtype
    )
    mix = ranks.on_each(partial(_mix, config, trained.task, run_input))
    forward = Forward(trained.task, precision, ranks.device, config.run.seed, mix)
    freezing = Freezing(trained.module, config.model)
    sets = run_evaluation_sets(
        config,
        ranks,
        run_input.data,
        run_input.loaders,
        module=trained.module,
        forward=forward,
        freezing=freezing,
        quarantine=quarantine,
        metrics=metrics,
    )
    return Run(
        config=config,
        ranks=ranks,
        facts_of_ranks=facts_of_ranks,
        precision=precision,
        data=run_input.data,
        plan=run_input.plan,
        train_loader=run_input.loaders.train,
        device_note=run_input.device_note,
        signature=run_input.signature,
        module=trained.module,
        weights_note=trained.weights_note,
        dtypes_note=trained.dtypes_note,
        inputs_note=channels_note(run_input.first),
        sharding_note=trained.sharding_note,
        task=trained.task,
        loss_state=LossState(trained.module, trained.task),
        forward=forward,
        freezing=freezing,
        metrics=metrics,
        validation=[sets[phase] for phase in run_input.data.validation()],
        test=sets.get("test"),
        working_directory=WorkingDirectory(
            [config.run.dir, config.data.root, config.data.cache_dir]
        ),
        quarantine=quarantine,
    )


# ---------------------------------------------------------------- the stages


def _with_names(config: Config, **objects: object) -> Config:
    """The config with the name of each object that was passed in its section, so that `config.yaml` says what ran."""
    for section, value in objects.items():
        if value is None:
            continue
        kind: type = type(value)
        if isinstance(value, nn.Module):
            kind = original_class(value)
        changes: dict[str, Any] = {"name": f"{kind.__module__}.{kind.__qualname__}"}
        if isinstance(value, nn.modules.loss._Loss):
            # So that `evaluate` makes the same loss again.
            changes["args"] = loss_arguments(value)
        before = getattr(config, section)
        config = replace(config, **{section: replace(before, **changes)})
    return config


def _with_collate(config: Config, task: Task | nn.Module | None) -> Config:
    """The config with the `data.collate` that its loss needs, where it does not say itself."""
    collate = collate_of(config.loss if task is None else task)
    if config.data.collate is not None or collate is None:
        return config
    return replace(config, data=replace(config.data, collate=collate))


def _mix(config: Config, task: Task, run_input: RunInput) -> Mix | None:
    if not config.train.mix:
        return None
    loader = run_input.loaders.train
    return build_mix(
        config.train,
        task,
        loader.peek([loader.first_id]),
        seed=config.run.seed,
        total_steps=run_input.plan.total_steps,
    )


def _with_metrics(
    config: Config, ranks: Ranks, metrics: Metrics, run_input: RunInput, task: Task
) -> tuple[Config, list[NamedMetric]]:
    """The metrics of whole evaluations, and the config with them and with those that the run watches."""
    build = partial(
        run_metrics,
        config,
        metrics,
        task,
        run_input.loaders.measured,
        run_input.num_classes,
    )
    # A machine may lack what a metric needs.
    config, named = ranks.on_each(build)
    return _with_watched_metrics(config, run_input.data, task, named), named


def _with_watched_metrics(
    config: Config, data: Datasets, task: Task, metrics: Sequence[NamedMetric]
) -> Config:
    """The config with the metrics by which the best model is chosen and a run ends early, and their modes."""
    evaluated = logged_phases(config.ema, list(data.validation()))
    logged = LoggedMetrics(task, metrics, evaluated)
    best = config.best
    if best.metric == BestConfig().metric:
        best = replace(best, metric=logged.default)
    logged.check("best.metric", best.metric)
    if best.mode is None:
        best = replace(best, mode=logged.direction("best.mode", best.metric))
    return with_early_stop_metric(replace(config, best=best), logged)


def _evaluation_metrics(
    config: Config,
    ranks: Ranks,
    run_input: RunInput,
    task: Task,
    named: Sequence[NamedMetric],
    *,
    dtype: torch.dtype,
) -> EvaluationMetrics:
    return EvaluationMetrics(
        named,
        task,
        ranks,
        classes=run_input.data.classes or (),
        seed=config.run.seed,
        precision=dtype,
        best_metric=config.best.metric,
    )


def _quarantine(config: Config, ranks: Ranks) -> Quarantine | None:
    if config.data.bad_samples != "quarantine":
        return None
    return Quarantine(ranks, config.data.max_bad)
