"""The reduction of bitwise mode: the same bits on any number of ranks.

Every micro-batch is a leaf: its gradient, and what it changes of the running statistics. Leaves are summed by the
fixed tree of `trainer.exact.tree`. A rank sums its own range; the nodes that are left are exchanged in shards, each
rank finishes the tree on its shard, and the results are gathered. Communication moves data and never adds.

At most about log2(M) gradients of a rank are held at once. On several ranks as many again, twice, are kept for the
exchange, and one for its result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from trainer.errors import ConfigError
from trainer.exact.plan import IndexRange, Step
from trainer.exact.reduction import Reduction
from trainer.exact.running_statistics import RunningStatistics, StatisticsDifferences
from trainer.exact.tree import TreeSum, nodes_of

Leaf = list[Tensor]  # the gradient of each parameter, then the difference of each statistic


class BitwiseReduction(Reduction):
    """Gradients and statistics summed by a fixed tree over the step's micro-batches."""

    _statistics: StatisticsDifferences

    def _wrap(self) -> RunningStatistics:
        self._ranks.broadcast_parameters(self._module)
        self._tree_sum: TreeSum[Leaf] | None = None
        self._has_gradient = dict.fromkeys(self._parameters, False)
        self._buffers: dict[str, Tensor] = {}
        return StatisticsDifferences(self._module, self._section, self._ranks)

    @contextmanager
    def micro_batch(self, step: Step, indices: IndexRange) -> Iterator[nn.Module]:
        index = indices[0]  # the only one: the config refuses batch.fuse in bitwise mode
        if self._tree_sum is None:
            self._tree_sum = TreeSum(len(step.micro_batches), _add)
        self._statistics.reset()
        sibling = self._tree_sum.take((0, index - 1)) if index % 2 else None
        if sibling is not None:
            self._put_back(sibling)
        yield self._module
        gradients = self._take_gradients()
        differences = self._statistics.difference(step, index)
        if sibling is None:
            self._tree_sum.push((0, index), gradients + differences)
        else:
            differences_of_both = _add(sibling[len(gradients) :], differences)
            self._tree_sum.push((1, index // 2), gradients + differences_of_both)

    def _put_back(self, sibling: Leaf) -> None:
        """Let the backward itself add to the left sibling's gradients: the same sums, while they are in the cache."""
        for (name, parameter), gradient in zip(self._parameters.items(), sibling, strict=False):
            parameter.grad = gradient if self._has_gradient[name] else None

    def _take_gradients(self) -> Leaf:
        gradients = []
        for name, parameter in self._parameters.items():
            gradient = parameter.grad
            parameter.grad = None
            if gradient is None:
                # Adding -0 leaves every number as it is, and -0 itself.
                gradient = torch.full_like(parameter, -0.0)
            else:
                self._has_gradient[name] = True
            gradients.append(gradient)
        return gradients

    def _sum_over_ranks(self, step: Step) -> None:
        tree_sum = self._tree_sum or TreeSum[Leaf](len(step.micro_batches), _add)
        self._tree_sum = None
        total = tree_sum.root() if self._ranks.count == 1 else self._exchange(step, tree_sum)
        is_used = list(self._has_gradient.values())
        if self._find_unused_parameters or step.has_idle_rank:
            is_used = self._ranks.any_rank_each(is_used)
        gradients = total[: len(self._parameters)]
        for parameter, gradient, used in zip(self._parameters.values(), gradients, is_used, strict=True):
            # To an optimizer, no gradient and a zero one are not the same.
            parameter.grad = gradient if used else None
        self._has_gradient = dict.fromkeys(self._parameters, False)
        self._statistics.finish(step, total[len(self._parameters) :])

    # ---------------------------------------------------------------- between ranks

    def _exchange(self, step: Step, own: TreeSum[Leaf]) -> Leaf:
        """The sum of all leaves, from the nodes of all ranks: shards out, the tree finished on each, shards back."""
        summands = self._summands()
        size = sum(tensor.numel() for tensor in summands)
        shard_size = math.ceil(size / self._ranks.count)
        received = self._receive_shards(step, own, size, shard_size)

        shard_sum: TreeSum[Tensor] = TreeSum(len(step.micro_batches), Tensor.add_)
        nodes = [node for rank_nodes in self._nodes_of_ranks(step) for node in rank_nodes]
        for node, shard in zip(nodes, received, strict=True):
            shard_sum.push(node, shard)

        total = self._buffer("total", self._ranks.count, shard_size)
        self._ranks.all_gather_by_sends(shard_sum.root(), total)
        sizes = [tensor.numel() for tensor in summands]
        parts = torch.split(total.view(-1)[:size], sizes)
        return [_unpacked(part, tensor) for part, tensor in zip(parts, summands, strict=True)]

    def _receive_shards(self, step: Step, own: TreeSum[Leaf], size: int, shard_size: int) -> Tensor:
        """This rank's shard of every rank's nodes, `(nodes, shard_size)`, in the order of the ranks."""
        ranks = self._ranks.count
        summands = self._summands()
        packed = self._buffer("packed", len(own.nodes), ranks * shard_size)
        for row, (_, leaf) in zip(packed, own.nodes, strict=True):
            flat = [_packed(tensor, summand) for tensor, summand in zip(leaf, summands, strict=True)]
            torch.cat(flat, out=row[:size])

        nodes_of_ranks = self._nodes_of_ranks(step)
        received = self._buffer("received", sum(map(len, nodes_of_ranks)), shard_size)
        distributed.all_to_all_single(
            received.view(-1),
            packed.view(len(packed), ranks, shard_size).transpose(0, 1).reshape(-1),
            [len(nodes) * shard_size for nodes in nodes_of_ranks],
            [len(packed) * shard_size] * ranks,
        )
        return received

    def _nodes_of_ranks(self, step: Step) -> list[list[tuple[int, int]]]:
        return [nodes_of(first, last, len(step.micro_batches)) for first, last in step.ranks]

    def _summands(self) -> Leaf:
        """Tensors of the shapes and strides of a leaf."""
        return [*self._parameters.values(), *self._statistics.buffers]

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """Memory that is kept from step to step: allocating it anew costs as much as filling it."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            dtype = _common_dtype(self._summands())
            self._buffers[name] = torch.empty(size, dtype=dtype, device=self._ranks.device)
        return self._buffers[name][:size].view(shape)


def _add(left: Leaf, right: Leaf) -> Leaf:
    if left:
        torch._foreach_add_(left, right)
    return left


def _packed(tensor: Tensor, like: Tensor) -> Tensor:
    """The elements of `tensor` in the order in which `like` has them in memory, `(n,)`."""
    return tensor.permute(_memory_order(like)).reshape(-1)


def _unpacked(flat: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_packed`: a view of `flat` with the shape and the memory order of `like`.

    A norm sums in memory order, so a channels_last gradient must come back as one.
    """
    order = _memory_order(like)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([like.shape[dim] for dim in order]).permute(inverse)


def _memory_order(tensor: Tensor) -> list[int]:
    """The dimensions from the largest stride to the smallest."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=strides.__getitem__, reverse=True)


def _common_dtype(tensors: Leaf) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        names = ", ".join(sorted(map(str, dtypes)))
        raise ConfigError("run.reproducibility", f"bitwise needs parameters of one dtype, and the model has {names}")
    return dtypes.pop()
