"""What the run's `metrics` are given: a model's answers and its targets, in the forms that torchmetrics takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trainer.components.answers import Answer
from trainer.components.targets import largest_class


def as_metric_inputs(
    answer: Answer, targets: Any, ignore_index: int | None
) -> tuple[Any, Any]:
    """Predictions and targets of one batch, `targets` being those that the loss takes.

    - `class`: probabilities `(N, C)` and class ids `(N,)`, without the samples whose target is ignored.
    - `labels`: probabilities and 0 or 1, both in the output's shape.
    - `values`: numbers, `(N,)` or in the output's shape.
    - `class_map`: class ids `(N, H, W)` of both; a metric leaves `ignore_index` out itself.
    - `boxes`: for each image a dict of `boxes`, `scores` and `labels`; the targets as they are.
    """
    values = answer.values
    if answer.kind == "boxes":
        return [_as_boxes(table) for table in values], targets
    if answer.kind == "labels":
        return values, (targets > 0.5).long()
    if answer.kind == "values":
        return _without_last_one(values), _without_last_one(targets)
    # Shares of classes count as the strongest one, as they do for accuracy.
    labels = largest_class(targets) if targets.is_floating_point() else targets
    if answer.kind == "class_map":
        # Probabilities of pixels would take C times the memory where a metric keeps them.
        return largest_class(values), labels
    if ignore_index is None or targets.is_floating_point():
        return values, labels
    is_counted = labels != ignore_index
    return values[is_counted], labels[is_counted]


def _as_boxes(table: Tensor) -> dict[str, Tensor]:
    """A table `(K, 6)` of boxes, scores and class ids as `torchmetrics.detection` takes them."""
    return {
        "boxes": table[:, :4],
        "scores": table[:, 4],
        "labels": table[:, 5].long(),
    }


def _without_last_one(tensor: Tensor) -> Tensor:
    """`(N, 1)` as `(N,)`: metrics of regression take that for one number a sample."""
    is_one_number = tensor.dim() == 2 and tensor.shape[1] == 1
    return tensor.squeeze(1) if is_one_number else tensor
