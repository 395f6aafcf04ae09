"""One training step taken apart, for learning and for debugging.

Nothing is computed a second way: an observer watches the run's own `train_step`. What is reported is what training
does.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from trainer.components.task import WeightedSum
from trainer.config.schema import Config
from trainer.data.samples import MicroBatch
from trainer.exact.batch_norm import named_norm_layers
from trainer.exact.plan import Step
from trainer.inspection.autograd_chain import chain
from trainer.inspection.watch import StepWatch
from trainer.trainer import Trainer

MOST_VALUES = 4  # of a tensor, and samples of a batch
MOST_NUMBERS = 10  # of one sample's output or target

Values = dict[str, Any]  # a tensor's shape, L2 norm and first values; plain, for JSON


class StepLesson(StepWatch):
    """A detailed watch that also follows the backward of the first micro-batch and the running statistics.

    `statistics` has for each norm layer those `before` the step, `after_first` micro-batch, and `after` the step.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, detailed=True, backwards=True)
        self.chain: list[Values] = []
        self.statistics: dict[str, dict[str, Values]] = {}

    def micro_batch(self, step: Step, batch: MicroBatch, output: Any, loss: WeightedSum) -> None:
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
            losses.append({"loss_sum": record.loss_sum, "weight": record.weight, "mean": mean})
        return losses

    def gradient_values(self) -> dict[str, dict[str, Values | None]]:
        """Of each parameter's gradient, a few numbers `before`, `after_first` and `after_last` backward, `reduced`."""
        result = {}
        for name, stages in self.gradients.items():
            result[name] = {stage: values(gradient) for stage, gradient in stages.items()}
            result[name]["reduced"] = result[name].pop("applied")
        return result

    def update_values(self) -> dict[str, Values]:
        """Of what the update added to each trained parameter, a few numbers."""
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
        for row in range(MOST_VALUES):
            loss = record.sample_loss(self.trainer, row)
            if loss is None:
                break
            sample = {"target": _plain(record.batch.targets[row]), "output": _plain(record.output[row])}
            samples.append({**sample, "loss_sum": loss[0], "weight": loss[1]})
        return samples


class Dissection:
    """A run's first step, and the second with and without zero_grad between them: on one process, nothing written."""

    def __init__(self, config: Config) -> None:
        # A few samples need no loader processes.
        self.trainer = Trainer(replace(config, data=replace(config.data, workers=0)))

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
        return {
            "config": config.run.name,
            "model": config.model.name,
            "parameters": sum(parameter.numel() for parameter in trainer.module.parameters()),
            "precision": config.train.precision,
            "reproducibility": config.run.reproducibility,
            "batch": self._batch(step, first),
            "loss": self._loss(step, first),
            "chain": first.chain,
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "optimizer": type(trainer.optimizer).__name__,
            "gradient_scale": 1.0 if precision.scaler is None else precision.scaler.get_scale(),
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
        """Do `step`, watched."""
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
        samples: list[Values] = [{"id": int(sample_id)} for sample_id in ids[0][:MOST_VALUES]]
        for sample, numbers in zip(samples, lesson.samples(), strict=False):
            sample.update(numbers)
        return {
            "size": step.size,
            "micro_batches": [len(part) for part in ids],
            "shape": list(inputs.shape) if is_tensor else None,
            "dtype": str(inputs.dtype).removeprefix("torch.") if is_tensor else None,
            "samples": samples,
        }

    def _loss(self, step: Step, lesson: StepLesson) -> dict[str, Any]:
        """The step's loss, Σ sums ÷ Σ weights, as the meter reads it, and the sizes of an epoch's steps."""
        plan = self.trainer.plan
        last = plan.step(plan.steps_per_epoch - 1)
        return {
            "name": self.trainer.config.loss.name,
            "micro_batches": lesson.losses(),
            "mean": self.trainer.meter.read().means().get("loss"),
            "epoch": {"steps": plan.steps_per_epoch, "step_size": step.size, "last_step_size": last.size},
        }

    def _without_zero_grad(self, first: StepLesson) -> dict[str, Any] | None:
        """The second step's gradient as it is, and as it is where the first one's was left; None in a run of one."""
        trainer = self.trainer
        if trainer.plan.total_steps < 2:
            return None
        state = copy.deepcopy((trainer.module.state_dict(), trainer.optimizer.state_dict()))
        second = self._run(trainer.plan.step(1))
        trainer.module.load_state_dict(state[0])
        trainer.optimizer.load_state_dict(state[1])
        first_gradients = first.applied_gradients()
        for name, parameter in trainer.module.named_parameters():
            if name in first_gradients:
                parameter.grad = first_gradients[name].clone()  # the backward adds to it in place
            elif name in first.gradients:
                parameter.grad = None
        stale = self._run(trainer.plan.step(1))
        result = {}
        for name in first.gradients:
            lessons = {"first": first, "second": second, "both": stale}
            result[name] = {key: values(lesson.gradients[name]["applied"]) for key, lesson in lessons.items()}
        return result


def values(tensor: Tensor | None) -> Values | None:
    """A tensor in a few plain numbers; None for None, which a gradient is before the first backward."""
    if tensor is None:
        return None
    first = tensor.detach().reshape(-1)[:MOST_VALUES].tolist()
    return {"shape": list(tensor.shape), "norm": float(tensor.detach().double().norm()), "first": first}


def _statistics(layer: _NormBase) -> Values:
    counter = layer.num_batches_tracked
    return {
        "mean": values(layer.running_mean),
        "var": values(layer.running_var),
        "batches": None if counter is None else int(counter),
        "momentum": layer.momentum,
    }


def _plain(tensor: Tensor) -> Any:
    """A number, or a few of a flat list."""
    return tensor.item() if tensor.dim() == 0 else tensor.reshape(-1)[:MOST_NUMBERS].tolist()
