"""Config → `Run`: everything that training, evaluation and inspection share.

The `Trainer` builds what only training needs: an optimizer and a reduction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from trainer.components.freezing import Freezing
from trainer.components.metrics import Metrics, NamedMetric
from trainer.components.task import Task, collate_of, loss_arguments
from trainer.config.schema import BestConfig, Config
from trainer.core.build_data import count_classes, run_data, with_notes
from trainer.core.build_evaluation import run_evaluation_sets
from trainer.core.build_loaders import (
    Loaders,
    check_first_batches,
    run_loaders,
)
from trainer.core.build_model import (
    check_can_be_sharded,
    is_sharded,
    run_model,
    run_task,
)
from trainer.core.early_stop import with_early_stop_metric
from trainer.core.evaluated_weights import logged_phases
from trainer.core.evaluation_metrics import EvaluationMetrics
from trainer.core.first_samples import check_classes, first_inputs
from trainer.core.forward import Forward
from trainer.core.further import LossState
from trainer.core.logged_metrics import LoggedMetrics
from trainer.core.mix import Mix, build_mix
from trainer.core.precision import Precision
from trainer.core.preflight import check_data, check_order, check_ranks
from trainer.core.run import Run
from trainer.core.run_metrics import run_metrics
from trainer.data.bad_samples import Quarantine
from trainer.data.classes import with_classes
from trainer.data.datasets import Datasets, MapDataset
from trainer.data.evaluation_loaders import loader_as_files
from trainer.data.loading import Loader
from trainer.data.samplers import build_order
from trainer.data.short_side import with_short_side
from trainer.errors import listed
from trainer.exact.plan import Plan
from trainer.exact.sharding import shard
from trainer.exact.shards import original_class
from trainer.process.device import check_reproducibility
from trainer.process.ranks import Ranks
from trainer.storage.signature import Signature, signature_of_samples


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

    build_data = partial(run_data, config, ranks, train_data, val_data, test_data)
    data = ranks.on_each(build_data)
    if classes is not None:
        data = with_classes(data, classes)
    data = with_notes(config, data)
    check_data(data, ranks)
    plan = _plan(config, ranks, data)
    loaders = run_loaders(config, ranks, data, plan, precision.dtype)
    inputs = ranks.on_each(partial(first_inputs, loaders.train, loaders.evaluated))
    device_note = check_first_batches(ranks, loaders)
    num_classes = count_classes(config, data)
    signature = _signature(config, data, loaders, num_classes)

    build_module = partial(
        run_model,
        config,
        ranks,
        dtype=precision.dtype,
        model=model,
        inputs=inputs,
        num_classes=num_classes,
        classes=data.classes,
    )
    # A machine may lack the file of the weights.
    module, weights_note = ranks.on_each(build_module)
    the_task = run_task(config, task, num_classes, module)
    the_task.to(ranks.device, precision.dtype)
    sharding_note = _share_out(config, ranks, module, the_task)
    check_classes(the_task, num_classes, data)
    build_metrics = partial(
        run_metrics, config, metrics, the_task, loaders.measured, num_classes
    )
    # A machine may lack what a metric needs.
    config, named_metrics = ranks.on_each(build_metrics)
    config = _with_watched_metrics(config, data, the_task, named_metrics)

    mix = ranks.on_each(partial(_mix, config, the_task, loaders.train, plan))
    forward = Forward(the_task, precision, ranks.device, config.run.seed, mix)
    freezing = Freezing(module, config.model)
    quarantine = _quarantine(config, ranks)
    evaluation_metrics = EvaluationMetrics(
        named_metrics,
        the_task,
        ranks,
        classes=data.classes or (),
        seed=config.run.seed,
        precision=precision.dtype,
        best_metric=config.best.metric,
    )
    sets = run_evaluation_sets(
        config,
        ranks,
        data,
        loaders,
        module=module,
        forward=forward,
        freezing=freezing,
        quarantine=quarantine,
        metrics=evaluation_metrics,
    )
    return Run(
        config=config,
        ranks=ranks,
        facts_of_ranks=facts_of_ranks,
        precision=precision,
        data=data,
        plan=plan,
        train_loader=loaders.train,
        device_note=device_note,
        signature=signature,
        module=module,
        weights_note=weights_note,
        sharding_note=sharding_note,
        task=the_task,
        loss_state=LossState(module, the_task),
        forward=forward,
        freezing=freezing,
        metrics=evaluation_metrics,
        validation=[sets[phase] for phase in data.validation()],
        test=sets.get("test"),
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


def _plan(config: Config, ranks: Ranks, data: Datasets) -> Plan:
    # A machine may lack a file that a sampler reads.
    order = ranks.on_each(lambda: build_order(config.data, data, seed=config.run.seed))
    plan = Plan(
        samples=len(data.train) if order is None else order.samples,
        batch_size=config.batch.size,
        micro_size=config.batch.micro_size or config.batch.size,
        ranks=ranks.count,
        epochs=config.train.epochs,
        seed=config.run.seed,
        max_steps=config.train.max_steps,
        equal_ranks=config.batch_norm.mode == "sync",
        order=order,
    )
    check_order(plan, ranks, epoch=0)
    return plan


def _mix(config: Config, task: Task, loader: Loader, plan: Plan) -> Mix | None:
    if not config.train.mix:
        return None
    return build_mix(
        config.train,
        task,
        loader.peek([loader.first_id]),
        seed=config.run.seed,
        total_steps=plan.total_steps,
    )


def _signature(
    config: Config, data: Datasets, loaders: Loaders, num_classes: int | None
) -> Signature:
    loader = loader_as_files(config.data, loaders.evaluated) or loaders.train
    return signature_of_samples(loader, num_classes=num_classes, classes=data.classes)


def _share_out(config: Config, ranks: Ranks, module: nn.Module, task: Task) -> str:
    """Let each rank hold a part of the parameters, with `train.parallel=fsdp`. A collective.

    Returns a line on what no longer sees the model's parameters, "" if there is nothing.
    """
    if config.train.parallel == "fsdp":
        ranks.on_each(partial(check_can_be_sharded, module, task))
    if not is_sharded(config, ranks):
        return ""
    held = shard(module, ranks)
    if not held:
        return ""
    return (
        f"train.parallel=fsdp has put parts in the place of parameters that code outside the model still holds "
        f"({listed(held, 3)}): what is computed with those has no effect on training; read them from the model"
    )


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


def _quarantine(config: Config, ranks: Ranks) -> Quarantine | None:
    if config.data.bad_samples != "quarantine":
        return None
    return Quarantine(ranks, config.data.max_bad)
