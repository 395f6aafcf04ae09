"""A step of a run, repeated on one process in detail: where a run went wrong, and on which samples.

Training starts at the nearest checkpoint before the step, or at the run's first step, and goes as it did in the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.components.weights import weights_file
from trainer.core.logged_metrics import epoch_column
from trainer.core.metrics import Row
from trainer.core.preflight import order_digest
from trainer.errors import ConfigError
from trainer.exact.plan import Step
from trainer.inspection.watch import StepWatch, describe
from trainer.reporting.jsonl import read_rows
from trainer.storage import checkpoint
from trainer.storage.data_record import (
    check_same_data,
    check_same_order,
    check_same_weights,
)
from trainer.trainer import Trainer

MAX_NUMBERS = 10  # shown of one sample's target
COMPARED_COLUMNS = ("train/loss", "lr", "grad_norm")

Rows = dict[int, dict[str, Any]]  # logged rows, by step
Digests = dict[int, tuple[str, str]]  # at logged steps: the run's, and this one's


@dataclass
class Replay:
    """The details of step `step`. The step that was `asked` for is a later one if the loss was not finite before it."""

    step: int
    asked: int
    epoch: int
    learning_rate: float
    began_after: int  # the step of the checkpoint, 0 for the run's beginning
    loss: float  # the step's: what a log interval of one step would show
    grad_norm: float  # before clipping
    samples: list[dict[str, Any]]  # id, file, target, micro_batch, loss
    # outputs' least and largest finite value, and the share that is finite.
    layers: dict[str, dict[str, float]]
    # Least and largest mean and variance, of a channel in a micro-batch.
    batch_norm: dict[str, dict[str, float]]
    weights: dict[str, dict[str, float]]  # norm, gradient's norm, norm of the change
    # At logged steps on the way: the run's, and this one's.
    digests: dict[int, tuple[str, str]]
    # The row at this step: the run's, this one's.
    logged: dict[str, tuple[float, float]] = field(default_factory=dict)
    # (N, C, H, W) in [0, 1], as the model saw them.
    images: Tensor | None = field(default=None, repr=False)


def replay(make_trainer: Callable[[], Trainer], directory: Path, number: int) -> Replay:
    """Repeat step `number` (1 is the first) of the run in `directory`, and report its details.

    `make_trainer` builds what the run's config describes. If the loss is not finite in an earlier step, that step is
    reported instead, unless the run left it out (`train.non_finite=skip`) and went on. Raises `ConfigError` if the run
    has no such step.
    """
    trainer = make_trainer()
    if trainer.ranks.count > 1:
        raise ConfigError(
            "RUN", "replay is for one process; start it without a launcher"
        )
    if not 1 <= number <= trainer.plan.total_steps:
        raise ConfigError(
            "--step",
            f"{number} is none of the run's steps, 1 to {trainer.plan.total_steps}",
        )
    logged = Logged(directory)
    check_same_data(directory, trainer.run.data, trainer.config.run, resumes=False)
    check_same_order(directory, order_digest(trainer.plan), trainer.config.run)
    with trainer.run.settings(), ExitStack() as stack:
        stack.callback(trainer.end_loading)
        digests: Digests = {}
        first_step = _restore(trainer, directory, logged, before=number)
        first_bad_step = _advance(trainer, number, logged, digests)
        if first_bad_step is not None:
            # Once more, because the details of a step are recorded while it runs.
            trainer = make_trainer()
            stack.callback(trainer.end_loading)
            digests = {}
            _restore(trainer, directory, logged, before=number)
            _advance(trainer, first_bad_step, logged, digests)
        result = _examine(trainer, logged, digests)
    result.asked = number
    result.began_after = first_step
    return result


class Logged:
    """What a run logged: `intervals`, its rows of steps, and `evaluations`, those of epochs' ends and within epochs."""

    def __init__(self, directory: Path) -> None:
        self.intervals: Rows = {}
        self.evaluations: Rows = {}
        path = directory / "metrics.jsonl"
        for row in read_rows(path) if path.is_file() else []:
            # Not train/loss: a row of steps that were all left out has none.
            rows = self.intervals if "digest" in row else self.evaluations
            # A step may have two: an evaluation, and then the test set's.
            rows.setdefault(int(row["step"]), {}).update(row)


def _restore(trainer: Trainer, directory: Path, logged: Logged, *, before: int) -> int:
    """Bring `trainer` to the newest checkpoint before a step, if there is one; returns the checkpoint's step or 0."""
    earlier_checkpoints = []
    for path in (directory / "checkpoints").glob("step_*"):
        if path.name < f"step_{before:08d}":
            earlier_checkpoints.append(path)
    if earlier_checkpoints:
        newest = max(earlier_checkpoints)
        trainer.restore(checkpoint.load(newest))
        progress = trainer.progress  # the checkpoint's
        # A run that was stopped at the end of an epoch evaluates when it goes on.
        if progress.epoch_end_is_due or progress.evaluation_is_due:
            _evaluate_as_logged(trainer, progress.step, logged)
    else:
        check_same_weights(directory, weights_file(trainer.config.model, nullcontext))
    trainer.left_out.take_over(directory)
    trainer.start()
    return trainer.progress.step


