"""The sum over all ranks, finished from the nodes that each rank's part of the tree has left.

Every rank gets one shard of every node, finishes the tree on its shard, and all gather the results. Communication
moves data and never adds, so the additions are those of one process.

On several machines there are two levels: the ranks of a machine finish their part of the tree as far as it goes, and
then those of the same place on each machine finish the rest. So what a machine has crosses the network once. The
additions are the same: the tree does not say who makes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from trainer.errors import ConfigError
from trainer.exact.plan import Step
from trainer.exact.tree import Node, TreeSum, nodes_of_range
from trainer.process.levels import Level
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
        levels = self._ranks.levels
        nodes = self._pack(values)
        for level in levels:
            nodes = self._finish_part(step, level, nodes)
        (total,) = nodes  # the root, of which this rank has one shard
        for level in reversed(levels):
            members = len(level.members)
            shards = self._buffer(f"total {level.span}", members, len(total))
            self._ranks.all_gather_by_sends(total, shards, level)
            total = shards.view(-1)
        return self._unpack(total)

    def _pack(self, values: Sequence[list[Tensor]]) -> list[Tensor]:
        """This rank's nodes, each of `(ranks · shard size,)`. The last shard may have some elements to spare."""
        size = self._ranks.count * self._shard_size
        packed = self._buffer("packed", len(values), size)
        for row, tensors in zip(packed, values, strict=True):
            flat = map(_flatten, tensors, self._layout)
            torch.cat(list(flat), out=row[: self._size])
        return list(packed)

    def _finish_part(
        self, step: Step, level: Level, nodes: list[Tensor]
    ) -> list[Tensor]:
        """What the tree has left once the `nodes` of all members are summed, `(elements / members,)` of each node."""
        micro_batches = len(step.micro_batches)
        names: list[Node] = []
        nodes_by_member = []
        for member in level.members:
            first_rank = member - member % level.span
            first, _ = step.ranks[first_rank]
            _, end = step.ranks[first_rank + level.span - 1]
            nodes_of_member = nodes_of_range(first, end, micro_batches)
            names += nodes_of_member
            nodes_by_member.append(len(nodes_of_member))

        shards = self._exchange_shards(level, nodes, nodes_by_member)
        tree_sum: TreeSum[Tensor] = TreeSum(micro_batches, Tensor.add_)
        for name, shard in zip(names, shards, strict=True):
            tree_sum.push(name, shard)
        return [shard for _, shard in tree_sum.nodes]

    def _exchange_shards(
        self, level: Level, nodes: list[Tensor], nodes_by_member: list[int]
    ) -> Tensor:
        """This rank's shard of every member's nodes, `(nodes of all members, shard size)`, in the members' order."""
        members = len(level.members)
        width = self._ranks.count * self._shard_size // level.span
        shard_size = width // members
        # One call for all members' shards: the first dimension must be that of the members.
        if len(nodes) == 1:
            sent = nodes[0]
        else:
            sent = self._buffer(f"sent {level.span}", members, len(nodes) * shard_size)
            shards = [node.view(members, shard_size) for node in nodes]
            if shards:  # a rank without micro-batches has none
                torch.cat(shards, dim=1, out=sent)
        received = self._buffer(
            f"received {level.span}", sum(nodes_by_member), shard_size
        )
        distributed.all_to_all_single(
            received.view(-1),
            sent.view(-1),
            output_split_sizes=[count * shard_size for count in nodes_by_member],
            input_split_sizes=[len(nodes) * shard_size] * members,
            group=level.group,
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
