"""The project's own loss and metric."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trainer import Task, WeightedSum


class Segmentation(Task):
    """Binary cross-entropy of each pixel, discs counting `disc_weight` times; the metric is intersection over union.

    Both are returned as a sum and the weight to divide it by. The trainer adds these up over micro-batches and
    processes and divides once, so an uneven last batch has the share it should.
    """

    metrics = ("iou",)
    # They are sums over pixels, so those of several micro-batches add up.
    metrics_add_up = True

    def __init__(self, disc_weight: float = 1.0) -> None:
        super().__init__()
        self.disc_weight = disc_weight

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        weights = 1 + (self.disc_weight - 1) * targets
        total = F.binary_cross_entropy_with_logits(
            output, targets.to(output.dtype), weights, reduction="sum"
        )
        # A tensor, because it depends on the targets; a plain count of pixels would be an int.
        return WeightedSum(total, weights.sum())

    def metric_sums(self, output: Tensor, targets: Tensor) -> dict[str, WeightedSum]:
        predicted = output > 0
        actual = targets > 0.5
        return {
            "iou": WeightedSum((predicted & actual).sum(), (predicted | actual).sum())
        }
