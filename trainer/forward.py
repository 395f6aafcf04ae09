"""The one forward of the framework: training, evaluation, recalibration and prediction all call it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.loading import MicroBatch
from trainer.plan import Step
from trainer.precision import Precision
from trainer.seeding import device_seeder, key, mixed
from trainer.task import Task


class Forward:
    """A micro-batch through a model and its loss."""

    def __init__(self, task: Task, precision: Precision, device: torch.device, seed: int) -> None:
        self.task = task
        self._precision = precision
        self._draws = key(seed, "device")
        self._seed_device = device_seeder(device)

    def __call__(self, model: nn.Module, batch: MicroBatch, step: Step | None) -> tuple[Any, Tensor, Tensor | int]:
        """Output, loss sum and target weight.

        In training, dropout and whatever else the model draws is keyed by the step and the micro-batch; `step`
        is None where nothing is drawn.
        """
        if step is not None:
            self._seed_device(mixed(self._draws, step.number, batch.place))
        output = self.output(model, batch)
        loss, weight = self.task.loss_sum(output, batch.targets)
        return output, loss, weight

    def output(self, model: nn.Module, batch: MicroBatch) -> Any:
        """The model's output in the run's dtype: autocast's own is too short for sums."""
        if not self._precision.autocasts:
            return self.task.predict(model, batch.inputs)
        with self._precision.autocast():
            output = self.task.predict(model, batch.inputs)
        return output.to(self._precision.dtype) if isinstance(output, Tensor) else output
