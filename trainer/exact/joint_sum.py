"""The sums of many tensors over the ranks, by few operations: each takes its time on the network, however small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trainer.process.ranks import Ranks

BYTES_TOGETHER = 25 << 20  # as many as in one of DDP's buckets


class JointSum:
    """Sums tensors of the shapes and dtypes of `like`, which are the same on every rank, a few pieces at a time.

    Holds memory for the largest piece that has several tensors: at most 25 MiB for each dtype.
    """

    def __init__(self, ranks: Ranks, like: Sequence[Tensor]) -> None:
        groups = list(neighbours(like))
        memory = _memory_for(groups)
        self._pieces = [_Piece(ranks, group, memory) for group in groups]

    @torch.no_grad()
    def sum_(self, tensors: list[Tensor]) -> None:
        """Add up each tensor over all ranks, in place. A collective."""
        start = 0
        for piece in self._pieces:
            end = start + piece.length
            piece.sum_(tensors[start:end])
            start = end


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


def neighbours(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of neighbours with one dtype, of 25 MiB at most or of one tensor."""
    group: list[Tensor] = []
    size = 0
    for tensor in tensors:
        fits = size + tensor.nbytes <= BYTES_TOGETHER
        if group and not (fits and tensor.dtype == group[-1].dtype):
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.nbytes
    if group:
        yield group


def _memory_for(groups: Sequence[Sequence[Tensor]]) -> dict[torch.dtype, Tensor]:
    """Memory for the largest group of each dtype that has several tensors."""
    sizes: dict[torch.dtype, int] = {}
    for group in groups:
        if len(group) > 1:
            dtype = group[0].dtype
            size = sum(tensor.numel() for tensor in group)
            sizes[dtype] = max(size, sizes.get(dtype, 0))
    memory = {}
    for dtype, size in sizes.items():
        memory[dtype] = groups[0][0].new_empty(size, dtype=dtype)
    return memory
