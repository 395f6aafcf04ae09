"""What a run minimises and measures: the extension point for losses and metrics.

A task gives the *sum* of the loss over a micro-batch and the weight of its targets; the step divides once, by
the weight of the whole step over all ranks. That is right for short last steps, uneven micro-batches, ignored
targets and class weights alike, where an average of averages is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.registry import build, resolve
from trainer.config.schema import LossConfig
from trainer.errors import ConfigError, DataError

# A sum and what it is to be divided by: an int is a count that is the same for every sample (so that it is
# known for the whole step beforehand), a 0-dim tensor one that depends on the targets' values.
Sum = tuple[Tensor, Tensor | int]


class Task(nn.Module):
    """A loss and its metrics. Subclass it, implement `loss_sum`, and name the class in `loss.name`.

    The section's other keys are the constructor's arguments; `num_classes` is supplied if it asks for it.
    Tensors that the loss needs (class weights) are buffers, so that they follow the run's device and dtype.
    `metrics` names what `metric_sums` gives, in its order: a metric `accuracy` is logged as `val/accuracy`.
    """

    metrics: tuple[str, ...] = ()
    ignore_index: int | None = None  # targets of this value count nowhere; None: every target counts

    def __init__(self) -> None:  # nn.Module's own takes any keyword, and refuses each
        super().__init__()

    def predict(self, model: nn.Module, inputs: Any) -> Any:
        """The model's output for a micro-batch. Override it for models that return more than one tensor."""
        return model(inputs)

    def loss_sum(self, output: Any, targets: Any) -> Sum:
        """The loss summed over the targets, a 0-dim tensor with its graph, and the targets' total weight."""
        raise NotImplementedError

    def metric_sums(self, output: Any, targets: Any) -> dict[str, Sum]:
        """Sums of further metrics by name, each with what divides it. `output` is detached."""
        return {}

    def probabilities(self, output: Any) -> Tensor | None:
        """For a classifier of whole samples, the probability of each class, `(N, C)`; None for other tasks."""
        return None


class CrossEntropy(Task):
    """Classification of samples `(N, C)` or pixels `(N, C, H, W)`; targets are class ids, or probabilities.

    Args:
        class_weights: one weight a class; the loss is then the weighted mean, as in `torch.nn.CrossEntropyLoss`.
        ignore_index: targets of this value count nowhere. None: every target counts.
        label_smoothing: share of the target spread over all classes (Szegedy et al., 2016), in [0, 1).
        top_k: further accuracies to measure, by k.
    """

    def __init__(
        self,
        class_weights: Sequence[float] | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        top_k: Sequence[int] = (),
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ConfigError("loss.label_smoothing", f"{label_smoothing} is not in [0, 1)")
        if class_weights is not None and num_classes is not None and len(class_weights) != num_classes:
            raise ConfigError("loss.class_weights", f"{len(class_weights)} weights for {num_classes} classes")
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)
        self.register_buffer("class_weights", weights, persistent=False)
        self.class_weights: Tensor | None
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.top_k = tuple(top_k)
        self.metrics = ("accuracy", *(f"top{k}_accuracy" for k in self.top_k))

    def loss_sum(self, output: Tensor, targets: Tensor) -> Sum:
        if not isinstance(output, Tensor):
            raise ConfigError(
                "loss.name",
                f"cross_entropy needs one tensor of scores, and the model gives a {type(output).__name__}; "
                "name a Task of your own, whose `predict` picks the tensor",
            )
        try:
            total = F.cross_entropy(
                output,
                targets,
                self.class_weights,
                ignore_index=-(2**31) if self.ignore_index is None else self.ignore_index,  # torch's -100 hides labels
                label_smoothing=self.label_smoothing,
                reduction="sum",
            )
        except IndexError as error:  # on the CPU, that is
            raise DataError(
                f"{str(error).rstrip('.').lower()}: the model gives {output.shape[1]} classes, 0 to "
                f"{output.shape[1] - 1}; correct the data, or set model.num_classes or loss.ignore_index"
            ) from None
        return total, self._weight(targets)

    def _weight(self, targets: Tensor) -> Tensor | int:
        if targets.is_floating_point():
            return targets.numel() // targets.shape[1]
        if self.ignore_index is None:
            return targets.numel() if self.class_weights is None else self.class_weights[targets].sum()
        counted = targets != self.ignore_index
        return counted.sum() if self.class_weights is None else self.class_weights[targets[counted]].sum()

    def metric_sums(self, output: Tensor, targets: Tensor) -> dict[str, Sum]:
        labels = targets.argmax(1) if targets.is_floating_point() else targets
        count: Tensor | int = labels.numel() if self.ignore_index is None else (labels != self.ignore_index).sum()
        sums: dict[str, Sum] = {"accuracy": ((output.argmax(1) == labels).sum(), count)}
        for k in self.top_k:
            best = output.topk(min(k, output.shape[1]), 1).indices
            sums[f"top{k}_accuracy"] = ((best == labels.unsqueeze(1)).sum(), count)
        return sums

    def probabilities(self, output: Tensor) -> Tensor | None:
        return output.softmax(1) if output.dim() == 2 else None


