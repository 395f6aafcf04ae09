"""The one forward of the framework: training, evaluation, recalibration and prediction all call it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.components.task import Task, WeightedSum, as_weighted_sum
from trainer.core.precision import Precision
from trainer.data.samples import MicroBatch
from trainer.errors import ConfigError
from trainer.exact.fuse import Fused
from trainer.exact.plan import Step
from trainer.exact.seeding import device_generator, device_seeder, key, mix_key

# As torch's BatchNorm says it.
TOO_FEW_VALUES = "Expected more than 1 value per channel when training"


class Forward:
    """A micro-batch through a model and its loss."""

    def __init__(
        self, task: Task, precision: Precision, device: torch.device, seed: int
    ) -> None:
        self.task = task
        self._precision = precision
        self._base_key = key(seed, "device")
        self._device = device
        self._seed_device = device_seeder(device)

    def __call__(
        self, model: nn.Module, batch: MicroBatch, step: Step | None
    ) -> tuple[Any, WeightedSum]:
        """The model's output and the loss, summed over targets, of one micro-batch or of several at once.

        In training, what the model draws (dropout and the like) is keyed by the step and the micro-batch. `step` is
        None in evaluation, where nothing is drawn.

        Raises `ConfigError` where a micro-batch is too small for BatchNorm or the loss is no weighted sum.
        """
        if step is None:
            return self._output_and_loss(model, batch)
        if batch.fused > 1:
            return self._fuse(model, batch, step)
        self._seed_device(self._key(step, batch.first))
        return self._output_and_loss(model, batch)

    def _key(self, step: Step, index: int) -> int:
        return mix_key(self._base_key, step.number, index)

    def _output_and_loss(
        self, model: nn.Module, batch: MicroBatch
    ) -> tuple[Any, WeightedSum]:
        output = self.output(model, batch)
        return output, as_weighted_sum(self.task.loss_sum(output, batch.targets))

    def _fuse(
        self, model: nn.Module, batch: MicroBatch, step: Step
    ) -> tuple[Any, WeightedSum]:
        first, end = batch.indices
        start, _ = step.micro_batches[first]
        _, stop = step.micro_batches[end - 1]
        samples = stop - start
        seeds = [self._key(step, index) for index in range(first, end)]
        self._seed_device(seeds[0])
        generator = device_generator(self._device)
        with Fused(model, generator, seeds, samples, self.task) as fused:
            result = self._output_and_loss(model, batch)
        fused.finish()
        return result

    def output(self, model: nn.Module, batch: MicroBatch) -> Any:
        """The model's output in the run's dtype: a loss summed in autocast's dtype would lose digits."""
        if not self._precision.autocasts:
            return self._predict(model, batch)
        with self._precision.autocast():
            output = self._predict(model, batch)
        return (
            output.to(self._precision.dtype) if isinstance(output, Tensor) else output
        )

    def _predict(self, model: nn.Module, batch: MicroBatch) -> Any:
        try:
            return self.task.predict(model, batch.inputs)
        except ValueError as error:
            if TOO_FEW_VALUES not in str(error):
                raise
            raise ConfigError(
                "batch.micro_size",
                "a micro-batch of one sample leaves BatchNorm one value a channel, which has no variance; raise it, "
                "or batch.size if this is an epoch's short last step, or set batch_norm.mode=frozen",
            ) from None
