"""The one forward of the framework: training, evaluation, recalibration and prediction all call it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.components.task import Task
from trainer.core.precision import Precision
from trainer.data.samples import MicroBatch
from trainer.errors import ConfigError
from trainer.exact.fuse import Fused
from trainer.exact.plan import Step
from trainer.exact.seeding import device_generator, device_seeder, key, mixed

ONE_VALUE = "Expected more than 1 value per channel when training"  # what torch's BatchNorm says


class Forward:
    """A micro-batch through a model and its loss."""

    def __init__(self, task: Task, precision: Precision, device: torch.device, seed: int) -> None:
        self.task = task
        self._precision = precision
        self._draws = key(seed, "device")
        self._device = device
        self._seed_device = device_seeder(device)

    def __call__(self, model: nn.Module, batch: MicroBatch, step: Step | None) -> tuple[Any, Tensor, Tensor | int]:
        """Output, loss sum and target weight, of one micro-batch or of several at once.

        In training, dropout and whatever else the model draws is keyed by the step and the micro-batch; `step`
        is None where nothing is drawn.
        """
        if step is not None:
            if batch.fused > 1:
                return self._fused(model, batch, step)
            self._seed_device(mixed(self._draws, step.number, batch.first))
        return self._outcome(model, batch)

    def _outcome(self, model: nn.Module, batch: MicroBatch) -> tuple[Any, Tensor, Tensor | int]:
        output = self.output(model, batch)
        loss, weight = self.task.loss_sum(output, batch.targets)
        return output, loss, weight

    def _fused(self, model: nn.Module, batch: MicroBatch, step: Step) -> tuple[Any, Tensor, Tensor | int]:
        (start, _), (_, stop) = step.micro_batches[batch.first], step.micro_batches[batch.indices[1] - 1]
        seeds = [mixed(self._draws, step.number, place) for place in range(*batch.indices)]
        with Fused(model, device_generator(self._device), seeds, stop - start) as fused:
            outcome = self._outcome(model, batch)
        fused.finish()
        return outcome

    def output(self, model: nn.Module, batch: MicroBatch) -> Any:
        """The model's output in the run's dtype: autocast's own is too short for sums."""
        if not self._precision.autocasts:
            return self._predicted(model, batch)
        with self._precision.autocast():
            output = self._predicted(model, batch)
        return output.to(self._precision.dtype) if isinstance(output, Tensor) else output

    def _predicted(self, model: nn.Module, batch: MicroBatch) -> Any:
        try:
            return self.task.predict(model, batch.inputs)
        except ValueError as error:
            if ONE_VALUE not in str(error):
                raise
            raise ConfigError(
                "batch.micro_size",
                "a micro-batch of one sample leaves BatchNorm one value a channel, which has no variance; raise it, "
                "or batch.size if this is an epoch's short last step, or set batch_norm.mode=frozen",
            ) from None
