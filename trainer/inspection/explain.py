"""One training step in detail, for learning and for debugging.

Nothing is computed a second way: an observer watches the run's own `train_step`, so the report is what training does.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from trainer.components.optimizer import load_named_state, named_state
from trainer.components.task import WeightedSum
from trainer.config.schema import Config
from trainer.data.batches import MicroBatch
from trainer.errors import DataError
from trainer.exact.batch_norm import named_norm_layers
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.plan import Step
from trainer.exact.structures import dtype_name
from trainer.inspection.autograd_chain import chain
from trainer.inspection.watch import StepWatch
from trainer.trainer import Trainer

MAX_VALUES = 4  # reported of a tensor; and samples reported of a batch
MAX_NUMBERS = 10  # reported of one sample's output or target

Values = dict[str, Any]  # a tensor's shape, L2 norm and first values; plain, for JSON


class StepLesson(StepWatch):
    """A detailed watch that also records the backward of the first micro-batch and the running statistics.

    `statistics` has for each norm layer those `before` the step, `after_first` micro-batch, and `after` the step.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, detailed=True, backwards=True)
        self.chain: list[Values] = []
        self.statistics: dict[str, dict[str, Values]] = {}

    def micro_batch(
        self, step: Step, batch: MicroBatch, output: Any, loss: WeightedSum
    ) -> None:
        if not self.records:
            self.chain = chain(loss.total, self.trainer.module)
            self.note_statistics("after_first")
        super().micro_batch(step, batch, output, loss)

    def note_statistics(self, stage: str) -> None:
        for name, layer in named_norm_layers(self.trainer.module):
            self.statistics.setdefault(name, {})[stage] = _statistics(layer)

    def losses(self) -> list[Values]:
        """Loss sum, weight and mean of each micro-batch."""
        losses = []
        for record in self.records:
            mean = record.loss_sum / record.weight if record.weight else None
            losses.append(
                {"loss_sum": record.loss_sum, "weight": record.weight, "mean": mean}
            )
        return losses

    def gradient_values(self) -> dict[str, dict[str, Values | None]]:
        """Each gradient in a few numbers: `before`, `after_first` and `after_last` backward, `reduced` over ranks."""
        result = {}
        for name, gradients in self.gradients.items():
            result[name] = {
                "before": values(gradients["before"]),
                "after_first": values(gradients["after_first"]),
                "after_last": values(gradients["after_last"]),
                "reduced": values(gradients["applied"]),
            }
        return result

    def update_values(self) -> dict[str, Values]:
        """A few numbers of what the update added to each trained parameter."""
        result = {}
        for name, change in self.changes().items():
            if name not in self.gradients:
                continue
            norm = float(self.weights_before[name].norm())
            numbers = values(change) or {}
            numbers["relative"] = float(change.norm()) / norm if norm else None
            result[name] = numbers
        return result

    def samples(self) -> list[Values]:
        """The first samples of the first micro-batch, each by itself through the run's own loss."""
        if not self.records:
            return []
        record = self.records[0]
        samples: list[Values] = []
        losses = record.sample_losses(self.trainer)
        for row, (loss_sum, weight) in enumerate(losses[:MAX_VALUES]):
            samples.append(
                {
                    "target": _plain_values(record.batch.targets[row]),
                    "output": _plain_values(record.output[row]),
                    "loss_sum": loss_sum,
                    "weight": weight,
                }
            )
        return samples


