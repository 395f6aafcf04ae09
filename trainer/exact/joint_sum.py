"""The sums of many tensors over the ranks, by few operations: each takes its time on the network, however small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trainer.process.ranks import Ranks

BYTES_TOGETHER = 25 << 20  # as many as in one of DDP's buckets


@torch.no_grad()
def sum_together(ranks: Ranks, tensors: Sequence[Tensor]) -> None:
    """Add up each tensor over all ranks, in place. A collective; the tensors have the same shapes on every rank."""
    for group in neighbours(tensors):
        if len(group) == 1:
            ranks.sum_(group[0])
            continue
        total = ranks.sum_(torch.cat([tensor.reshape(-1) for tensor in group]))
        sizes = [tensor.numel() for tensor in group]
        for tensor, part in zip(group, torch.split(total, sizes), strict=True):
            tensor.copy_(part.view_as(tensor))


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
