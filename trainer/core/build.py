"""Config → `Run`: everything that training, evaluation and inspection share.

The `Trainer` builds what only training needs: an optimizer and a reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from trainer.components.freezing import Freezing
from trainer.components.lazy import give_lazy_layers_sizes
from trainer.components.metrics import (
    Metrics,
)
from trainer.components.models import build_model, compile_model, input_channels
from trainer.components.task import (
    Task,
    as_task,
    collate_of,
    has_plain_predict,
    loss_arguments,
)
from trainer.components.weights import start_from_weights, weights_file
from trainer.config.schema import BestConfig, Config
from trainer.core.early_stop import with_early_stop_metric
from trainer.core.evaluated_weights import logged_phases
from trainer.core.evaluation import EvaluationSet, Evaluator, OnBatch
from trainer.core.evaluation_metrics import EvaluationMetrics
from trainer.core.features import Features
from trainer.core.first_samples import check_classes, first_inputs
from trainer.core.forward import Forward
from trainer.core.further import LossState, restore_evaluated
from trainer.core.logged_metrics import LoggedMetrics
from trainer.core.metrics import Row
from trainer.core.mix import Mix, build_mix
from trainer.core.precision import Precision
from trainer.core.preflight import RankFacts, check_data, check_order, check_ranks
from trainer.core.run_metrics import run_metrics
from trainer.data.bad_samples import Quarantine
from trainer.data.classes import with_classes
from trainer.data.datasets import Datasets, MapDataset, build_datasets
from trainer.data.evaluation_loaders import evaluation_loaders, loader_as_files
from trainer.data.evaluation_sets import (
    passed_sets,
    refuse_sets_of_config,
    with_columns,
    with_evaluation_sets,
)
from trainer.data.loading import Loader, build_loaders
from trainer.data.parts import check_part, shared_class_names
from trainer.data.rows import as_pairs
from trainer.data.sampler import DrawnOrder
from trainer.data.samplers import build_order
from trainer.data.split import with_split
from trainer.errors import ConfigError
from trainer.exact.batch_norm import configure, refuse_cumulative_average
from trainer.exact.determinism import run_settings
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.plan import Plan, Step
from trainer.exact.remaining import remaining_step
from trainer.exact.seeding import key, preserved_cpu_generators, seed_cpu
from trainer.process.device import check_reproducibility
from trainer.process.ranks import Ranks
from trainer.storage import checkpoint
from trainer.storage.run_directory import run_path
from trainer.storage.signature import (
    Signature,
    describe_other_classes,
    signature_of_samples,
)


@dataclass
class Run:
    """The parts of a run on this process, each built from its own section of the config.

    `module` is the model itself, without DDP, on its device and in the run's dtype. `weights_note` says in one line
    which weights it started from. `facts_of_ranks` has what each rank runs on, in rank order.
    """

    config: Config
    ranks: Ranks
    facts_of_ranks: list[RankFacts]
    precision: Precision
    data: Datasets
    plan: Plan
    train_loader: Loader
    signature: Signature
    module: nn.Module
    weights_note: str
    task: Task
    loss_state: LossState
    forward: Forward
    freezing: Freezing
    metrics: EvaluationMetrics
    validation: list[EvaluationSet]
    test: EvaluationSet | None
    quarantine: Quarantine | None = None  # with data.bad_samples=quarantine
    stop_reason: str = ""  # why the run is to end before its last step

    @property
    def evaluator(self) -> Evaluator | None:
        """That of the first validation set."""
        return self.validation[0].evaluator if self.validation else None

    @property
    def val_loader(self) -> Loader | None:
        """That of the first validation set."""
        return self.validation[0].loader if self.validation else None

    @property
    def evaluation_sets(self) -> list[EvaluationSet]:
        """The validation sets, then the test set."""
        return [*self.validation, *([] if self.test is None else [self.test])]

    @property
    def bitwise(self) -> bool:
        return self.config.run.reproducibility == "bitwise"

    def remaining(self, step: Step) -> Step:
        """A step of the plan without the samples that are known to be bad: as it was, or will be, trained."""
        if self.quarantine is None:
            return step
        bad = self.quarantine.ids("train", step.number)
        return remaining_step(self.plan, step, bad)

    def settings(self) -> AbstractContextManager[None]:
        """A context with the process-wide settings that the run needs; it restores those before at the end."""
        return settings_of(self.config)

    def stop(self, reason: str) -> None:
        """Ask for the run's end: after the next logged row, with a checkpoint, an evaluation and a summary.

        Rank 0's request counts, whatever the other ranks ask for, so all of them end after the same step.
        """
        if not isinstance(reason, str) or not reason:
            raise ConfigError(
                "observers", f"run.stop({reason!r}): give the reason, as text"
            )
        self.stop_reason = self.stop_reason or reason

    def evaluate(self, watch: Callable[[str], OnBatch | None] | None = None) -> Row:
        """The loss and metrics over all validation samples. A collective.

        Of named sets, each under its name, as in `clean/loss`. `watch` gives, for a set's phase, what is called with
        the ids, the output and the targets of each of this rank's batches. Raises `ConfigError` where there are no
        validation samples.
        """
        if not self.validation:
            raise ConfigError("data.name", f"{self.data.name} has no validation data")
        row: Row = {}
        for item in self.validation:
            on_batch = None if watch is None else watch(item.phase)
            means = item.evaluator.evaluate(on_batch)
            row |= {f"{item.prefix}{name}": value for name, value in means.items()}
        return row

    def load_best(self, directory: Path | None = None) -> Row:
        """Load the best weights of the run in `directory` (this one's) on every rank; returns their row. A collective.

        Only the main process reads them: no other machine needs to see the run's directory.
        """
        row: Row
        row, further = self.ranks.on_main(
            lambda: self._read_best(directory or run_path(self.config.run))
        )
        self.ranks.broadcast_parameters(self.module)
        restore_evaluated(further, self.module, self.loss_state)
        if directory is not None:
            self.forget_features()
        return row

    def _read_best(self, directory: Path) -> tuple[Row, dict[str, Any]]:
        tensors, row = checkpoint.load_best(directory)
        checkpoint.restore_model(self.module, tensors)
        return row, checkpoint.load_best_further(directory)

    def forget_features(self) -> None:
        """Discard cached features: the weights have changed by something other than a training step."""
        for item in self.evaluation_sets:
            item.evaluator.forget()

    def end_evaluations(self) -> None:
        """End the loader processes of all evaluations; another evaluation starts them again."""
        for item in self.evaluation_sets:
            item.evaluator.close()


def settings_of(config: Config) -> AbstractContextManager[None]:
    """A context with the process-wide settings of a run with `config`; it restores those before at the end."""
    return run_settings(
        bitwise=config.run.reproducibility == "bitwise", compiled=config.train.compile
    )


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
    config = _with_collate(config, task)
    ranks = Ranks(config.train.precision, config.run.timeout)
    check_reproducibility(ranks.device.type, config.run.reproducibility)
    facts_of_ranks = check_ranks(config, ranks)
    precision = Precision(config.train.precision, ranks.device)

    data = ranks.on_each(lambda: _data(config, ranks, train_data, val_data, test_data))
    if classes is not None:
        data = with_classes(data, classes)
    if data.val is None and config.data.val_transforms:
        note = "data.val_transforms has no effect: there are no validation data"
        data = replace(data, note="; ".join(filter(None, [data.note, note])))
    check_data(data, ranks)
    # A machine may lack a file that a sampler reads.
    order = ranks.on_each(lambda: build_order(config.data, data, seed=config.run.seed))
    plan = _plan(config, ranks, len(data.train), order)
    check_order(plan, ranks, epoch=0)
    place: dict[str, Any] = {
        "seed": config.run.seed,
        "device": ranks.device,
        "dtype": precision.dtype,
    }
    train_loader, val_loader = build_loaders(config.data, data, **place)
    loaders = evaluation_loaders(config.data, data, val_loader, **place)

    if order is not None:
        # Sample 0 may be one that it leaves out, because it is damaged.
        train_loader.first_id = int(plan.permutation(0)[0])
    inputs = ranks.on_each(partial(first_inputs, train_loader, loaders))
    num_classes = _num_classes(config, data)
    signature = signature_of_samples(
        loader_as_files(config.data, loaders) or train_loader,
        num_classes=num_classes,
        classes=data.classes,
    )
    build_module = partial(
        _module,
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
    the_task = _task(config, task, num_classes, module)
    the_task.to(ranks.device, precision.dtype)
    check_classes(the_task, num_classes, data)
    # A machine may lack what a metric needs.
    config, named_metrics = ranks.on_each(
        partial(
            run_metrics,
            config,
            metrics,
            the_task,
            val_loader or loaders.get("test"),
            num_classes,
        )
    )
    evaluated = logged_phases(config.ema, list(data.validation()))
    logged = LoggedMetrics(the_task, named_metrics, evaluated)
    config = with_early_stop_metric(_with_best_metric(config, logged), logged)

    mix = ranks.on_each(partial(_mix, config, the_task, train_loader, plan))
    forward = Forward(the_task, precision, ranks.device, config.run.seed, mix)
    freezing = Freezing(module, config.model)
    quarantine = None
    if config.data.bad_samples == "quarantine":
        quarantine = Quarantine(ranks, config.data.max_bad)
    evaluation_metrics = EvaluationMetrics(
        named_metrics,
        the_task,
        ranks,
        classes=data.classes or (),
        seed=config.run.seed,
        precision=precision.dtype,
        best_metric=config.best.metric,
    )
    sets = {}
    for phase, dataset in data.evaluated().items():
        evaluator = _evaluator(
            config,
            ranks,
            dataset=dataset,
            loader=loaders[phase],
            module=module,
            forward=forward,
            freezing=freezing,
            quarantine=quarantine,
            metrics=evaluation_metrics,
        )
        sets[phase] = EvaluationSet(phase, dataset, loaders[phase], evaluator)
    return Run(
        config=config,
        ranks=ranks,
        facts_of_ranks=facts_of_ranks,
        precision=precision,
        data=data,
        plan=plan,
        train_loader=train_loader,
        signature=signature,
        module=module,
        weights_note=weights_note,
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
        kind = type(value)
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


def _data(
    config: Config,
    ranks: Ranks,
    train: MapDataset | None,
    val: MapDataset | Mapping[str, MapDataset] | None,
    test: MapDataset | None,
) -> Datasets:
    if train is None:
        for key, given in (("val_data", val), ("test_data", test)):
            if given is not None:
                raise ConfigError(
                    key,
                    "is given without train_data, and would replace half of the data that the config names; give both",
                )
        data = build_datasets(config.data, ranks.main_first)
        data = with_split(config.data, data)
        return with_evaluation_sets(config.data, data, ranks.main_first)
    refuse_sets_of_config(config.data)
    if config.data.cache:
        raise ConfigError(
            "data.cache",
            "keeps the images of data.name=folder, not of a train_data that is passed; leave it out",
        )
    check_part(type(train).__name__, "training", train, key="train_data")
    if val is not None and config.data.val_fraction is not None:
        raise ConfigError(
            "data.val_fraction",
            "takes validation samples out of train_data, and val_data is given; leave one out",
        )
    train = as_pairs(train, config.data.columns)
    data = Datasets(train, None, shared_class_names(train, None), config.data.name)
    data = with_columns(passed_sets(data, val, test), config.data.columns)
    return with_split(config.data, data)


def _plan(config: Config, ranks: Ranks, samples: int, order: DrawnOrder | None) -> Plan:
    return Plan(
        samples=samples if order is None else order.samples,
        batch_size=config.batch.size,
        micro_size=config.batch.micro_size or config.batch.size,
        ranks=ranks.count,
        epochs=config.train.epochs,
        seed=config.run.seed,
        max_steps=config.train.max_steps,
        equal_ranks=config.batch_norm.mode == "sync",
        order=order,
    )


def _num_classes(config: Config, data: Datasets) -> int | None:
    """The number of the model's outputs: the config's, else that of the data's classes, else None."""
    outputs = config.model.num_classes
    classes = len(data.classes or [])
    if (
        outputs is not None
        and outputs < classes
        and config.loss.name == "cross_entropy"
    ):
        raise ConfigError(
            "model.num_classes",
            f"{outputs} is less than the {classes} classes of {data.name}",
        )
    return outputs or classes or None


def _module(
    config: Config,
    ranks: Ranks,
    *,
    dtype: torch.dtype,
    model: nn.Module | None,
    inputs: Any,
    num_classes: int | None,
    classes: list[str] | None,
) -> tuple[nn.Module, str]:
    """The model with its initial weights, on its device and in its dtype; and a note on the weights."""
    weights = weights_file(config.model, ranks.main_first)
    if model is None:
        model = build_model(
            config.model,
            seed=config.run.seed,
            num_classes=num_classes,
            in_channels=input_channels(inputs),
        )
    give_lazy_layers_sizes(model, inputs, config.run.seed)
    weights_note = start_from_weights(
        weights, model, config.model, num_classes, config.run.seed
    )
    if weights is not None:
        weights_note += describe_other_classes(weights, classes)
    model = configure(model, config.batch_norm, ranks=ranks.count, device=ranks.device)
    model.to(ranks.device, dtype)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.train.compile:
        compile_model(model, bitwise=config.run.reproducibility == "bitwise")
    return model, weights_note


def _task(
    config: Config,
    task: Task | nn.Module | None,
    num_classes: int | None,
    module: nn.Module,
) -> Task:
    """The loss and its metrics. Weights of its own are a function of `run.seed`, or those that it comes with.

    A part of it in eval mode is a fixed one, such as the network of a perceptual loss: its parameters are not trained.
    """
    if task is None:
        # The caller's own draws go on as if nothing had been built.
        with preserved_cpu_generators():
            seed_cpu(key(config.run.seed, "loss"))
            the_task = as_task(config.loss, num_classes)
    else:
        the_task = as_task(task, num_classes)
    for name, part in ModelAndLoss(module, the_task).named_loss_modules():
        if isinstance(part, _NormBase) and part.training:
            refuse_cumulative_average(name, part)
        if not part.training:
            for parameter in part.parameters(recurse=False):
                parameter.requires_grad_(False)
    return the_task


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


def _with_best_metric(config: Config, logged: LoggedMetrics) -> Config:
    """The config with the metric that decides which model is best, and its mode."""
    best = config.best
    if best.metric == BestConfig().metric:
        best = replace(best, metric=logged.default)
    logged.check("best.metric", best.metric)
    if best.mode is None:
        best = replace(best, mode=logged.direction("best.mode", best.metric))
    return replace(config, best=best)


def _evaluator(
    config: Config,
    ranks: Ranks,
    *,
    dataset: MapDataset,
    loader: Loader,
    module: nn.Module,
    forward: Forward,
    freezing: Freezing,
    quarantine: Quarantine | None,
    metrics: EvaluationMetrics,
) -> Evaluator:
    return Evaluator(
        module,
        forward,
        loader,
        ranks,
        samples=len(dataset),
        batch_size=config.batch.eval_size,
        exact=config.run.reproducibility == "bitwise",
        features=Features(
            partial(_head_of_fixed_features, config, forward.task, freezing)
        ),
        quarantine=quarantine,
        metrics=metrics,
    )


def _head_of_fixed_features(
    config: Config, task: Task, freezing: Freezing
) -> nn.Module | None:
    """The head, if running it on cached features gives what running the model gives; else None."""
    return (
        freezing.head if has_plain_predict(task) and not config.train.compile else None
    )