class Dissection:
    """A run's first step, and the second with and without zero_grad in between. One process; writes no files."""

    def __init__(self, config: Config) -> None:
        data = replace(config.data, workers=0)  # a few samples need no loader processes
        self.trainer = Trainer(replace(config, data=data))

    def report(self) -> dict[str, Any]:
        """The whole report, as plain values."""
        with self.trainer.run.settings():
            return self._report()

    def _report(self) -> dict[str, Any]:
        trainer = self.trainer
        config, precision = trainer.config, trainer.run.precision
        step = trainer.plan.step(0)
        trainer.start()
        first = self._run(step)
        step = trainer.run.remaining(step)
        if not step.size:
            raise DataError("no sample of the first step can be read; repair them")
        return {
            "config": config.run.name,
            "model": config.model.name,
            "parameters": sum(
                parameter.numel() for parameter in trainer.module.parameters()
            ),
            "precision": config.train.precision,
            "reproducibility": config.run.reproducibility,
            "batch": self._batch(step, first),
            "loss": self._loss(step, first),
            "chain": first.chain,
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "optimizer": type(trainer.optimizer).__name__,
            "gradient_scale": 1.0
            if precision.scaler is None
            else precision.scaler.get_scale(),
            "max_grad_norm": config.train.max_grad_norm,
            "grad_norm": first.grad_norm(),
            "gradients": first.gradient_values(),
            "updates": first.update_values(),
            "batch_norm": {
                "momentum_per": config.batch_norm.momentum_per,
                "micro_batches": len(step.micro_batches),
                "layers": first.statistics,
            },
            "without_zero_grad": self._without_zero_grad(first),
        }

    def _run(self, step: Step) -> StepLesson:
        """Train `step` and record it."""
        trainer = self.trainer
        trainer.load_from(step.number - 1)
        with StepLesson(trainer) as lesson:
            lesson.note_statistics("before")
            try:
                trainer.train_step(step)
            finally:
                trainer.batches.close()
            lesson.note_statistics("after")
        return lesson

    def _batch(self, step: Step, lesson: StepLesson) -> dict[str, Any]:
        plan = self.trainer.plan
        ids = [plan.sample_ids(step, index) for index in range(len(step.micro_batches))]
        inputs = self.trainer.run.train_loader.peek(ids[0]).inputs
        is_tensor = isinstance(inputs, Tensor)
        samples: list[Values] = [
            {"id": int(sample_id)} for sample_id in ids[0][:MAX_VALUES]
        ]
        for sample, numbers in zip(samples, lesson.samples(), strict=False):
            sample.update(numbers)  # ids alone, if samples cannot be told apart
        return {
            "size": step.size,
            "micro_batches": [len(part) for part in ids],
            "shape": list(inputs.shape) if is_tensor else None,
            "dtype": dtype_name(inputs.dtype) if is_tensor else None,
            "samples": samples,
        }

    def _loss(self, step: Step, lesson: StepLesson) -> dict[str, Any]:
        """The step's loss, Σ sums ÷ Σ weights, as the meter reads it, and the sizes of an epoch's steps."""
        plan = self.trainer.plan
        last = plan.step(plan.steps_per_epoch - 1)
        return {
            "name": self.trainer.config.loss.name,
            "whole_step": self.trainer.run.task.whole_step,
            "micro_batches": lesson.losses(),
            "mean": self.trainer.meter.read().means().get("loss"),
            "epoch": {
                "steps": plan.steps_per_epoch,
                "step_size": step.size,
                "last_step_size": last.size,
            },
        }

    def _without_zero_grad(self, first: StepLesson) -> dict[str, Any] | None:
        """Each gradient of the `first` and of the `second` step, and what a second step gives that was not preceded by
        zero_grad: `both`. None in a run of one step.
        """
        trainer = self.trainer
        if trainer.plan.total_steps < 2:
            return None
        step = trainer.plan.step(1)
        model_state = copy.deepcopy(trainer.module.state_dict())
        whole = ModelAndLoss(trainer.module, trainer.run.task)
        optimizer_state = copy.deepcopy(named_state(trainer.optimizer, whole))
        second = self._run(step)
        trainer.module.load_state_dict(model_state)
        load_named_state(trainer.optimizer, whole, *optimizer_state)
        self._put_back_gradients(first)
        both = self._run(step)
        result = {}
        for name in first.gradients:
            result[name] = {
                "first": values(first.gradients[name]["applied"]),
                "second": values(second.gradients[name]["applied"]),
                "both": values(both.gradients[name]["applied"]),
            }
        return result

    def _put_back_gradients(self, lesson: StepLesson) -> None:
        """Leave the gradients as they were when the recorded step's update applied them."""
        gradients = lesson.applied_gradients()
        for name, parameter in self.trainer.module.named_parameters():
            if name in gradients:
                # The backward adds to it in place.
                parameter.grad = gradients[name].clone()
            elif name in lesson.gradients:
                parameter.grad = None


def values(tensor: Tensor | None) -> Values | None:
    """A tensor's shape, norm and first values; None for None, which a gradient is before the first backward."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    return {
        "shape": list(tensor.shape),
        "norm": float(tensor.double().norm()),
        "first": tensor.reshape(-1)[:MAX_VALUES].tolist(),
    }


def _statistics(layer: _NormBase) -> Values:
    counter = layer.num_batches_tracked
    return {
        "mean": values(layer.running_mean),
        "var": values(layer.running_var),
        "batches": None if counter is None else int(counter),
        "momentum": layer.momentum,
    }


def _plain_values(tensor: Tensor) -> Any:
    """The number of a 0-dim tensor, or the first numbers of any other one."""
    if tensor.dim() == 0:
        return tensor.item()
    return tensor.reshape(-1)[:MAX_NUMBERS].tolist()
