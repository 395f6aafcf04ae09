"""y = x², descended from x = 1: a model of one parameter, through the same trainer as any other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer import Task, WeightedSum


class Place(nn.Module):
    """Where one stands: `x`, the only parameter, given for each sample `(N, …)` → `(N,)`."""

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(start))

    def forward(self, inputs: Tensor) -> Tensor:
        # A copy: metrics are measured after the update.
        return self.x.repeat(len(inputs))


class Nothing:
    """Samples that say nothing: the loss asks for none, and a step needs one."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> tuple[float, float]:
        return 0.0, 0.0


def nothing(steps: int = 30) -> Nothing:
    """As many samples as an epoch of batch.size=1 shall have steps."""
    return Nothing(steps)


class Square(Task):
    """y = x². Its gradient is 2x, so plain gradient descent multiplies x by 1 − 2·lr in every step."""

    metrics = ("x",)

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        return WeightedSum(output.square().sum(), len(output))

    def metric_sums(self, output: Tensor, targets: Tensor) -> dict[str, WeightedSum]:
        return {"x": WeightedSum(output.sum(), len(output))}
