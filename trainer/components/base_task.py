"""What a run minimises and measures: the extension point for losses and metrics.

A task gives the *sum* of the loss over a micro-batch and the weight of its targets. The step divides once, by the
weight of the whole step over all ranks. That is right for short last steps, uneven micro-batches, ignored targets and
class weights, where a mean of means is not.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from trainer.components.answers import Answer
from trainer.components.calling import call_model, scores_of
from trainer.components.metric_inputs import as_metric_inputs
from trainer.errors import ConfigError


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
    is_named = type(pair) is WeightedSum
    if not is_named and not (isinstance(pair, tuple | list) and len(pair) == 2):
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
    if isinstance(weight, Tensor):
        _check_weight(weight)
    elif not isinstance(weight, int):
        return WeightedSum(total, _as_int(weight))
    return pair if is_named else WeightedSum(total, weight)


def _check_weight(weight: Tensor) -> None:
    if weight.dim() > 0:
        raise ConfigError(
            "loss.name",
            f"loss_sum returned a tensor {tuple(weight.shape)} as the weight; sum it to a 0-dim tensor",
        )
    if weight.requires_grad:
        raise ConfigError(
            "loss.name",
            "loss_sum returned a weight with a gradient, and the step divides by the weight after the backward; "
            "detach it, or put what depends on parameters into the total",
        )


def _as_int(weight: Any) -> int:
    try:
        return operator.index(weight)  # one of NumPy's, such as the length of an array
    except TypeError:
        raise ConfigError(
            "loss.name",
            f"loss_sum returned a {type(weight).__name__} as the weight; give an int or a 0-dim tensor",
        ) from None


class Task(nn.Module):
    """A loss and its metrics. Subclass it, implement `loss_sum`, and name the class in `loss.name`.

    The section's other keys are the constructor's arguments; `num_classes` is supplied if the constructor takes it.
    Tensors that the loss needs (class weights) are buffers, so that they follow the run's device and dtype.
    `metrics` names what `metric_sums` returns, in its order: a metric `accuracy` is logged as `val/accuracy`.
    """

    metrics: tuple[str, ...] = ()
    # "min" or "max" by metric: which of its values is better. Known names, such as accuracy, need none.
    directions: Mapping[str, str] = {}
    # True: `metric_sums` of several micro-batches at once is the sum of theirs, so they may be measured at once, which
    # takes less time. Say it in the class that implements `metric_sums`; another's word for its own does not count.
    metrics_add_up: bool = False
    # True: a sample's target is a class, or a set of labels, so that `train.mix` may blend two of them.
    targets_are_classes: bool = False
    # True: the loss is of all outputs of a step at once, whatever the micro-batches and ranks, as a contrastive one is:
    # `loss_sum` and `metric_sums` then see every sample of the step, in order. The step takes two forwards.
    whole_step: bool = False
    # True: the loss compares the samples that it sees. Without `whole_step`, the run's header says which those are.
    compares_samples: bool = False
    # Targets with this value are not counted; None: every target is.
    ignore_index: int | None = None
    # What `data.collate` is where the config does not say; None: torch's default.
    collate: str | None = None
    # False where the model gives no loss in eval mode: an evaluation then logs the metrics alone.
    validates_loss: bool = True

    def __init__(self) -> None:  # nn.Module's own takes any keyword, and refuses each
        super().__init__()

    def predict(self, model: nn.Module, inputs: Any) -> Any:
        """The model's output for a micro-batch. Override it for models that return more than one tensor.

        By default `model(inputs)`, and `model(**inputs)` for a dict whose keys are names of the forward's parameters.
        """
        return call_model(model, inputs)

    def predict_with_targets(self, model: nn.Module, inputs: Any, targets: Any) -> Any:
        """The output that `loss_sum` and `metric_sums` get. Override it for models that take the targets, too.

        By default that of `predict`.
        """
        return self.predict(model, inputs)

    def convert_targets(self, output: Any, targets: Any) -> Any:
        """The targets of a batch in the form that the loss takes, such as int64 class ids; here as they are."""
        return targets

    def loss_sum(self, output: Any, targets: Any) -> tuple[Tensor, Tensor | int]:
        """A `WeightedSum`: the loss summed over the targets, with its graph, and the targets' total weight.

        The weight is an `int` only if it is the same for every sample; else a 0-dim tensor.
        """
        raise NotImplementedError

    def metric_sums(
        self, output: Any, targets: Any
    ) -> Mapping[str, tuple[Tensor, Tensor | int]]:
        """A `WeightedSum` for each of `metrics`, by name. `output` is detached."""
        return {}

    def metric_inputs(self, output: Any, targets: Any) -> Any:
        """What the run's `metrics` are updated with: `(predictions, targets)`, or a mapping by their parameters' names.

        By default what `answer` gives and the targets of the loss, without ignored ones (see `as_metric_inputs`); for
        a task without an answer, the output and the targets as they are. `output` is detached.
        """
        targets = self.convert_targets(output, targets)
        answer = self.answer(output)
        if answer is None:
            return output, targets
        return as_metric_inputs(answer, targets, self.ignore_index)

    def probabilities(self, output: Any) -> Tensor | None:
        """For a classifier of whole samples, the probability of each class, `(N, C)`; None for other tasks."""
        return None

    def answer(self, output: Any) -> Answer | None:
        """What `predict` and an exported program answer; None where that is not known. By default `probabilities`."""
        probabilities = self.probabilities(output)
        return None if probabilities is None else Answer("class", probabilities)


class ScoresTask(Task):
    """A task whose loss takes one tensor of scores, which some models wrap: see `scores_of`."""

    def predict(self, model: nn.Module, inputs: Any) -> Any:
        is_plain = isinstance(inputs, Tensor)
        output = model(inputs) if is_plain else call_model(model, inputs)
        if isinstance(output, Tensor) or not self._has_own_loss():
            return output
        return scores_of(output)

    def _has_own_loss(self) -> bool:
        """True if `loss_sum` is Lockstep's. A subclass's own may read the model's whole output."""
        return type(self).loss_sum.__module__.startswith("trainer.")


def has_plain_predict(task: Task) -> bool:
    """True if the task's output for a tensor is the model's."""
    return type(task).predict in (Task.predict, ScoresTask.predict)


def metrics_add_up(task: Task) -> bool:
    """True if the class whose `metric_sums` the task has, or one made from it, says that metrics add up."""
    for cls in type(task).__mro__:
        if "metrics_add_up" in vars(cls):
            return bool(cls.metrics_add_up)  # type: ignore[attr-defined]
        if "metric_sums" in vars(cls):
            return False
    return False