class Regression(Task):
    """A loss between outputs and targets of one shape, given by `loss(output, target)`, a 0-dim sum."""

    metrics = ("mae",)

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._loss = loss

    def loss_sum(self, output: Tensor, targets: Tensor) -> Sum:
        return self._loss(output, like(output, targets)), output.numel()

    def metric_sums(self, output: Tensor, targets: Tensor) -> dict[str, Sum]:
        return {"mae": ((output - like(output, targets)).abs().sum(dtype=torch.float64), output.numel())}


class MSE(Regression):
    """Mean squared error over all elements; the metric is the mean absolute error."""

    def __init__(self) -> None:
        super().__init__(lambda output, target: F.mse_loss(output, target, reduction="sum"))


class BCEWithLogits(Task):
    """Binary cross-entropy of logits over all elements: one, or one a label, for each sample.

    Args:
        pos_weight: weight of the positive examples, one a label, as in `torch.nn.BCEWithLogitsLoss`.
    """

    metrics = ("accuracy",)

    def __init__(self, pos_weight: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = None if pos_weight is None else torch.tensor(pos_weight, dtype=torch.float64)
        self.register_buffer("pos_weight", weights, persistent=False)
        self.pos_weight: Tensor | None

    def loss_sum(self, output: Tensor, targets: Tensor) -> Sum:
        total = F.binary_cross_entropy_with_logits(
            output, like(output, targets), pos_weight=self.pos_weight, reduction="sum"
        )
        return total, output.numel()

    def metric_sums(self, output: Tensor, targets: Tensor) -> dict[str, Sum]:
        return {"accuracy": (((output > 0) == (like(output, targets) > 0.5)).sum(), output.numel())}


def like(output: Tensor, targets: Tensor) -> Tensor:
    """Targets in the output's shape and dtype; `(N,)` against `(N, 1)` would broadcast to `(N, N)`, silently."""
    if output.numel() != targets.numel():
        raise ConfigError(
            "loss.name",
            f"the model gives {tuple(output.shape)} for targets of shape {tuple(targets.shape)}; "
            f"set model.num_classes to the number of values in a target, or use another loss",
        )
    return targets.reshape(output.shape).to(output.dtype)


TASKS: Mapping[str, Callable[..., Task]] = {
    "cross_entropy": CrossEntropy,
    "mse": MSE,
    "bce_with_logits": BCEWithLogits,
}


def build_task(section: LossConfig, num_classes: int | None) -> Task:
    """The task that `loss.name` names: short, a `Task`, or a loss of `torch.nn` between equal shapes.

    The short ones and torch's may be given torch's `reduction`, mean or sum. Either is the same run: a task sums, and
    the step divides once, by all its targets. (The mean of a micro-batch without any counted target would be NaN.)
    """
    target = resolve("loss", section.name, TASKS)
    of_torch = isinstance(target, type) and issubclass(target, nn.Module) and not issubclass(target, Task)
    args = dict(section.args)
    if of_torch or section.name in TASKS:
        _check_reduction(args.pop("reduction", "sum"))
    if of_torch:
        return Regression(build("loss", target, args, reduction="sum"))
    task = build("loss", target, args, num_classes=num_classes)
    if not isinstance(task, Task):
        raise ConfigError("loss.name", f'"{section.name}" is neither a trainer.Task nor a loss module of torch.nn')
    return task


def _check_reduction(reduction: Any) -> None:
    if reduction not in ("mean", "sum"):
        raise ConfigError(
            "loss.reduction", f'"{reduction}" is not one of mean, sum, of which the step makes the same; leave it out'
        )
