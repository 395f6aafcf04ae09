"""One training step on one process, recorded: inputs, outputs, losses, gradients, the change of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer.components.task import Task, WeightedSum
from trainer.core.metrics import detach
from trainer.core.mix import blended_loss
from trainer.core.observers import Observer
from trainer.data.batches import MicroBatch
from trainer.exact.batch_norm import named_norm_layers
from trainer.exact.plan import Step
from trainer.exact.structures import dtype_name
from trainer.process.device import check_fp64_analysis
from trainer.trainer import Trainer

Numbers = dict[str, float]
Stages = dict[str, Tensor | None]

SUM_TOLERANCE = 1e-2  # each number of bf16 is rounded by up to 2^-8 of it


@dataclass
class MicroBatchRecord:
    """A micro-batch and its result. `output` is detached."""

    batch: MicroBatch
    output: Any
    loss_sum: float
    weight: float

    def sample_losses(self, trainer: Trainer) -> list[tuple[float, float]]:
        """Loss sum and weight of each sample by itself; [] if output and targets have no row for each.

        Also [] where they do not add up to the micro-batch's: a loss that compares samples has no part for each.
        """
        output, targets = self.output, self.batch.targets
        if not isinstance(output, Tensor) or not isinstance(targets, Tensor):
            return []
        if len(output) != len(targets):
            return []
        losses = []
        for row in range(len(targets)):
            one = slice(row, row + 1)
            try:
                with torch.no_grad():
                    total, weight = self._loss(trainer.run.task, one)
            except (RuntimeError, ValueError, IndexError):
                return []  # as from a loss that needs two samples
            losses.append((float(total), float(weight)))
        sums = [sum(values) for values in zip(*losses, strict=True)]
        expected = [self.loss_sum, self.weight]
        return losses if _are_close(sums, expected) else []

    def _loss(self, task: Task, rows: slice) -> tuple[Tensor, Tensor | int]:
        batch = self.batch
        if batch.blend is None:
            return task.loss_sum(self.output[rows], batch.targets[rows])
        return blended_loss(task, self.output[rows], batch.blend.rows(rows))


class StepWatch(Observer):
    """Records the steps of `trainer` within a `with` block, without changing them. Waits for the device.

    `records` has the micro-batches. With `detailed`, also:

    - `gradients`: for each trained parameter a copy as `applied` by the update, None if it had none; with `backwards`
      also `before` the step, `after_first` and `after_last` backward;
    - `weights_before`: copies of all parameters;
    - `layers`: for the output of each module without submodules the least and largest finite value, and the share
      that is finite;
    - `norm_inputs`: for the inputs of each norm layer the least and largest mean and variance of a channel.
    """

    def __init__(
        self, trainer: Trainer, *, detailed: bool, backwards: bool = False
    ) -> None:
        if detailed:
            check_fp64_analysis(trainer.ranks.device)
        self.trainer = trainer
        self._detailed = detailed
        self._backwards = backwards
        self._handles: list[RemovableHandle] = []
        self.records: list[MicroBatchRecord] = []
        self.gradients: dict[str, Stages] = {}
        self.weights_before: dict[str, Tensor] = {}
        self.layers: dict[str, Numbers] = {}
        self.norm_inputs: dict[str, Numbers] = {}

    def __enter__(self) -> Self:
        self.trainer.observers.add(self)
        if self._detailed:
            self._copy_weights()
            self._attach_hooks()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.trainer.observers.remove(self)
        for handle in self._handles:
            handle.remove()

    # ---------------------------------------------------------------- results

    def loss(self) -> float:
        """The mean loss over the step's targets; NaN if there are none."""
        weight = math.fsum(record.weight for record in self.records)
        total = math.fsum(record.loss_sum for record in self.records)
        return total / weight if weight else math.nan

    def is_finite(self) -> bool:
        """True if the loss of every micro-batch is a finite number."""
        return all(math.isfinite(record.loss_sum) for record in self.records)

    def grad_norm(self) -> float:
        """The L2 norm of the step's gradient before clipping; NaN if there was no gradient."""
        is_clipped = self.trainer.config.train.max_grad_norm is not None
        if is_clipped and self.trainer.grad_norm is not None:
            return float(self.trainer.grad_norm)
        gradients = self.applied_gradients()
        if not gradients:
            return math.nan
        return math.hypot(
            *(float(gradient.double().norm()) for gradient in gradients.values())
        )

    def applied_gradients(self) -> dict[str, Tensor]:
        """The gradient of each parameter that had one, as the update applied it."""
        gradients = {}
        for name, stages in self.gradients.items():
            gradient = stages["applied"]
            if gradient is not None:
                gradients[name] = gradient
        return gradients

    def changes(self) -> dict[str, Tensor]:
        """What the update added to each parameter."""
        changes = {}
        for name, parameter in self.trainer.module.named_parameters():
            if name in self.weights_before:
                changes[name] = parameter.detach() - self.weights_before[name]
        return changes

    # ---------------------------------------------------------------- recording

    def micro_batch(
        self, step: Step, batch: MicroBatch, output: Any, loss: WeightedSum
    ) -> None:
        record = MicroBatchRecord(
            batch, detach(output), loss_sum=loss.total.item(), weight=float(loss.weight)
        )
        self.records.append(record)

    def gradient(self, step: Step) -> None:
        for name, parameter in self.trainer.module.named_parameters():
            if name in self.gradients:
                self.gradients[name]["applied"] = _copy(parameter.grad)

    def _copy_weights(self) -> None:
        for name, parameter in self.trainer.module.named_parameters():
            self.weights_before[name] = parameter.detach().clone()
            if parameter.requires_grad:
                self.gradients[name] = {
                    "before": _copy(parameter.grad),
                    "after_first": None,
                    "after_last": None,
                    "applied": None,
                }

    def _attach_hooks(self) -> None:
        module = self.trainer.module
        if self._backwards:
            self._attach_gradient_hooks()
        for name, layer in module.named_modules():
            if not any(layer.children()):
                handle = layer.register_forward_hook(self._output_hook(name))
                self._handles.append(handle)
        for name, layer in named_norm_layers(module):
            handle = layer.register_forward_pre_hook(self._norm_input_hook(name))
            self._handles.append(handle)

    def _attach_gradient_hooks(self) -> None:
        for name, parameter in self.trainer.module.named_parameters():
            if name in self.gradients:
                hook = self._gradient_hook(name)
                handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    def _gradient_hook(self, name: str) -> Callable[[Tensor], None]:
        def record(parameter: Tensor) -> None:
            stages = self.gradients[name]
            stages["after_last"] = _copy(parameter.grad)
            if not self.records:  # the first micro-batch is recorded after its backward
                stages["after_first"] = stages["after_last"]

        return record

    def _output_hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(layer: nn.Module, inputs: Any, output: Any) -> None:
            if (
                not isinstance(output, Tensor)
                or not output.is_floating_point()
                or not output.numel()
            ):
                return
            values = output.detach().double()
            is_finite = values.isfinite()
            finite_values = (
                values[is_finite] if is_finite.any() else values.new_zeros(1)
            )
            numbers = {
                "least": finite_values.min().item(),
                "largest": finite_values.max().item(),
                "least_finite_share": is_finite.double().mean().item(),
            }
            _merge(self.layers, name, numbers)

        return record

    def _norm_input_hook(
        self, name: str
    ) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            by_channel = inputs[0].detach().double().transpose(0, 1).flatten(1)
            mean = by_channel.mean(1)
            variance = by_channel.var(1, correction=0)
            numbers = {
                "least_mean": mean.min().item(),
                "largest_mean": mean.max().item(),
                "least_var": variance.min().item(),
                "largest_var": variance.max().item(),
            }
            _merge(self.norm_inputs, name, numbers)

        return record


def describe(tensor: Tensor) -> str:
    """A tensor of many numbers in one line: its shape, its least and its largest value."""
    shape = " × ".join(map(str, tensor.shape))
    dtype = dtype_name(tensor.dtype)
    if not tensor.numel():
        return f"{dtype} {shape}"
    values = tensor.double()
    return f"{dtype} {shape}, {values.min():g} to {values.max():g}"


def _are_close(numbers: list[float], expected: list[float]) -> bool:
    """True up to rounding in bf16. A sum that is not finite is close to every other."""
    for number, other in zip(numbers, expected, strict=True):
        is_finite = math.isfinite(number) and math.isfinite(other)
        if is_finite and not math.isclose(
            number, other, rel_tol=SUM_TOLERANCE, abs_tol=SUM_TOLERANCE
        ):
            return False
    return True


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _merge(numbers_of: dict[str, Numbers], name: str, numbers: Numbers) -> None:
    """Add another micro-batch to a layer's numbers: the least of `least…`, the largest of `largest…`."""
    merged = numbers_of.setdefault(name, {})
    for key, value in numbers.items():
        choose = min if key.startswith("least") else max
        merged[key] = choose(value, merged.get(key, value))
