"""What a run minimises and measures: the extension point for losses and metrics.

A task gives the *sum* of the loss over a micro-batch and the weight of its targets. The step divides once, by the
weight of the whole step over all ranks. That is right for short last steps, uneven micro-batches, ignored targets and
class weights, where a mean of means is not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.components.answers import Answer
from trainer.components.torch_losses import (
    REGRESSION,
    LossRule,
    check_class,
    check_loss,
    check_reduction,
    is_unchanged,
    rule_of,
    summed,
)
from trainer.config.registry import build, resolve
from trainer.config.schema import LossConfig
from trainer.errors import ConfigError, DataError
from trainer.process.device import sum_dtype

# An ignore_index that no target has; torch's default of -100 would hide wrong labels.
NO_LABEL = -(2**31)


class WeightedSum(NamedTuple):
    """A sum over targets, and the weight to divide it by once it is added up over a step, an epoch, all ranks.

    `weight` is an int where every sample weighs the same, so that a step's weight is known before it is run. It is a
    0-dim tensor, on the output's device, where it depends on the targets' values (class weights, ignored targets).
    """

    total: Tensor
    weight: Tensor | int


def as_weighted_sum(pair: Any) -> WeightedSum:
    """What a task's `loss_sum` returned, as a `WeightedSum`: a plain pair will do.

    Raises `ConfigError` for anything else, such as a mean without its weight.
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ConfigError(
            "loss.name",
            f"loss_sum returned a {type(pair).__name__}; return trainer.WeightedSum(total, weight): the loss summed "
            f"over the targets, and what to divide it by",
        )
    total, weight = pair
    if not isinstance(total, Tensor) or total.dim() > 0:
        kind = (
            f"tensor {tuple(total.shape)}"
            if isinstance(total, Tensor)
            else type(total).__name__
        )
        raise ConfigError(
            "loss.name",
            f"loss_sum returned a {kind} as the total; sum it to a 0-dim tensor",
        )
    if not isinstance(weight, int | Tensor):
        raise ConfigError(
            "loss.name",
            f"loss_sum returned a {type(weight).__name__} as the weight; give an int or a 0-dim tensor",
        )
    return WeightedSum(total, weight)


class Task(nn.Module):
    """A loss and its metrics. Subclass it, implement `loss_sum`, and name the class in `loss.name`.

    The section's other keys are the constructor's arguments; `num_classes` is supplied if the constructor takes it.
    Tensors that the loss needs (class weights) are buffers, so that they follow the run's device and dtype.
    `metrics` names what `metric_sums` returns, in its order: a metric `accuracy` is logged as `val/accuracy`.
    """

    metrics: tuple[str, ...] = ()
    # Targets with this value are not counted; None: every target is.
    ignore_index: int | None = None

    def __init__(self) -> None:  # nn.Module's own takes any keyword, and refuses each
        super().__init__()

    def predict(self, model: nn.Module, inputs: Any) -> Any:
        """The model's output for a micro-batch. Override it for models that return more than one tensor."""
        return model(inputs)

    def loss_sum(self, output: Any, targets: Any) -> tuple[Tensor, Tensor | int]:
        """A `WeightedSum`: the loss summed over the targets, with its graph, and the targets' total weight."""
        raise NotImplementedError

    def metric_sums(
        self, output: Any, targets: Any
    ) -> Mapping[str, tuple[Tensor, Tensor | int]]:
        """A `WeightedSum` for each of `metrics`, by name. `output` is detached."""
        return {}

    def probabilities(self, output: Any) -> Tensor | None:
        """For a classifier of whole samples, the probability of each class, `(N, C)`; None for other tasks."""
        return None

    def answer(self, output: Any) -> Answer | None:
        """What `predict` and an exported program answer; None where that is not known. By default `probabilities`."""
        probabilities = self.probabilities(output)
        return None if probabilities is None else Answer("class", probabilities)