def _advance(trainer: Trainer, to: int, logged: Logged, digests: Digests) -> int | None:
    """Train up to the step before `to`; returns the first step on the way whose loss is not finite, which ended it."""
    for step in trainer.plan.steps(trainer.progress.step):
        if step.number == to:
            return None
        with StepWatch(trainer, detailed=False) as watch:
            trainer.train_step(step)
        if not watch.is_finite() and not trainer.finite.leaves_out:
            return step.number
        _measure_as_logged(trainer, step, logged, digests)
        _evaluate_as_logged(trainer, step.number, logged)
    return None


def _evaluate_as_logged(trainer: Trainer, step_number: int, logged: Logged) -> None:
    """Note the run's evaluation after a step, which a plateau schedule goes by, without doing it over."""
    metric = epoch_column(trainer.config.best.metric)
    row = logged.evaluations.get(step_number, {})
    if metric in row:
        trainer.progress.history.append(row[metric])
    trainer.progress.epoch_end_is_due = False
    trainer.progress.evaluation_is_due = False


def _measure_as_logged(
    trainer: Trainer, step: Step, logged: Logged, digests: Digests
) -> Row:
    """At a step that the run logged, note its digest and return its row as they are here; {} at other steps.

    Measuring starts the sums of the next row anew, as it did in the run.
    """
    row = logged.intervals.get(step.number)
    if row is None:
        return {}
    digests[step.number] = str(row.get("digest")), trainer.digest()
    return trainer.measure(step)


def _examine(trainer: Trainer, logged: Logged, digests: Digests) -> Replay:
    """Train the next step and report its details."""
    step = trainer.plan.step(trainer.progress.step)
    with StepWatch(trainer, detailed=True) as watch:
        trainer.train_step(step)
    if not watch.records:
        raise ConfigError(
            "--step",
            f"none of the samples of step {step.number} can be read, so the run passed over it; name another",
        )
    row = _measure_as_logged(trainer, step, logged, digests)
    logged_row = logged.intervals.get(step.number, {})
    both_rows = {}
    for name in COMPARED_COLUMNS:
        if name in row:
            both_rows[name] = logged_row[name], row[name]
    return Replay(
        step=step.number,
        asked=step.number,
        epoch=step.epoch + 1,
        learning_rate=trainer.optimizer.param_groups[0]["lr"],
        began_after=0,
        loss=watch.loss(),
        grad_norm=watch.grad_norm(),
        samples=_samples(watch, trainer.run.remaining(step)),
        layers=watch.layers,
        batch_norm=watch.norm_inputs,
        weights=_weights(watch),
        digests=digests,
        logged=both_rows,
        images=_images(watch),
    )


def _samples(watch: StepWatch, step: Step) -> list[dict[str, Any]]:
    """Id, file, target, micro-batch and loss of each sample, in the order of the step."""
    trainer = watch.trainer
    data = trainer.run.data
    paths = getattr(data.train, "paths", None)
    samples: list[dict[str, Any]] = []
    for record in watch.records:
        index = record.batch.first
        losses = record.sample_losses(trainer)
        ids = trainer.plan.sample_ids(step, index).tolist()
        for row, sample_id in enumerate(ids):
            sample: dict[str, Any] = {"id": sample_id}
            if paths is not None:
                sample["file"] = paths[sample_id]
            sample["target"] = _target(record.batch.targets, row, data.classes)
            sample["micro_batch"] = index
            sample["loss"] = losses[row][0] if losses else None
            samples.append(sample)
    return samples


def _target(targets: Any, row: int, classes: list[str] | None) -> Any:
    """The name of the target's class if it has one, else its plain value; a description of many values."""
    if isinstance(targets, list) and isinstance(targets[row], Mapping):
        parts = {}  # of a detector, say
        for name, value in targets[row].items():
            if isinstance(value, Tensor):
                parts[name] = describe(value)
        return parts
    if not isinstance(targets, Tensor):
        return None
    target = targets[row]
    if target.numel() > MAX_NUMBERS:
        return describe(target)
    value = target.tolist()
    if isinstance(value, int) and classes and 0 <= value < len(classes):
        return classes[value]
    return value


def _weights(watch: StepWatch) -> dict[str, dict[str, float]]:
    """For each parameter three norms: its own before the step, its gradient's as applied, and its change's."""
    weights: dict[str, dict[str, float]] = {}
    for name, change in watch.changes().items():
        before = watch.weights_before[name]
        weights[name] = {
            "norm": before.norm().item(),
            "change": change.norm().item(),
        }
    # A frozen parameter has none.
    for name, gradient in watch.applied_gradients().items():
        weights[name]["gradient"] = gradient.norm().item()
    return weights


def _images(watch: StepWatch) -> Tensor | None:
    """The images as the model saw them, `(N, C, H, W)` in [0, 1]; None if inputs are no images."""
    batches = []
    for record in watch.records:
        images = record.batch.inputs
        if not isinstance(images, Tensor) or images.dim() != 4:
            return None
        batches.append(images)
    if not batches:
        return None
    normalize = watch.trainer.run.train_loader.normalize
    return normalize.undo(torch.cat(batches))


def loss_rank(sample: Mapping[str, Any]) -> float:
    """A key that sorts samples by loss: NaN first, then the largest, samples without a loss last."""
    loss = sample["loss"]
    if loss is None:
        return math.inf
    return -math.inf if math.isnan(loss) else -float(loss)
