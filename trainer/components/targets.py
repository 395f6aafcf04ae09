"""Targets as a loss takes them: converted where their meaning is plain, else refused with both shapes and dtypes.

A data set may give class ids of any integer type, as floats, or with a dimension of one; masks as bool or uint8;
labels as a list. torch takes one form of each, and its own errors name neither the data nor the remedy.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

from trainer.errors import ConfigError, DataError
from trainer.exact.structures import describe_tensors

# Of a target that is to be between 0 and 1: resized masks and smoothed labels overshoot by rounding.
TOLERANCE = 1e-3


def check_output(output: Any, name: str) -> None:
    """Raise `ConfigError` unless the model's output is one tensor of scores."""
    if isinstance(output, Tensor):
        return
    raise ConfigError(
        "loss.name",
        f"{name} needs one tensor of scores, and the model gives a {type(output).__name__}; "
        f"name a Task of your own, whose `predict` picks the tensor",
    )


def is_plain_ids(targets: Any, output: Any) -> TypeGuard[Tensor]:
    """True for class ids in the form that torch takes, with scores in one tensor: what most runs have."""
    return (
        isinstance(output, Tensor)
        and isinstance(targets, Tensor)
        and targets.dtype == torch.long
        and targets.dim() == output.dim() - 1
    )


def as_class_targets(
    output: Tensor, targets: Any, *, probabilities: bool, check_values: bool
) -> Tensor:
    """Class ids, int64 `(N, …)` for scores `(N, C, …)`, or with `probabilities` also shares of the scores' own shape.

    Ids may be of any type and have a dimension of one in place of that of the classes. A mask of one bit for each
    class is taken for shares. With `check_values`, and always on the CPU, ids given as floats are checked to be whole,
    which waits for the device.
    """
    labels = _as_tensor(output, targets)
    if is_plain_ids(labels, output):
        return labels
    if output.dim() < 2 or labels.is_complex():
        raise mismatch(output, labels)
    samples, _, *spatial = output.shape
    if labels.shape == (samples, 1, *spatial):
        return _as_ids(labels.squeeze(1), check_values=check_values)
    if labels.shape == (samples, *spatial):
        return _as_ids(labels, check_values=check_values)
    if labels.shape == output.shape and probabilities:
        return labels.to(output.dtype)
    raise mismatch(output, labels)


def _as_ids(targets: Tensor, *, check_values: bool) -> Tensor:
    is_checked = check_values or targets.device.type == "cpu"
    if targets.is_floating_point() and is_checked and targets.numel():
        fractions = targets != targets.round()
        if bool(fractions.any()):
            value = float(targets[fractions][0])
            raise DataError(
                f"a target is {value:g}, and class ids are whole numbers; give ids, or use another loss "
                f"(mse for values to predict, bce_with_logits for probabilities of two classes)"
            )
    return targets.long()


def largest_class(scores: Tensor) -> Tensor:
    """What `scores.argmax(1)` gives: of each sample or pixel the class with the largest score, the first of equals.

    NaN counts as the largest.
    """
    if scores.device.type != "cpu":
        return scores.argmax(1)
    # torch's `max` finds the same index there, in a half to a seventh of the time.
    return scores.max(1).indices


def as_id_sets(output: Tensor, targets: Any) -> Tensor:
    """Sets of class ids, int64 in the output's shape, padded by -1: what `torch.nn.MultiLabelMarginLoss` takes."""
    labels = _as_tensor(output, targets)
    if labels.shape != output.shape or labels.is_floating_point():
        raise mismatch(output, labels)
    return labels.long()


def match_targets(output: Tensor, targets: Any) -> Tensor:
    """Targets in the output's shape and dtype; `(N,)` against `(N, 1)` would broadcast to `(N, N)`, silently.

    Dimensions of one may differ, and either may be the flat form `(N, K)` of the other. Any other arrangement of as
    many values is refused: which value belongs to which would be a guess.
    """
    if not isinstance(output, Tensor):
        raise ConfigError(
            "loss.name",
            f"this loss needs one tensor, and the model gives a {type(output).__name__}; name a Task of your own, "
            f"whose `predict` picks the tensor",
        )
    values = _as_tensor(output, targets)
    if values.shape == output.shape:
        return values.to(output.dtype)
    if output.numel() != values.numel():
        raise ConfigError(
            "loss.name",
            f"the model gives {tuple(output.shape)} for targets of shape {tuple(values.shape)}, and this loss needs "
            f"as many values in both; set model.num_classes to the number of values in a target, or use another loss: "
            f"cross_entropy if the targets are class ids",
        )
    if not _is_plainly_the_same(output, values):
        raise mismatch(output, values)
    return values.reshape(output.shape).to(output.dtype)


def _is_plainly_the_same(output: Tensor, targets: Tensor) -> bool:
    """True if the two shapes hold the same values in the same order, sample by sample."""
    if output.shape[:1] != targets.shape[:1]:
        return False
    is_flat = output.dim() <= 2 or targets.dim() <= 2
    return is_flat or _without_ones(output) == _without_ones(targets)


def _without_ones(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape[1:] if size != 1]


def check_range(targets: Tensor, allowed: str | None) -> None:
    """Raise `DataError` unless all targets are `allowed`: "from 0 to 1", or "-1 or 1". Waits for the device."""
    if allowed is None or not targets.numel():
        return
    is_wrong = (targets < -TOLERANCE) | (targets > 1 + TOLERANCE)
    if allowed == "-1 or 1":
        is_wrong = targets.abs() != 1
    if bool(is_wrong.any()):
        raise DataError(
            f"a target is {float(targets[is_wrong][0]):g}, and those of this loss are {allowed}; convert them in the "
            f"data set, or name another loss in loss.name"
        )


def mismatch(output: Any, targets: Any, reason: str = "") -> ConfigError:
    """The one message for an output and targets that a loss cannot use together."""
    because = f": {reason}" if reason else ""
    return ConfigError(
        "loss.name",
        f"this loss cannot use the model's {describe_tensors(output)} with the data set's targets "
        f"{describe_tensors(targets)}{because}; change the data set's targets, model.num_classes or loss.name so that "
        f"they fit",
    )


def _as_tensor(output: Any, targets: Any) -> Tensor:
    if isinstance(targets, Tensor):
        return targets
    stacked = _stack(targets)
    if stacked is None:
        raise mismatch(output, targets, "one tensor is needed")
    return stacked


def _stack(targets: Any) -> Tensor | None:
    """One tensor `(N, …)` of targets given as lists, of which a batch makes a tensor `(N,)` for each place."""
    if isinstance(targets, Tensor):
        return targets if targets.dim() else None
    if not isinstance(targets, list | tuple) or not targets:
        return None
    parts: list[Tensor] = []
    for item in targets:
        part = _stack(item)
        if part is None or (parts and part.shape != parts[0].shape):
            return None
        parts.append(part)
    return torch.stack(parts, 1)
