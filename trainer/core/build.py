"""What a config describes, built: data, plan, model, loss, optimizer, on this process among the run's."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from trainer.components.freezing import Freezing
from trainer.components.models import build_model, compile_model, input_channels
from trainer.components.optimizer import build_optimizer
from trainer.components.task import Task, as_task
from trainer.components.weights import start_from_weights, weights_file
from trainer.config.schema import Config
from trainer.core.evaluation import Evaluator
from trainer.core.features import Features
from trainer.core.forward import Forward
from trainer.core.metrics import Row
from trainer.core.precision import Precision
from trainer.data.datasets import Datasets, MapDataset, build_datasets
from trainer.data.loading import build_loaders, step_requests
from trainer.errors import ConfigError, nearest
from trainer.exact.batch_norm import RunningStatistics, configure
from trainer.exact.bitwise import LeafStatistics, TreeGradients
from trainer.exact.determinism import make_deterministic
from trainer.exact.plan import Plan
from trainer.exact.recalibration import recalibrate
from trainer.exact.standard import Gradients
from trainer.process.memory import keep_freed_memory
from trainer.process.ranks import Ranks
from trainer.storage import checkpoint
from trainer.storage.checkpoint import Progress
from trainer.storage.run_directory import run_path
from trainer.storage.signature import signature_of_samples


class Run:
    """The parts of a run, each built from its own section of the config, and what they do without a loop.

    `module` is the model itself; `model` is how training calls it, in DDP where there are several processes.
    """

    def __init__(
        self,
        config: Config,
        *,
        model: nn.Module | None = None,
        train_data: MapDataset | None = None,
        val_data: MapDataset | None = None,
        task: Task | nn.Module | None = None,
    ) -> None:
        config = self.config = _naming(config, model=model, data=train_data, loss=task)
        train = config.train
        self.bitwise = config.run.reproducibility == "bitwise"
        if self.bitwise:
            make_deterministic()
        self.ranks = Ranks(train.precision, find_unused_parameters=train.find_unused_parameters)
        if self.ranks.device.type == "cpu":
            keep_freed_memory()
        self.precision = Precision(train.precision, self.ranks.device)
        if train_data is None:
            self.data = build_datasets(config.data, self.ranks.main_first)
        else:
            classes = getattr(train_data, "classes", None)
            self.data = Datasets(train_data, val_data, list(classes) if classes else None, config.data.name)
        self.plan = self._plan()
        self.train_loader, self.val_loader = build_loaders(
            config.data, self.data, seed=config.run.seed, device=self.ranks.device, dtype=self.precision.dtype
        )
        num_classes = self._num_classes()
        self.signature = signature_of_samples(
            self.val_loader or self.train_loader, num_classes=num_classes, classes=self.data.classes
        )
        weights = weights_file(config.model, self.ranks.node_main_first)
        if model is None:
            channels = input_channels(self.train_loader.peek([0]).inputs)
            model = build_model(config.model, seed=config.run.seed, num_classes=num_classes, in_channels=channels)
        self.weights_note = start_from_weights(weights, model, config.model, num_classes, config.run.seed)
        self._place(model)
        self.task = as_task(config.loss if task is None else task, num_classes)
        self.task.to(self.ranks.device, self.precision.dtype)
        self.forward = Forward(self.task, self.precision, self.ranks.device, config.run.seed)
        self.freezing = Freezing(self.module, config.model)
        self.optimizer = build_optimizer(config.optimizer, self.module, head=config.model.head)
        self.freezing.apply(epoch=0)
        self._build_reduction()
        self.evaluator = self._evaluator()
        self._check_best_metric()
        self.progress = Progress()
        self.fuse = 1  # micro-batches in one forward, until a trial before training settles it
        self.alone = ""  # why that is no more, where batch.fuse=auto

    def evaluate(self) -> Row:
        """The loss and metrics over all validation samples. A collective."""
        if self.evaluator is None:
            raise ConfigError("data.name", f"{self.data.name} has no validation data")
        if self.config.batch_norm.recalibrate_at == "evaluation":
            self.recalibrate()
        return self.evaluator.evaluate()

    def recalibrate(self) -> bool:
        """Exact BatchNorm statistics from the first `batch_norm.recalibrate` steps of the present epoch, if any."""
        count = min(self.config.batch_norm.recalibrate, self.plan.steps_per_epoch)
        if not count:
            return False
        self.statistics.gather()
        first = (max(0, self.progress.step - 1) // self.plan.steps_per_epoch) * self.plan.steps_per_epoch
        steps = [self.plan.step(first + i) for i in range(count)]
        asked = [(step, request) for step in steps for request in step_requests(self.plan, step, self.ranks.rank)]
        before = list(itertools.accumulate((len(step.micro_batches) for step in steps), initial=0))
        forwards = (
            (before[step.number - 1 - first] + batch.first, partial(self.forward, self.module, batch, step))
            for (step, _), batch in zip(asked, self.train_loader.run([request for _, request in asked]), strict=True)
        )
        recalibrate(self.module, forwards, before[-1], self.ranks)
        return True

    def freeze_as_in(self, epoch: int) -> None:
        """Train what is trained in `epoch`, and no more. A collective, at an epoch's begin."""
        if self.freezing.apply(epoch):
            self.statistics.gather()
            self.statistics.release()
            self._build_reduction()
            self.model.train()
            if self.evaluator is not None:
                self.evaluator.forget()

    def load_best(self, run: Path | None = None) -> Row:
        """Load the best weights of a run (this one's) on every rank; returns the row they were kept with."""
        tensors, row = checkpoint.load_best(run or run_path(self.config.run))
        checkpoint.restore_model(self.module, tensors)
        if run is not None and self.evaluator is not None:
            self.evaluator.forget()
        return row

    def _plan(self) -> Plan:
        batch, train = self.config.batch, self.config.train
        return Plan(
            samples=len(self.data.train),
            batch_size=batch.size,
            micro_size=batch.micro_size or batch.size,
            ranks=self.ranks.count,
            epochs=train.epochs,
            seed=self.config.run.seed,
            max_steps=train.max_steps,
            equal_ranks=self.config.batch_norm.mode == "sync",
        )

    def _num_classes(self) -> int | None:
        """Outputs of the model: the config's, else one for each class of the data."""
        given, classes = self.config.model.num_classes, len(self.data.classes or [])
        if given is not None and given < classes and self.config.loss.name == "cross_entropy":
            raise ConfigError("model.num_classes", f"{given} is less than the {classes} classes of {self.data.name}")
        return given or classes or None

    def _place(self, model: nn.Module) -> None:
        """The model in its modes, on its device, in its dtype."""
        model = configure(model, self.config.batch_norm, ranks=self.ranks.count, device=self.ranks.device)
        self.module = model.to(self.ranks.device, self.precision.dtype)
        if self.config.train.channels_last:
            self.module.to(memory_format=torch.channels_last)
        if self.config.train.compile:
            compile_model(self.module, bitwise=self.bitwise)

    def _build_reduction(self) -> None:
        """`model` as training calls it, and what makes one gradient and one set of statistics of those of all ranks."""
        self.model = self.ranks.broadcast_parameters(self.module) if self.bitwise else self.ranks.prepare(self.module)
        may_be_unused = self.config.train.find_unused_parameters
        self.statistics: RunningStatistics
        self.gradients: Gradients
        if self.bitwise:
            self.statistics = by_leaf = LeafStatistics(self.module, self.config.batch_norm, self.ranks)
            self.gradients = TreeGradients(self.module, self.ranks, by_leaf, may_be_unused=may_be_unused)
        else:
            self.statistics = RunningStatistics(self.module, self.config.batch_norm, self.ranks)
            self.gradients = Gradients(self.model, self.module, self.ranks, may_be_unused=may_be_unused)

    def _check_best_metric(self) -> None:
        names = ["loss", *self.task.metrics]
        known = [f"{phase}/{name}" for phase in (("val", "train") if self.evaluator else ("train",)) for name in names]
        metric = self.config.best.metric
        if metric not in known:
            raise ConfigError(
                "best.metric",
                f'"{metric}" is not logged by this run{nearest(metric, known)}; it logs {", ".join(known)}',
            )

    def _evaluator(self) -> Evaluator | None:
        if self.data.val is None or self.val_loader is None:
            return None
        return Evaluator(
            self.module,
            self.forward,
            self.val_loader,
            lambda: self.statistics.gather(),  # noqa: PLW0108 - others take their place where parts are thawed
            self.ranks,
            samples=len(self.data.val),
            batch_size=self.config.batch.eval_size,
            exact=self.bitwise,
            features=Features(self._head_of_fixed_features),
        )

    def _head_of_fixed_features(self) -> nn.Module | None:
        """The head, where running it on kept features is running the model."""
        alone = not self.config.train.compile and type(self.task).predict is Task.predict
        return self.freezing.head if alone else None


def _naming(config: Config, **given: object) -> Config:
    """The config, each section whose object was given under that object's own name: what is written is what ran."""
    named = {
        section: replace(getattr(config, section), name=f"{type(thing).__module__}.{type(thing).__qualname__}")
        for section, thing in given.items()
        if thing is not None
    }
    return replace(config, **named)
