"""The losses of torch.nn: what each divides its mean by, which targets it takes, and which metric goes with it.

A run needs a loss's sum and its divisor apart, so that micro-batches of any size add up to one mean. torch returns only
their quotient, and the divisor differs from loss to loss. Cross-entropy and NLL are not here: their divisor depends on
the targets (see `trainer.components.classification.CrossEntropy`).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from trainer.components.answers import AnswerKind
from trainer.components.divisor import (
    Divisor,
    count_elements,
    count_rows,
    count_samples,
)
from trainer.components.targets import (
    as_class_targets,
    as_id_sets,
    largest_class,
    match_targets,
)
from trainer.errors import ConfigError

_CALL_IT = "write a trainer.Task whose loss_sum calls it"
_HOLD_IT = "let the model hold it, so that they are trained, and write a trainer.Task for its result"

# Losses that need more than an output and its targets. By name: some are newer than the oldest supported torch.
REFUSED = {
    "AdaptiveLogSoftmaxWithLoss": f"is a layer with weights of its own; {_HOLD_IT}",
    "CosineEmbeddingLoss": f"compares two outputs; {_CALL_IT}",
    "CTCLoss": f"needs the lengths of outputs and targets; {_CALL_IT}",
    "GaussianNLLLoss": f"needs a variance besides the output; {_CALL_IT}",
    "LinearCrossEntropyLoss": f"is a layer with weights of its own; {_HOLD_IT}",
    "MarginRankingLoss": f"compares two outputs; {_CALL_IT}",
    "TripletMarginLoss": f"compares three outputs; {_CALL_IT}",
    "TripletMarginWithDistanceLoss": f"compares three outputs; {_CALL_IT}",
}


@dataclass(frozen=True)
class LossRule:
    """How a loss module is summed, divided and measured."""

    # From the output: what `reduction="mean"` divides the sum by. None: to be found on the first samples.
    divisor: Divisor | None
    metric: str | None = None
    # (loss, output, targets) → what the metric averages.
    terms: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    # What a model that was trained with it answers, and how that is read off (loss, output).
    answer_kind: AnswerKind | None = None
    answer: Callable[[Any, Tensor], Tensor] | None = None
    # (output, targets) → the targets as the loss takes them.
    convert: Callable[[Tensor, Any], Tensor] = match_targets
    # Which values the converted targets may have, if not all.
    allowed: str | None = None


def _class_ids(output: Tensor, targets: Any) -> Tensor:
    return as_class_targets(output, targets, probabilities=False, check_values=False)


def _class_targets(output: Tensor, targets: Any) -> Tensor:
    return as_class_targets(output, targets, probabilities=True, check_values=False)


def _values(output: Tensor, targets: Any) -> Tensor:
    """Targets of a loss that is not torch's. Whether it takes class ids, only its base class says."""
    is_tensor = isinstance(output, Tensor) and isinstance(targets, Tensor)
    if is_tensor and not targets.is_floating_point() and output.dim() > 1:
        samples, classes, *spatial = output.shape
        if classes > 1 and targets.shape in (
            (samples, *spatial),
            (samples, 1, *spatial),
        ):
            raise ConfigError(
                "loss.name",
                f"the targets {tuple(targets.shape)} are class ids for the model's scores {tuple(output.shape)}, and "
                f"this loss is taken for one that compares values; let its class extend torch.nn.CrossEntropyLoss, by "
                f"which it takes ids, or write a trainer.Task",
            )
    return match_targets(output, targets)


def _absolute_error(loss: Any, output: Tensor, targets: Tensor) -> Tensor:
    return (output - targets).abs()


def _absolute_error_of_rate(loss: Any, output: Tensor, targets: Tensor) -> Tensor:
    rate = output.exp() if loss.log_input else output
    return (rate - targets).abs()


def _absolute_error_of_probability(
    loss: Any, output: Tensor, targets: Tensor
) -> Tensor:
    probability = targets.exp() if loss.log_target else targets
    return (output.exp() - probability).abs()


def _right_logit(loss: Any, output: Tensor, targets: Tensor) -> Tensor:
    return (output > 0) == (targets > 0.5)


def _right_probability(loss: Any, output: Tensor, targets: Tensor) -> Tensor:
    return (output > 0.5) == (targets > 0.5)


def _right_sign(loss: Any, output: Tensor, targets: Tensor) -> Tensor:
    return (output > 0) == (targets > 0)


def _right_class(loss: Any, output: Tensor, targets: Tensor) -> Tensor:
    labels = largest_class(targets) if targets.is_floating_point() else targets
    return largest_class(output) == labels


def _as_it_is(loss: Any, output: Tensor) -> Tensor:
    return output


def _rate(loss: Any, output: Tensor) -> Tensor:
    rate: Tensor = output.exp() if loss.log_input else output
    return rate


def _exponential(loss: Any, output: Tensor) -> Tensor:
    return output.exp()


def _sigmoid(loss: Any, output: Tensor) -> Tensor:
    return output.sigmoid()


REGRESSION = LossRule(count_elements, "mae", _absolute_error, "values", _as_it_is)

