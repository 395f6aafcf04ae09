"""What the mean of a loss that is not torch's divides by, found by comparing its mean with its sum.

A run needs the two apart, so that micro-batches of any size add up to one mean. A loss that sums over something other
than its targets, such as pairs of samples, has no such divisor and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError

Divisor = Callable[[Tensor], int]
# Relative; rounding stays far below, another divisor is at least one sample off.
TOLERANCE = {torch.float64: 1e-9}
TOLERANCE_BELOW_FP64 = 1e-4  # their sums round more
OWN_TASK = (
    "write a trainer.Task that returns the sum and what to divide it by (docs/bring-your-own.md, "
    '"Loss and metrics")'
)


def count_elements(output: Tensor) -> int:
    return output.numel()


def count_samples(output: Tensor) -> int:
    return len(output)


def count_rows(output: Tensor) -> int:
    """Where a loss has already averaged over its last dimension, such as the labels of each sample."""
    return output.numel() // output.shape[-1]


def count_positions(output: Tensor) -> int:
    """Samples, or pixels: what is left of `(N, C, …)` without the classes."""
    if output.dim() < 2:
        return len(output)
    return output.numel() // output.shape[1]


CANDIDATES: tuple[Divisor, ...] = (
    count_elements,
    count_samples,
    count_positions,
    count_rows,
)


@torch.no_grad()
def find_divisor(
    mean: nn.Module, total: nn.Module, output: Tensor, targets: Tensor
) -> Divisor | None:
    """The function of the output that `mean` divides the sum by; None if the loss of these samples is 0.

    `mean` and `total` are the same loss with either reduction; copies are called. Raises `ConfigError` where the loss
    is no sum over samples, or where its mean divides by something else. Waits for the device.
    """
    mean, total = deepcopy(mean), deepcopy(total)
    name = type(total).__name__
    half = math.ceil(len(output) / 2)
    parts = [(output, targets)]
    if half < len(output):
        parts += [
            (output[:half], targets[:half]),
            (output[half:], targets[half:]),
        ]
    sums = [_value(total, *part, name=name) for part in parts]
    means = [_value(mean, *part, name=name) for part in parts]
    if not all(math.isfinite(value) and value for value in sums + means):
        return None
    tolerance = TOLERANCE.get(output.dtype, TOLERANCE_BELOW_FP64)
    if len(parts) > 1:
        whole, first, second = sums
        of_halves = first + second
        if not math.isclose(whole, of_halves, rel_tol=tolerance):
            raise ConfigError(
                "loss.name",
                f"{name} with reduction=sum gives {whole:.6g} for {len(output)} samples and {of_halves:.6g} for "
                f"their two halves, so it is no sum over samples, and micro-batches cannot be added up; {OWN_TASK}",
            )
    ratios = [s / m for s, m in zip(sums, means, strict=True)]
    outputs = [part for part, _ in parts]
    for candidate in CANDIDATES:
        divisors = [candidate(part) for part in outputs]
        if _are_close(ratios, divisors, tolerance):
            return candidate
    raise ConfigError(
        "loss.name",
        f"the mean of {name} divides by {ratios[0]:.6g} for an output of {tuple(output.shape)}, which is the number of "
        f"neither its elements ({output.numel()}) nor its samples ({len(output)}); {OWN_TASK}",
    )


def _are_close(
    values: Sequence[float], others: Sequence[float], tolerance: float
) -> bool:
    for value, other in zip(values, others, strict=True):
        if not math.isclose(value, other, rel_tol=tolerance):
            return False
    return True


def _value(loss: Any, output: Tensor, targets: Tensor, *, name: str) -> float:
    value = loss(output, targets)
    if not isinstance(value, Tensor) or value.dim() > 0:
        raise ConfigError(
            "loss.name",
            f"{name} returned no 0-dim tensor; a loss reduces to one number, by its `reduction`",
        )
    return float(value)
