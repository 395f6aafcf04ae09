"""What `loss.name` or a loss object stands for, as a task. The kinds of tasks are in the files imported here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from trainer.components.base_task import (
    Task,
    WeightedSum,
    as_weighted_sum,
    has_plain_predict,
    metrics_add_up,
)
from trainer.components.classification import (
    CrossEntropy,
    NegativeLogLikelihood,
    as_weights,
    check_class_weights,
)
from trainer.components.constructor_arguments import constructor_arguments
from trainer.components.detection import Detection
from trainer.components.element_losses import (
    MSE,
    BCEWithLogits,
    ElementLoss,
    Regression,
)
from trainer.components.torch_losses import (
    check_class,
    check_loss,
    check_reduction,
    is_unchanged,
    rule_of,
    with_reduction,
)
from trainer.config.model_sections import LossConfig
from trainer.config.registry import build, refuse_other_class, resolve
from trainer.errors import ConfigError

__all__ = [
    "MSE",
    "BCEWithLogits",
    "CrossEntropy",
    "Detection",
    "ElementLoss",
    "NegativeLogLikelihood",
    "Regression",
    "Task",
    "WeightedSum",
    "as_task",
    "as_weighted_sum",
    "build_task",
    "collate_of",
    "has_plain_predict",
    "loss_arguments",
    "metrics_add_up",
]

TASKS: Mapping[str, Callable[..., Task]] = {
    "cross_entropy": CrossEntropy,
    "mse": MSE,
    "bce_with_logits": BCEWithLogits,
    "detection": Detection,
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
    refuse_other_class("loss", section.name, target, nn.Module)
    arguments = dict(section.args)
    if section.name in TASKS:
        check_reduction(arguments.pop("reduction", "sum"))
    elif (
        isinstance(target, type)
        and issubclass(target, nn.Module)
        and not issubclass(target, Task)
    ):
        loss = _build_module(target, arguments)
        # Not its copy: a loss may pass the reduction on to one inside, which a copy would leave as it is.
        mean = _build_module(target, {**arguments, "reduction": "mean"}, sums=False)
        return _task_of_module(loss, num_classes, mean)
    task = build("loss", target, arguments, num_classes=num_classes)
    if not isinstance(task, nn.Module):
        raise ConfigError(
            "loss.name",
            f'"{section.name}" is neither a trainer.Task nor a loss module of torch.nn',
        )
    return as_task(task, num_classes)


def collate_of(loss: object) -> str | None:
    """The `data.collate` that a task, or what a `LossConfig` names, takes its batches by; None for torch's default."""
    if isinstance(loss, LossConfig):
        loss = resolve("loss", loss.name, TASKS)
    collate = getattr(loss, "collate", None)
    return collate if isinstance(collate, str) else None


def _build_module(
    cls: type[nn.Module], arguments: Mapping[str, Any], *, sums: bool = True
) -> Any:
    """A loss module with `arguments`. With `sums`, one that is to average sums instead."""
    check_class(cls)
    arguments = dict(arguments)
    for name in ("weight", "pos_weight"):
        if isinstance(arguments.get(name), list):  # YAML has no tensors
            arguments[name] = as_weights(arguments[name])
    if "reduction" not in inspect.signature(cls).parameters:
        arguments.pop("reduction", None)
        return build("loss", cls, arguments)
    # Set when it is built, because a loss may pass it on to one inside, where it cannot be changed later.
    if sums and arguments.get("reduction", "mean") == "mean":
        arguments["reduction"] = "sum"
    loss = build("loss", cls, arguments)
    if not hasattr(loss, "reduction"):  # it passes the reduction on to a loss inside
        loss.reduction = arguments["reduction"]
    return loss


def loss_arguments(loss: nn.Module) -> dict[str, Any]:
    """What a loss module of torch.nn was made with, as a config names it, defaults and the reduction left out."""
    arguments = constructor_arguments(loss)
    for name in ("size_average", "reduce", "reduction"):
        arguments.pop(name, None)
    return arguments


def _task_of_module(
    loss: Any, num_classes: int | None, mean: nn.Module | None = None
) -> Task:
    """The task of a loss module. `mean` is the same loss, built to average; by default a copy of it."""
    check_loss(loss)
    if is_unchanged(loss, nn.CrossEntropyLoss):
        check_class_weights("loss.weight", loss.weight, num_classes)
        return CrossEntropy(loss.weight, loss.ignore_index, loss.label_smoothing)
    if is_unchanged(loss, nn.NLLLoss):
        check_class_weights("loss.weight", loss.weight, num_classes)
        return NegativeLogLikelihood(loss.weight, loss.ignore_index)
    total, rule = with_reduction(loss, "sum"), rule_of(loss)
    if rule.divisor is not None:
        return ElementLoss(total, rule)
    return ElementLoss(total, rule, mean or with_reduction(loss, "mean"))