RULES: dict[type[nn.Module], LossRule] = {
    nn.L1Loss: REGRESSION,
    nn.MSELoss: REGRESSION,
    nn.SmoothL1Loss: REGRESSION,
    nn.HuberLoss: REGRESSION,
    nn.PoissonNLLLoss: LossRule(
        count_elements, "mae", _absolute_error_of_rate, "values", _rate
    ),
    nn.KLDivLoss: LossRule(
        count_elements, "mae", _absolute_error_of_probability, "values", _exponential
    ),
    nn.BCELoss: LossRule(
        count_elements,
        "accuracy",
        _right_probability,
        "labels",
        _as_it_is,
        allowed="from 0 to 1",
    ),
    nn.BCEWithLogitsLoss: LossRule(
        count_elements,
        "accuracy",
        _right_logit,
        "labels",
        _sigmoid,
        allowed="from 0 to 1",
    ),
    nn.SoftMarginLoss: LossRule(
        count_elements,
        "accuracy",
        _right_sign,
        "labels",
        _sigmoid,
        allowed="-1 or 1",
    ),
    nn.HingeEmbeddingLoss: LossRule(count_elements, allowed="-1 or 1"),
    nn.MultiLabelSoftMarginLoss: LossRule(
        count_rows,
        "accuracy",
        _right_logit,
        "labels",
        _sigmoid,
        allowed="from 0 to 1",
    ),
    nn.MultiLabelMarginLoss: LossRule(count_samples, convert=as_id_sets),
    nn.MultiMarginLoss: LossRule(
        count_samples, "accuracy", _right_class, convert=_class_ids
    ),
}

# Of losses that are not torch's: what they divide by is found on the first samples.
OTHER = replace(REGRESSION, divisor=None, convert=_values)
OTHER_OF_CLASSES = LossRule(None, "accuracy", _right_class, convert=_class_targets)


def is_unchanged(loss: nn.Module, base: type[nn.Module]) -> bool:
    """True if `loss` computes what `base` does: it is one, or a subclass that keeps its `forward`."""
    # A focal loss is often a subclass of CrossEntropyLoss; it must not be computed as its parent.
    return isinstance(loss, base) and type(loss).forward is base.forward


def rule_of(loss: nn.Module) -> LossRule:
    """The rule of `loss`. One that is not torch's compares values of one shape, unless it extends a classifier's."""
    for base, rule in RULES.items():
        if is_unchanged(loss, base):
            # Its "mean" divides by all elements, which is seldom what is meant; "batchmean" divides by the samples.
            is_batch_mean = base is nn.KLDivLoss and loss.reduction == "batchmean"
            return replace(rule, divisor=count_samples) if is_batch_mean else rule
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss | nn.MultiMarginLoss):
        return OTHER_OF_CLASSES
    return OTHER


def with_reduction(loss: nn.Module, reduction: str) -> nn.Module:
    """A copy of `loss` that sums or averages, whatever its own reduction is."""
    # A copy, because the caller may use theirs elsewhere, and it moves to the run's device and dtype with the task.
    # Parameters are not copied: the run trains those that the caller has, as it does with a model.
    has_parameters = next(loss.parameters(), None) is not None
    copied: Any = copy(loss) if has_parameters else deepcopy(loss)
    copied.reduction = reduction
    module: nn.Module = copied
    return module


def check_weight_shape(loss: Any, output: Tensor) -> None:
    """Raise `ConfigError` for a `weight` with a row for each sample of a batch: which sample comes where changes."""
    for name in ("weight", "pos_weight"):
        weight = getattr(loss, name, None)
        if not isinstance(weight, Tensor) or weight.dim() < output.dim():
            continue
        if weight.shape[0] != 1:
            raise ConfigError(
                f"loss.{name}",
                f"of shape {tuple(weight.shape)} has a row for each place in a batch, and samples change places; "
                f"give one weight for each label, or put the samples' own weights into the targets and write a "
                f"trainer.Task",
            )


def check_class(cls: type) -> None:
    """Raise a `ConfigError` for a loss class of torch.nn that needs more than one output and its targets."""
    for base in cls.__mro__:
        if base.__module__.startswith("torch.nn.") and base.__name__ in REFUSED:
            raise ConfigError(
                "loss.name", f"torch.nn.{base.__name__} {REFUSED[base.__name__]}"
            )


def check_loss(loss: nn.Module) -> None:
    """Raise a `ConfigError` for a loss module whose sum cannot be had, or would not be trained as it should."""
    name = type(loss).__name__
    check_class(type(loss))
    if not hasattr(loss, "reduction"):
        raise ConfigError(
            "loss.name",
            f"{name} has no `reduction`, so whether it gives a sum or a mean is unknown; {_CALL_IT}",
        )
    choices = (
        ("mean", "sum", "batchmean")
        if is_unchanged(loss, nn.KLDivLoss)
        else ("mean", "sum")
    )
    check_reduction(loss.reduction, choices)


def check_reduction(reduction: Any, choices: tuple[str, ...] = ("mean", "sum")) -> None:
    """Raise a `ConfigError` unless `reduction` is one of `choices`."""
    if reduction not in choices:
        raise ConfigError(
            "loss.reduction",
            f'"{reduction}" is not one of {", ".join(choices)}; mean and sum train alike, so leave it out',
        )
