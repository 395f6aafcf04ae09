"""The forward and backward of one micro-batch, eager: one operation after the other."""

from __future__ import annotations

from typing import Any

from torch import nn

from trainer.components.task import WeightedSum
from trainer.core.run import Run
from trainer.data.batches import MicroBatch
from trainer.exact.plan import Step
from trainer.exact.reduction import Reduction


def forward_and_backward(
    run: Run, reduction: Reduction, model: nn.Module, batch: MicroBatch, step: Step
) -> tuple[Any, WeightedSum]:
    """Add a micro-batch's share of the step's gradient; returns its output and its loss."""
    output, loss = run.forward(model, batch, step)
    scale = reduction.loss_scale(step, batch.indices, *loss)
    run.precision.backward(reduction.root(loss.total), scale)
    return output, loss
