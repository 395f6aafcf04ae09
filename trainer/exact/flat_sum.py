"""The sum of gradients over the ranks after the backward, where DDP does not sum them within it.

Which parameters a rank has used can depend on its pixels, and a rank may have nothing to do: so ranks may lack
different gradients. A rank gives −0.0 for one that it lacks, which changes no sum. One number for each parameter is
summed, too: how many ranks have used it. Only a rank that lacks a gradient reads that, and no rank asks the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from trainer.exact.joint_sum import JointSum
from trainer.process.ranks import Ranks


class FlatSum:
    """Sums the gradients of `parameters`, which are the same on every rank. Holds the memory of a `JointSum`."""

    def __init__(self, ranks: Ranks, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        first = self._parameters[0]
        self._users = first.new_ones(len(self._parameters), requires_grad=False)
        self._total = JointSum(ranks, [self._users, *self._parameters])

    @torch.no_grad()
    def sum_(self) -> None:
        """Leave the sum of all ranks' gradients in `grad`, None where no rank has one. A collective.

        Waits for the device on a rank that lacks a gradient.
        """
        has_gradient = [parameter.grad is not None for parameter in self._parameters]
        is_complete = all(has_gradient)
        if is_complete:
            self._users.fill_(1)
        else:
            self._users.copy_(torch.tensor(has_gradient))
        tensors = [self._users]
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.full_like(parameter, -0.0)
            tensors.append(parameter.grad)
        self._total.sum_(tensors)
        if not is_complete:
            self._forget_unused()

    def _forget_unused(self) -> None:
        """To an optimizer, no gradient and a zero one are not the same."""
        for parameter, users in zip(
            self._parameters, self._users.tolist(), strict=True
        ):
            if not users:
                parameter.grad = None