class CrossEntropy(Task):
    """Classification of samples `(N, C)` or pixels `(N, C, H, W)`; targets are class ids, or probabilities.

    Args:
        class_weights: one weight per class; the loss is then the weighted mean, as in `torch.nn.CrossEntropyLoss`.
        ignore_index: targets with this value are not counted. None: every target is.
        label_smoothing: share of the target spread over all classes (Szegedy et al., 2016), in [0, 1).
        top_k: further accuracies to measure, by k.
    """

    def __init__(
        self,
        class_weights: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        top_k: Sequence[int] = (),
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ConfigError(
                "loss.label_smoothing", f"{label_smoothing} is not in [0, 1)"
            )
        _check_class_weights("loss.class_weights", class_weights, num_classes)
        self.register_buffer(
            "class_weights", _as_weights(class_weights), persistent=False
        )
        self.class_weights: Tensor | None
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.top_k = tuple(top_k)
        self.metrics = ("accuracy", *(f"top{k}_accuracy" for k in self.top_k))

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        if not isinstance(output, Tensor):
            raise ConfigError(
                "loss.name",
                f"cross_entropy needs one tensor of scores, and the model gives a {type(output).__name__}; "
                "name a Task of your own, whose `predict` picks the tensor",
            )
        scores, labels = _pixels_as_samples(output, targets)
        try:
            total = self._total(
                scores,
                labels,
                NO_LABEL if self.ignore_index is None else self.ignore_index,
            )
        except IndexError as error:
            # On the CPU only: a GPU reports a wrong label as a failed assertion.
            raise DataError(
                f"{str(error).rstrip('.').lower()}: the model gives {output.shape[1]} classes, 0 to "
                f"{output.shape[1] - 1}; correct the data, or set model.num_classes or loss.ignore_index"
            ) from None
        return WeightedSum(total, self._weight(targets))

    def _total(self, output: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        return F.cross_entropy(
            output,
            targets,
            self.class_weights,
            ignore_index=ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )

    def _weight(self, targets: Tensor) -> Tensor | int:
        """What torch's mean divides by: a count of targets, or the sum of their classes' weights."""
        # Probabilities: torch divides by the samples (pixels), weighted or not.
        if targets.is_floating_point():
            return targets.numel() // targets.shape[1]
        if self.ignore_index is None:
            return (
                targets.numel()
                if self.class_weights is None
                else self.class_weights[targets].sum()
            )
        is_counted = targets != self.ignore_index
        if self.class_weights is None:
            return is_counted.sum()
        # Not `targets[is_counted]`: the length of a selection is known to the host only once the device is done.
        weights = self.class_weights[targets.where(is_counted, 0)]
        return weights.where(is_counted, 0).sum()

    def metric_sums(self, output: Tensor, targets: Tensor) -> dict[str, WeightedSum]:
        labels = targets.argmax(1) if targets.is_floating_point() else targets
        count: Tensor | int = (
            labels.numel()
            if self.ignore_index is None
            else (labels != self.ignore_index).sum()
        )
        sums = {"accuracy": WeightedSum((output.argmax(1) == labels).sum(), count)}
        for k in self.top_k:
            best = output.topk(min(k, output.shape[1]), 1).indices
            sums[f"top{k}_accuracy"] = WeightedSum(
                (best == labels.unsqueeze(1)).sum(), count
            )
        return sums

    def probabilities(self, output: Tensor) -> Tensor | None:
        return self._normalized(output) if output.dim() == 2 else None

    def answer(self, output: Tensor) -> Answer | None:
        if output.dim() < 3:
            return super().answer(output)
        return Answer("class_map", self._normalized(output))

    def _normalized(self, output: Tensor) -> Tensor:
        return output.softmax(1)


class NegativeLogLikelihood(CrossEntropy):
    """Classification by log-probabilities, as `torch.nn.NLLLoss`: for models that end in a log-softmax."""

    def _total(self, output: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        return F.nll_loss(
            output,
            targets,
            self.class_weights,
            ignore_index=ignore_index,
            reduction="sum",
        )

    def _normalized(self, output: Tensor) -> Tensor:
        return output.exp()


class ElementLoss(Task):
    """A loss `loss(output, targets)` that gives a 0-dim sum, divided and measured as its `rule` says."""

    def __init__(
        self, loss: Callable[[Tensor, Tensor], Tensor], rule: LossRule
    ) -> None:
        super().__init__()
        self._loss = loss
        self._rule = rule
        self.metrics = () if rule.metric is None else (rule.metric,)

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        return WeightedSum(
            self._loss(output, self._matched(output, targets)),
            self._rule.divisor(output),
        )

    def metric_sums(self, output: Tensor, targets: Tensor) -> dict[str, WeightedSum]:
        rule = self._rule
        if rule.metric is None or rule.terms is None:
            return {}
        # A metric adds up over a whole epoch.
        terms = rule.terms(self._loss, output, self._matched(output, targets))
        total = terms.sum(dtype=sum_dtype(terms.device))
        return {rule.metric: WeightedSum(total, terms.numel())}

    def answer(self, output: Tensor) -> Answer | None:
        rule = self._rule
        if rule.answer is None or rule.answer_kind is None:
            return None
        return Answer(rule.answer_kind, rule.answer(self._loss, output))

    def _matched(self, output: Tensor, targets: Tensor) -> Tensor:
        return targets if self._rule.takes_class_ids else match_targets(output, targets)


class Regression(ElementLoss):
    """A loss between outputs and targets of one shape, given by `loss(output, target)`, a 0-dim sum."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(loss, REGRESSION)


class MSE(Regression):
    """Mean squared error over all elements; the metric is the mean absolute error."""

    def __init__(self) -> None:
        super().__init__(nn.MSELoss(reduction="sum"))


class BCEWithLogits(ElementLoss):
    """Binary cross-entropy of logits over all elements: one, or one per label, for each sample.

    Args:
        pos_weight: weight of the positive examples, one per label, as in `torch.nn.BCEWithLogitsLoss`.
    """

    def __init__(self, pos_weight: Sequence[float] | None = None) -> None:
        loss = nn.BCEWithLogitsLoss(pos_weight=_as_weights(pos_weight), reduction="sum")
        super().__init__(loss, rule_of(loss))


def _pixels_as_samples(output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Scores `(N, C, H, W)` and labels `(N, H, W)` as `(N·H·W, C)` and `(N·H·W,)`, for deterministic algorithms alone.

    CUDA has no deterministic kernel for a negative log-likelihood of images, and has one for that of samples.
    """
    if (
        output.dim() < 3
        or targets.is_floating_point()
        or not torch.are_deterministic_algorithms_enabled()
    ):
        return output, targets
    if output.shape[:1] + output.shape[2:] != targets.shape:
        return output, targets  # torch says what does not fit
    return output.movedim(1, -1).flatten(0, -2), targets.flatten()


def match_targets(output: Tensor, targets: Tensor) -> Tensor:
    """Targets in the output's shape and dtype; `(N,)` against `(N, 1)` would broadcast to `(N, N)`, silently."""
    if not isinstance(output, Tensor):
        raise ConfigError(
            "loss.name",
            f"this loss needs one tensor, and the model gives a {type(output).__name__}; name a Task of your own, "
            f"whose `predict` picks the tensor",
        )
    if output.numel() != targets.numel():
        raise ConfigError(
            "loss.name",
            f"the model gives {tuple(output.shape)} for targets of shape {tuple(targets.shape)}, and this loss needs "
            f"as many values in both; set model.num_classes to the number of values in a target, or use another loss: "
            f"cross_entropy if the targets are class ids",
        )
    return targets.reshape(output.shape).to(output.dtype)


TASKS: Mapping[str, Callable[..., Task]] = {
    "cross_entropy": CrossEntropy,
    "mse": MSE,
    "bce_with_logits": BCEWithLogits,
}


def as_task(loss: object, num_classes: int | None = None) -> Task:
    """The task that `loss` stands for: a `Task`, a loss module such as `torch.nn.CrossEntropyLoss()`, or a name.

    A name is one for `loss.name`, alone or in a `LossConfig` with its arguments. A module is copied, and its loss is
    what its own mean over a whole step would be. Raises `ConfigError` for anything else.
    """
    if isinstance(loss, str):
        loss = LossConfig(name=loss)
    if isinstance(loss, LossConfig):
        return build_task(loss, num_classes)
    if isinstance(loss, Task):
        return loss
    if isinstance(loss, nn.Module):
        return _task_of_module(loss, num_classes)
    if isinstance(loss, type):
        problem = (
            f"{loss.__name__} is a class; give an object of it, {loss.__name__}(…)"
        )
    else:
        name = getattr(loss, "__name__", repr(loss))
        problem = (
            f"{name} is a {type(loss).__name__}; give a trainer.Task or a loss such as "
            f"torch.nn.CrossEntropyLoss()"
        )
    raise ConfigError("task", problem)


def build_task(section: LossConfig, num_classes: int | None) -> Task:
    """The task that `loss.name` names: a short name, or an import path to a `Task` or a loss module of torch.nn.

    The short ones and modules may be given torch's `reduction`, mean or sum. Either is the same run: a task sums, and
    the step divides once, by all its targets. (The mean of a micro-batch without any counted target would be NaN.)
    """
    target = resolve("loss", section.name, TASKS)
    arguments = dict(section.args)
    if section.name in TASKS:
        check_reduction(arguments.pop("reduction", "sum"))
    elif (
        isinstance(target, type)
        and issubclass(target, nn.Module)
        and not issubclass(target, Task)
    ):
        return _task_of_module(_build_module(target, arguments), num_classes)
    task = build("loss", target, arguments, num_classes=num_classes)
    if not isinstance(task, nn.Module):
        raise ConfigError(
            "loss.name",
            f'"{section.name}" is neither a trainer.Task nor a loss module of torch.nn',
        )
    return as_task(task, num_classes)


def _build_module(cls: type[nn.Module], arguments: dict[str, Any]) -> Any:
    check_class(cls)
    for name in ("weight", "pos_weight"):
        if isinstance(arguments.get(name), list):  # YAML has no tensors
            arguments[name] = _as_weights(arguments[name])
    if "reduction" not in inspect.signature(cls).parameters:
        return build("loss", cls, arguments)
    # Set when it is built, because a loss may pass it on to one inside, where it cannot be changed later.
    if arguments.get("reduction", "mean") == "mean":
        arguments["reduction"] = "sum"
    loss = build("loss", cls, arguments)
    if not hasattr(loss, "reduction"):  # it passes the reduction on to a loss inside
        loss.reduction = arguments["reduction"]
    return loss


def loss_arguments(loss: nn.Module) -> dict[str, Any]:
    """What a loss module of torch.nn was made with, as a config names it, defaults and the reduction left out."""
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(loss)).parameters.items():
        value = getattr(loss, name, parameter.default)
        if name in ("size_average", "reduce", "reduction"):
            continue
        if isinstance(value, Tensor):
            value = value.tolist()
        if value != parameter.default:
            arguments[name] = value
    return arguments


def _task_of_module(loss: Any, num_classes: int | None) -> Task:
    check_loss(loss)
    if is_unchanged(loss, nn.CrossEntropyLoss):
        _check_class_weights("loss.weight", loss.weight, num_classes)
        return CrossEntropy(loss.weight, loss.ignore_index, loss.label_smoothing)
    if is_unchanged(loss, nn.NLLLoss):
        _check_class_weights("loss.weight", loss.weight, num_classes)
        return NegativeLogLikelihood(loss.weight, loss.ignore_index)
    return ElementLoss(summed(loss), rule_of(loss))


def _as_weights(weights: Sequence[float] | Tensor | None) -> Tensor | None:
    """In fp64, to be cast to the run's dtype with the task."""
    return (
        None
        if weights is None
        else torch.as_tensor(weights, dtype=torch.float64).clone()
    )


def _check_class_weights(
    key: str, weights: Sequence[float] | Tensor | None, num_classes: int | None
) -> None:
    if weights is not None and num_classes is not None and len(weights) != num_classes:
        raise ConfigError(key, f"{len(weights)} weights for {num_classes} classes")
