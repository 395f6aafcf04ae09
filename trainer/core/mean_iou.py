"""The mean intersection over union of a segmentation, which is logged unasked: from counts of pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainer.components.metrics import MetricFacts, NamedMetric
from trainer.components.task import CrossEntropy, NegativeLogLikelihood, Task
from trainer.core.metric_states import Inputs

NAME = "mean_iou"


class MeanIoU:
    """Over all pixels of all samples; the mean is over the classes that are predicted or true somewhere.

    As `torchmetrics.classification.MulticlassJaccardIndex`, whose import would take seconds. Its own accumulator.
    """

    higher_is_better = True

    def __init__(self, ignore_index: int | None) -> None:
        self.ignore_index = ignore_index
        self.begin()

    def begin(self) -> None:
        # How often each class (row) is predicted as each (column); as many classes as were seen.
        self._counts = torch.zeros(0, 0, dtype=torch.int64)

    def add(self, inputs: Inputs) -> None:
        """Class ids `(N, H, W)`, predicted and true."""
        assert not isinstance(inputs, Mapping)
        predicted = inputs[0].flatten()
        true = inputs[1].flatten()
        if self.ignore_index is not None:
            is_counted = true != self.ignore_index
            predicted, true = predicted[is_counted], true[is_counted]
        if not len(true):
            return
        largest = torch.maximum(predicted.max(), true.max())
        size = 1 + int(largest)
        # A pixel's cell of the matrix, as one number.
        cells = true * size + predicted
        counts = torch.bincount(cells, minlength=size * size)
        matrix = counts.view(size, size).cpu()
        self._counts = add_counts([self._counts, matrix])

    def parts(self) -> list[Tensor]:
        return [self._counts] if self._counts.numel() else []

    def compute(self, parts: list[Tensor]) -> float:
        values = iou_of_classes(add_counts(parts))
        return float(values[~values.isnan()].mean())


def iou_of_classes(counts: Tensor) -> Tensor:
    """Intersection over union by class, `(C,)` fp64, from counts `(C, C)`; NaN for a class that is nowhere."""
    right = counts.diagonal().double()
    return right / (counts.sum(0) + counts.sum(1) - right)


def add_counts(parts: Sequence[Tensor]) -> Tensor:
    """The sum of counts `(C, C)`, each of its own C: a class that one lacks has no pixels there."""
    size = max(len(part) for part in parts)
    total = torch.zeros(size, size, dtype=torch.int64)
    for part in parts:
        total[: len(part), : len(part)] += part
    return total


def default_metrics(
    named: Sequence[NamedMetric], task: Task, facts: MetricFacts
) -> list[NamedMetric]:
    """What is logged unasked beside the metrics that are `named`: the mean IoU, of a segmentation into classes.

    Not for a task of somebody's own, which may answer otherwise.
    """
    is_taken = any(item.name == NAME for item in named)
    is_ours = type(task) in (CrossEntropy, NegativeLogLikelihood)
    if facts.kind != "class_map" or not is_ours or is_taken:
        return []
    return [NamedMetric(NAME, NAME, MeanIoU(task.ignore_index))]
