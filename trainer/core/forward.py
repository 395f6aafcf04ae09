"""The one forward of the framework: training, evaluation, recalibration and prediction all call it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trainer.components.compiling import compile_failure
from trainer.components.task import Task, WeightedSum, as_weighted_sum
from trainer.core.misfit import (
    KINDS,
    is_from_a_layer,
    is_misfit,
    loss_misfit,
    model_misfit,
    shard_misfit,
)
from trainer.core.mix import Mix, blended_loss
from trainer.core.precision import Precision
from trainer.data.batches import MicroBatch
from trainer.errors import ConfigError
from trainer.exact.fuse import Fused
from trainer.exact.host_draws import HostDraws
from trainer.exact.plan import Step
from trainer.exact.seeding import (
    device_generator,
    device_seeder,
    key,
    mix_key,
    seed_host_generators,
)
from trainer.exact.structures import tensors_in

# As torch's BatchNorm says it.
TOO_FEW_VALUES = "Expected more than 1 value per channel when training"
T = TypeVar("T")


class Forward:
    """A micro-batch through a model and its loss."""

    def __init__(
        self,
        task: Task,
        precision: Precision,
        device: torch.device,
        seed: int,
        mix: Mix | None = None,
    ) -> None:
        self.task = task
        self.mix = mix
        self._precision = precision
        self._autocasts = precision.autocasts
        self._base_key = key(seed, "device")
        self._evaluation_key = key(seed, "evaluation")
        self._whole_key = key(seed, "whole step")
        self._device = device
        self._seed_device = device_seeder(device)
        # (weight, samples) of the first micro-batch whose weight is an int.
        self._first_weight: tuple[int, int] | None = None
        # The same of those that were checked: few, again and again.
        self._checked_counts: set[tuple[int, int]] = set()
        self._has_tensor_weights: bool | None = None  # None: none seen
        # Of the model that is trained, known from the first forward on.
        self.host_draws: HostDraws | None = None

    def __call__(
        self, model: nn.Module, batch: MicroBatch, step: Step | None
    ) -> tuple[Any, WeightedSum]:
        """The model's output and the loss, summed over targets, of one micro-batch or of several at once.

        In training the batch is mixed first, unless it is already (`mixed`). What the model draws (dropout and the
        like) is keyed by the step and the micro-batch. `step` is None in evaluation, where what a model still draws
        (a variational one, say) is keyed by the batch alone.

        Raises `ConfigError` where a micro-batch is too small for BatchNorm, the loss is no weighted sum, or model,
        loss and data do not fit together.
        """
        if step is None:
            self._seed_evaluation(batch)
            return self._output_and_loss(model, batch)
        if self.mix is not None:
            batch = self.mix(batch, step)
        output, loss = self._keyed(self._output_and_loss, model, batch, step)
        if torch.is_grad_enabled():
            loss = self._checked(batch, loss)
        return output, loss

    def seed(self, batch: MicroBatch, step: Step) -> None:
        """Seed what the model draws from in a training forward of one micro-batch, by its key."""
        self._seed_device(mix_key(self._base_key, step.number, batch.first))

    def seeded(self, model: nn.Module, batch: MicroBatch) -> tuple[Any, WeightedSum]:
        """The model's output and the loss of one mixed micro-batch in training, after `seed`."""
        output, loss = self._output_and_loss(model, batch)
        return output, self._checked(batch, loss)

    def train_output(self, model: nn.Module, batch: MicroBatch, step: Step) -> Any:
        """The model's output in training, without its loss: what it draws is what a call for the same batch draws."""
        return self._keyed(self._output, model, batch, step)

    def whole_loss(
        self, model: nn.Module, output: Any, whole: MicroBatch, step: Step
    ) -> WeightedSum:
        """The loss of the joined outputs of all micro-batches of a step. What it draws is keyed by the step.

        `whole` has the joined targets.
        """
        value = mix_key(self._whole_key, step.number, 0)
        return self._drawing(value, model, self._loss, output, whole)

    def _keyed(
        self,
        compute: Callable[[nn.Module, MicroBatch], T],
        model: nn.Module,
        batch: MicroBatch,
        step: Step,
    ) -> T:
        """What `compute` makes of a batch in training: its draws are keyed by the step and the micro-batch."""
        if batch.fused > 1:
            return self._fuse(compute, model, batch, step)
        value = mix_key(self._base_key, step.number, batch.first)
        return self._drawing(value, model, compute, model, batch)

    def _drawing(
        self, value: int, model: nn.Module, compute: Callable[..., T], *arguments: Any
    ) -> T:
        """What `compute` makes of the arguments; its draws follow from `value`."""
        host_draws = self.host_draws or self._host_draws_of(model)
        self._seed_device(value)
        if not host_draws.are_made and not host_draws.forwards_to_watch:
            return compute(*arguments)
        watched = host_draws.begin(value)
        result = compute(*arguments)
        host_draws.end(watched)
        return result

    def _host_draws_of(self, model: nn.Module) -> HostDraws:
        if self.host_draws is None:
            self.host_draws = HostDraws(model, self.task)
        return self.host_draws

    def mixed(self, batch: MicroBatch, step: Step) -> MicroBatch:
        """The batch as the model sees it in training: mixed, where `train.mix` asks for it."""
        return batch if self.mix is None else self.mix(batch, step)

    def predict(self, model: nn.Module, batch: MicroBatch) -> Any:
        """The model's output outside of training, as an evaluation of the same batch sees it."""
        self._seed_evaluation(batch)
        return self._output(model, batch, for_loss=False)

    def _seed_evaluation(self, batch: MicroBatch) -> None:
        # Batches of an evaluation are cut by the config alone, so this key is the same on any number of ranks.
        value = mix_key(self._evaluation_key, 0, batch.first)
        self._seed_device(value)
        seed_host_generators(value)

    def _output_and_loss(
        self, model: nn.Module, batch: MicroBatch
    ) -> tuple[Any, WeightedSum]:
        output = self._output(model, batch)
        return output, self._loss(output, batch)

    def _loss(self, output: Any, batch: MicroBatch) -> WeightedSum:
        try:
            if batch.blend is None:
                loss = self.task.loss_sum(output, batch.targets)
            else:
                loss = blended_loss(self.task, output, batch.blend)
        except KINDS as error:
            if not is_misfit(error):
                raise
            raise shard_misfit(error) or loss_misfit(
                self.task, "loss_sum", output, batch.targets, error
            ) from error
        return as_weighted_sum(loss)

    def expect_weights_like(self, weight: Tensor | int) -> None:
        """Before the first micro-batch: the kind of weight that the task returns, the same on every rank."""
        self._has_tensor_weights = isinstance(weight, Tensor)

    def _checked(self, batch: MicroBatch, loss: WeightedSum) -> WeightedSum:
        """The loss, if its weight is one that a step can add up: all are counts by sample, or all are tensors."""
        total, weight = loss
        if self._has_tensor_weights is None:
            self.expect_weights_like(weight)
        if isinstance(weight, int):
            if self._has_tensor_weights:
                return WeightedSum(total, torch.tensor(weight, device=total.device))
            if (weight, batch.samples) not in self._checked_counts:
                self._check_count(batch, weight)
        elif not self._has_tensor_weights:
            raise ConfigError(
                "loss.name",
                "loss_sum returned a tensor as the weight of a micro-batch, and an int before: one that depends on the "
                "targets is a 0-dim tensor for every micro-batch",
            )
        return loss

    def _check_count(self, batch: MicroBatch, weight: int) -> None:
        """A step's weight is taken from one micro-batch and the number of samples, so an int must be a count by sample.

        Else the gradient would be a mean of means, and another one for each cut into micro-batches.
        """
        samples = count_samples(batch)
        if samples is None or (weight, samples) in self._checked_counts:
            return
        if self._first_weight is None and weight > 0:
            self._first_weight = weight, samples
        first_weight, first_samples = self._first_weight or (1, 0)
        if weight * first_samples != first_weight * samples or weight <= 0:
            raise ConfigError(
                "loss.name",
                f"loss_sum returned the int {weight} as the weight of {samples} samples, and {first_weight} for "
                f"{first_samples}; an int is a count that is the same for every sample: return the sum of the loss and "
                f"the number of its targets, as a 0-dim tensor where it depends on the targets or their shapes",
            )
        self._checked_counts.add((weight, samples))

    def _fuse(
        self,
        compute: Callable[[nn.Module, MicroBatch], T],
        model: nn.Module,
        batch: MicroBatch,
        step: Step,
    ) -> T:
        first, end = batch.indices
        start, _ = step.micro_batches[first]
        _, stop = step.micro_batches[end - 1]
        samples = stop - start
        seeds = [
            mix_key(self._base_key, step.number, index) for index in range(first, end)
        ]
        self._seed_device(seeds[0])
        generator = device_generator(self._device)
        with (
            self._host_draws_of(model).refused(),
            Fused(model, generator, seeds, samples, self.task) as fused,
        ):
            result = compute(model, batch)
        fused.finish()
        return result

    def _output(
        self, model: nn.Module, batch: MicroBatch, *, for_loss: bool = True
    ) -> Any:
        """The model's output in the run's dtype: a loss summed in autocast's dtype would lose digits."""
        if not self._autocasts:
            return self._predict(model, batch, for_loss)
        with self._precision.autocast():
            output = self._predict(model, batch, for_loss)
        return self._precision.without_autocast(output)

    def _predict(self, model: nn.Module, batch: MicroBatch, for_loss: bool) -> Any:
        try:
            if for_loss:
                return self.task.predict_with_targets(
                    model, batch.inputs, batch.targets
                )
            return self.task.predict(model, batch.inputs)
        except KINDS as error:
            if isinstance(error, ValueError) and TOO_FEW_VALUES in str(error):
                raise ConfigError(
                    "batch.micro_size",
                    "a micro-batch of one sample leaves BatchNorm one value a channel, which has no variance; raise "
                    "it, or batch.size if this is an epoch's short last step, or set batch_norm.mode=frozen; "
                    "data.bad_samples=quarantine, too, may leave a micro-batch one sample",
                ) from None
            known = shard_misfit(error) or compile_failure(error)
            if known is not None:
                raise known from error
            # Within DDP a lost rank is a RuntimeError, too.
            is_bare = not isinstance(model, nn.parallel.DistributedDataParallel)
            if is_bare and is_misfit(error) and is_from_a_layer(error):
                raise model_misfit(model, batch.inputs, error) from error
            raise


def count_samples(batch: MicroBatch) -> int | None:
    """The number of samples in a batch; None where nobody says and it has no tensor with a row for each."""
    if batch.samples is not None:
        return batch.samples
    for part in (batch.inputs, batch.targets):
        if isinstance(part, Tensor):
            return len(part) if part.dim() else None
        if isinstance(part, Mapping):
            tensor = next(tensors_in(part), None)
            return len(tensor) if tensor is not None and tensor.dim() else None
    return None
