"""Does a loss look beyond a micro-batch? Asked of the loss by itself, on the same outputs.

A model's rounding differs between one forward and two, so a comparison through the model has to be tolerant, and a
small term that compares samples would pass it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.components.task import as_weighted_sum
from trainer.core.forward import Forward, count_samples
from trainer.data.batches import MicroBatch
from trainer.exact.plan import Step
from trainer.exact.seeding import draw_state
from trainer.exact.structures import map_tensors, tensors_in

# Relative; above the rounding of a sum of a few losses.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}


def loss_adds_up(
    model: nn.Module, forward: Forward, step: Step, batches: Sequence[MicroBatch]
) -> bool:
    """True if the loss of all outputs of `batches` at once is the sum of theirs, or if the loss draws.

    What is drawn for several micro-batches at once is watched for in every forward, and is not comparable here.
    """
    outputs: list[Any] = []
    totals: list[Tensor] = []
    weights: list[Tensor] = []
    for batch in batches:
        output, (total, weight) = forward(model, batch, step)
        outputs.append(output)
        totals.append(total.detach())
        weights.append(torch.as_tensor(weight).to(total))
    samples = [count_samples(batch) for batch in batches]
    output = _join(outputs, samples)
    targets = _join([batch.targets for batch in batches], samples)
    device = totals[0].device
    state = draw_state(device)
    # With its graph: a loss may take gradients itself.
    total, weight = as_weighted_sum(forward.task.loss_sum(output, targets))
    if draw_state(device) != state:
        return True
    if _differ(total.detach(), torch.stack(totals)):
        return False
    weight = torch.as_tensor(weight).to(total)
    return not _differ(weight, torch.stack(weights))


def _differ(joint: Tensor, parts: Tensor) -> bool:
    # The others are bf16 and fp16, of which a number has two or three digits.
    bound = TOLERANCE.get(joint.dtype, 1e-2) * parts.abs().sum()
    return bool((joint - parts.sum()).abs() > bound)


def _join(values: Sequence[Any], samples: Sequence[int | None]) -> Any:
    """Several structures as one, whose tensors with a row for each sample are joined along the samples."""
    others = [tensors_in(value) for value in values[1:]]

    def join(tensor: Tensor) -> Tensor:
        parts = [tensor, *(next(other) for other in others)]
        for part, count in zip(parts, samples, strict=True):
            if not part.dim() or not count or len(part) % count:
                return tensor
        return torch.cat(parts)

    return map_tensors(join, values[0])
