"""The sum over all ranks, finished from the nodes that each rank's part of the tree has left.

Every rank gets one shard of every node, finishes the tree on its shard, and all gather the results. Communication
moves data and never adds, so the additions are those of one process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from trainer.errors import ConfigError
from trainer.exact.plan import Step
from trainer.exact.tree import Node, TreeSum, nodes_of_range
from trainer.process.ranks import Ranks


class ShardExchange:
    """Sums lists of tensors over all ranks by the tree of a step.

    `layout` is a list of tensors with the shapes, strides and the one dtype of those that are summed. Raises
    `ConfigError` where it has several dtypes.
    """

    def __init__(self, ranks: Ranks, layout: Sequence[Tensor]) -> None:
        self._ranks = ranks
        self._layout = list(layout)
        self._sizes = [tensor.numel() for tensor in layout]
        self._size = sum(self._sizes)
        self._shard_size = math.ceil(self._size / ranks.count)
        self._dtype = _common_dtype(layout)
        self._buffers: dict[str, Tensor] = {}

    def sum(self, step: Step, values: Sequence[list[Tensor]]) -> list[Tensor]:
        """The root of the step's tree, from the `values` of this rank's nodes. A collective."""
        micro_batches = len(step.micro_batches)
        nodes: list[Node] = []  # of all ranks
        nodes_by_rank: list[int] = []
        for first, end in step.ranks:
            nodes_of_rank = nodes_of_range(first, end, micro_batches)
            nodes += nodes_of_rank
            nodes_by_rank.append(len(nodes_of_rank))

        shards = self._exchange_shards(self._pack(values), nodes_by_rank)
        shard_sum: TreeSum[Tensor] = TreeSum(micro_batches, Tensor.add_)
        for node, shard in zip(nodes, shards, strict=True):
            shard_sum.push(node, shard)

        total = self._buffer("total", self._ranks.count, self._shard_size)
        self._ranks.all_gather_by_sends(shard_sum.root(), total)
        return self._unpack(total)

    def _pack(self, values: Sequence[list[Tensor]]) -> Tensor:
        """This rank's nodes as rows, `(nodes, ranks, shard size)`. The last shard may have some elements to spare."""
        ranks = self._ranks.count
        packed = self._buffer("packed", len(values), ranks * self._shard_size)
        for row, tensors in zip(packed, values, strict=True):
            flat = map(_flatten, tensors, self._layout)
            torch.cat(list(flat), out=row[: self._size])
        return packed.view(len(values), ranks, self._shard_size)

    def _exchange_shards(self, packed: Tensor, nodes_by_rank: list[int]) -> Tensor:
        """This rank's shard of every rank's nodes, `(nodes of all ranks, shard size)`, in the order of the ranks."""
        shard_size = self._shard_size
        size_sent = len(packed) * shard_size
        sizes_received = [nodes * shard_size for nodes in nodes_by_rank]
        received = self._buffer("received", sum(nodes_by_rank), shard_size)
        # One call for all ranks' shards: the first dimension must be that of the ranks.
        by_rank = packed.transpose(0, 1).reshape(-1)
        distributed.all_to_all_single(
            received.view(-1),
            by_rank,
            output_split_sizes=sizes_received,
            input_split_sizes=[size_sent] * self._ranks.count,
        )
        return received

    def _unpack(self, total: Tensor) -> list[Tensor]:
        flat_tensors = torch.split(total.view(-1)[: self._size], self._sizes)
        return list(map(_unflatten, flat_tensors, self._layout))

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """Memory that is kept from step to step: allocating it anew costs as much as filling it."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=self._dtype, device=self._ranks.device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)


def _flatten(tensor: Tensor, like: Tensor) -> Tensor:
    """The elements of `tensor` in the order in which `like` has them in memory, `(n,)`."""
    return tensor.permute(_memory_order(like)).reshape(-1)


def _unflatten(flat: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_flatten`: a view of `flat` with the shape and the memory order of `like`.

    A norm sums in memory order, so a channels_last gradient must come back as one.
    """
    order = _memory_order(like)
    inverse = [order.index(dim) for dim in range(like.dim())]
    shape = [like.shape[dim] for dim in order]
    return flat.view(shape).permute(inverse)


def _memory_order(tensor: Tensor) -> list[int]:
    """The dimensions from the largest stride to the smallest."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=strides.__getitem__, reverse=True)


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        names = ", ".join(sorted(map(str, dtypes)))
        raise ConfigError(
            "run.reproducibility",
            f"bitwise needs parameters of one dtype, and the model has {names}",
        )
    return dtypes.pop()
