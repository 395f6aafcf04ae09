"""The run's `metrics` in an evaluation: each computed once over all samples, the same on any number of ranks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from trainer.components.metrics import NamedMetric, column_of
from trainer.components.task import Task
from trainer.core.mean_iou import MeanIoU
from trainer.core.metric_columns import Columns
from trainer.core.metric_states import (
    Accumulator,
    Inputs,
    accumulator_of,
    with_precision,
)
from trainer.core.misfit import explained, explained_by, metric_misfit
from trainer.errors import ConfigError, LockstepError, listed
from trainer.exact.seeding import key, keyed_draws
from trainer.process.ranks import Ranks

Row = dict[str, float]


@dataclass(frozen=True)
class _Item:
    named: NamedMetric
    accumulator: Accumulator
    takes_one_probability: bool


class EvaluationMetrics:
    """Updated with each of this rank's batches, in order; the main process computes, and every rank has the values.

    One object serves several evaluations, one after another. `named` are the metrics.

    `classes` name the values of metrics that give one for each class. `best_metric` is the column that decides which
    model is best: whether a metric with several values has it, only its result tells.
    """

    def __init__(
        self,
        named: Sequence[NamedMetric],
        task: Task,
        ranks: Ranks,
        *,
        classes: Sequence[str],
        seed: int,
        precision: torch.dtype,
        best_metric: str,
    ) -> None:
        self._task = task
        self._ranks = ranks
        self._classes = classes
        self._key = key(seed, "metrics")
        # Whichever set of samples it is of.
        self._best = column_of(best_metric)
        # A task with inputs of its own leaves out what is to be left out.
        has_default_inputs = type(task).metric_inputs is Task.metric_inputs
        self._ignores = has_default_inputs and task.ignore_index is not None
        self._notes_given: set[str] = set()
        self._notes: list[str] = []
        self.named = list(named)
        self._items = [_prepare(item, ranks, precision) for item in named]

    def __bool__(self) -> bool:
        return bool(self._items)

    @property
    def count_pixels(self) -> bool:
        """True where the run is a segmentation whose mean IoU is logged unasked."""
        return any(isinstance(item.metric, MeanIoU) for item in self.named)

    def begin(self) -> None:
        """Before the first batch of an evaluation."""
        for item in self._items:
            item.accumulator.begin()

    def add(self, output: Any, targets: Any) -> None:
        """Take this rank's next batch: the model's output for it, and its targets."""
        with explained(self._task, "metric_inputs", output, targets):
            inputs = _checked_inputs(self._task.metric_inputs(output, targets))
        if _is_empty(inputs):
            return  # every target is ignored
        if self._ignores and _are_maps(inputs):
            self._check_ignored()
        for item in self._items:
            own = _one_probability(inputs) if item.takes_one_probability else inputs
            with _explained(item.named, "update", own):
                item.accumulator.add(own)

    def _check_ignored(self) -> None:
        """Raise `ConfigError` for a metric that would count the pixels whose targets are ignored."""
        ignored = self._task.ignore_index
        for item in self._items:
            metric = item.named.metric
            if getattr(metric, "ignore_index", None) == ignored:
                continue
            raise ConfigError(
                item.named.key,
                f"{type(metric).__name__} would count the targets of loss.ignore_index={ignored}; use a metric that "
                f"takes ignore_index={ignored}, such as torchmetrics.classification.MulticlassJaccardIndex",
            )

    def finish(self) -> Row:
        """The values over the samples of all ranks, without a phase before their names. A collective."""
        own_parts = [item.accumulator.parts() for item in self._items]
        of_ranks = self._ranks.gather_on_main(own_parts)
        self.begin()  # what was kept is not needed any more
        columns, notes = self._ranks.on_main(partial(self._compute_all, of_ranks))
        self._check_best(columns)
        for note in notes:
            if note not in self._notes_given:
                self._notes_given.add(note)
                self._notes.append(note)
        values: Row = columns.values
        return values

    def take_notes(self) -> list[str]:
        """What a person should know of the values since the last call, each once in a run."""
        notes, self._notes = self._notes, []
        return notes

    def rehearse(self, output: Any, targets: Any) -> None:
        """Try an evaluation of a few samples on this rank alone; its result is discarded.

        Raises `ConfigError` where a metric cannot be updated, or does not give the value that decides which model is
        best. That it cannot be computed of so few samples says nothing.
        """
        self.begin()
        self.add(output, targets)
        own_parts = [item.accumulator.parts() for item in self._items]
        self.begin()
        try:
            columns, _ = self._compute_all([own_parts])
        except LockstepError:
            return
        has_values_of_classes = any(self._best.endswith(f"_{c}") for c in self._classes)
        if not has_values_of_classes:
            self._check_best(columns)

    def _compute_all(
        self, of_ranks: list[list[list[Any]]]
    ) -> tuple[Columns, list[str]]:
        columns = Columns()
        notes: list[str] = []
        # What a metric draws, as a bootstrap does, is the same in every evaluation.
        with keyed_draws(self._key, torch.device("cpu")):
            for index, item in enumerate(self._items):
                parts = []
                for of_rank in of_ranks:
                    parts += of_rank[index]
                if parts:
                    self._compute(item, parts, columns, notes)
        for name, reason in columns.left_out.items():
            notes.append(f"{name} is not logged: it {reason}, not a number")
        return columns, notes

    def _compute(
        self, item: _Item, parts: list[Any], columns: Columns, notes: list[str]
    ) -> None:
        named = item.named
        before = dict(columns.values)
        with (
            _explained(named, "compute", None),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            result = item.accumulator.compute(parts)
        columns.add(named.name, result, self._classes)
        for warning in caught:
            notes.append(f"{named.name}: {warning.message}")
        for name, value in before.items():
            if columns.values[name] is not value:
                raise ConfigError(
                    named.key,
                    f"val/{name} is a value of another metric, too; set log_as to another name",
                )

    def _check_best(self, columns: Columns) -> None:
        """Raise `ConfigError` if `best.metric` is to be a value of one of these metrics, and they do not give it."""
        owners = [item.named for item in self._items if item.named.owns(self._best)]
        if not owners or self._best in columns.values:
            return
        own = [name for name in columns.values if owners[0].owns(name)]
        if not own:
            return  # there was no sample to compute it of
        raise ConfigError(
            "best.metric",
            f'"val/{self._best}" is not logged by this run; {type(owners[0].metric).__name__} gives '
            f"{listed([f'val/{name}' for name in own], 20)}",
        )


def _prepare(named: NamedMetric, ranks: Ranks, precision: torch.dtype) -> _Item:
    metric = named.metric
    if isinstance(metric, MeanIoU):
        return _Item(named, metric, takes_one_probability=False)
    metric.to(ranks.device)
    if precision == torch.float64:
        with_precision(metric, precision)
    return _Item(named, accumulator_of(metric), _is_binary(metric))


def _explained(
    named: NamedMetric, method: str, inputs: Any
) -> AbstractContextManager[None]:
    """A context for a call of the metric's `method`: its errors become a `ConfigError` at the metric's key."""
    return explained_by(partial(metric_misfit, named.key, named.metric, method, inputs))


def _is_binary(metric: Any) -> bool:
    for cls in type(metric).__mro__:
        is_of_library = cls.__module__.startswith("torchmetrics.")
        if is_of_library and cls.__name__.startswith("Binary"):
            return True
    return False


def _checked_inputs(inputs: Any) -> Inputs:
    if isinstance(inputs, tuple | Mapping):
        return inputs
    raise ConfigError(
        "loss.name",
        f"metric_inputs returned a {type(inputs).__name__}; return (predictions, targets), or a mapping by the names "
        f"of a metric's parameters",
    )


def _is_empty(inputs: Inputs) -> bool:
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return any(tensor.dim() and not len(tensor) for tensor in tensors)


def _are_maps(inputs: Inputs) -> bool:
    """True for class ids of several places a sample, in which ignored ones are still there."""
    if isinstance(inputs, Mapping) or not isinstance(inputs[0], torch.Tensor):
        return False
    predicted = inputs[0]
    return predicted.dim() > 1 and not predicted.is_floating_point()


def _one_probability(inputs: Inputs) -> Inputs:
    """For a metric of two classes, that of class 1 where the model gives the probabilities of both."""
    if isinstance(inputs, Mapping) or len(inputs) != 2:
        return inputs
    predictions, targets = inputs
    if not isinstance(predictions, torch.Tensor) or not isinstance(
        targets, torch.Tensor
    ):
        return inputs
    is_of_both = predictions.dim() == 2 and predictions.shape[1] == 2
    if is_of_both and targets.dim() == 1:
        return predictions[:, 1], targets
    return inputs
