"""The sum of a model's gradients over the ranks in a few pieces, after the backward.

Each piece is copied together, summed by one operation and copied back. Which parameters a rank has used can depend on
its pixels, so ranks may lack different gradients. A rank gives −0.0 for one that it lacks, which changes no sum. One
number for each parameter is summed, too: how many ranks have used it. Only a rank that lacks a gradient reads that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.exact.joint_sum import neighbours
from trainer.process.ranks import Ranks


class FlatSum:
    """Sums the gradients of `parameters`, which are the same on every rank.

    Holds memory for the largest piece that has several tensors: at most 25 MiB for each dtype.
    """

    def __init__(self, ranks: Ranks, parameters: Sequence[nn.Parameter]) -> None:
        self._ranks = ranks
        self._parameters = list(parameters)
        self._users = torch.ones(
            len(self._parameters),
            dtype=self._parameters[0].dtype,
            device=self._parameters[0].device,
        )
        groups = list(neighbours([self._users, *self._parameters]))
        memory = _memory_for(groups)
        self._pieces = [_Piece(ranks, group, memory) for group in groups]

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
        start = 0
        for piece in self._pieces:
            end = start + piece.length
            piece.sum_(tensors[start:end])
            start = end
        if not is_complete:
            self._forget_unused()

    def _forget_unused(self) -> None:
        """To an optimizer, no gradient and a zero one are not the same."""
        for parameter, users in zip(
            self._parameters, self._users.tolist(), strict=True
        ):
            if not users:
                parameter.grad = None


class _Piece:
    """Tensors that are summed by one operation, in `memory` of their dtype. One alone stays where it is."""

    def __init__(
        self,
        ranks: Ranks,
        tensors: Sequence[Tensor],
        memory: dict[torch.dtype, Tensor],
    ) -> None:
        self.length = len(tensors)
        self._ranks = ranks
        sizes = [tensor.numel() for tensor in tensors]
        self._flat: Tensor | None = None
        self._parts: list[Tensor] = []
        if self.length > 1:
            self._flat = memory[tensors[0].dtype][: sum(sizes)]
            # Elements in row-major order, since strides may differ from rank to rank.
            for tensor, part in zip(
                tensors, torch.split(self._flat, sizes), strict=True
            ):
                self._parts.append(part.view(tensor.shape))

    def sum_(self, tensors: list[Tensor]) -> None:
        if self._flat is not None:
            torch._foreach_copy_(self._parts, tensors)
            self._ranks.sum_(self._flat)
            torch._foreach_copy_(tensors, self._parts)
            return
        (tensor,) = tensors
        total = self._ranks.sum_(tensor.contiguous())
        if total is not tensor:
            tensor.copy_(total)


def _memory_for(groups: Sequence[Sequence[Tensor]]) -> dict[torch.dtype, Tensor]:
    """Memory for the largest group of each dtype that has several tensors."""
    sizes: dict[torch.dtype, int] = {}
    for group in groups:
        if len(group) > 1:
            dtype = group[0].dtype
            size = sum(tensor.numel() for tensor in group)
            sizes[dtype] = max(size, sizes.get(dtype, 0))
    device = groups[0][0].device
    return {
        dtype: torch.empty(size, dtype=dtype, device=device)
        for dtype, size in sizes.items()
    }
