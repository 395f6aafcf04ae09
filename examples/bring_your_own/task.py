"""The project's own loss and metric."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from trainer import Task
from trainer.components.task import Sum


class Segmentation(Task):
    """Binary cross-entropy of each pixel, discs counting `disc_weight` times; the metric is intersection over union.

    Loss and metric are given as a sum and what divides it. The trainer adds both up over micro-batches and processes
    and divides once, so an uneven last batch weighs what it should.
    """

    metrics = ("iou",)

    def __init__(self, disc_weight: float = 1.0) -> None:
        super().__init__()
        self.disc_weight = disc_weight

    def loss_sum(self, output: Tensor, targets: Tensor) -> Sum:
        weights = 1 + (self.disc_weight - 1) * targets
        loss = F.binary_cross_entropy_with_logits(output, targets.to(output.dtype), weights, reduction="sum")
        return loss, weights.sum()  # a tensor, as it depends on the targets; a count of pixels would be an int

    def metric_sums(self, output: Tensor, targets: Tensor) -> dict[str, Any]:
        found, true = output > 0, targets > 0.5
        return {"iou": ((found & true).sum(), (found | true).sum())}
