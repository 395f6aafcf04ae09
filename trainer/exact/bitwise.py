"""Gradients and BatchNorm statistics that are the same, bit for bit, on any number of ranks.

Every micro-batch is a leaf: its gradient, and what it changes of the running statistics. Leaves are summed by the
fixed tree of `trainer.exact.tree`. A rank folds its own range; the nodes that are left are exchanged in shards, each
rank finishes the tree on its shard, and the results are gathered. Communication moves data and never adds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.config.schema import BatchNormConfig
from trainer.errors import ConfigError
from trainer.exact.batch_norm import RunningStatistics
from trainer.exact.plan import IndexRange, Step
from trainer.exact.standard import Gradients
from trainer.exact.tree import TreeSum, nodes_of
from trainer.process.ranks import Ranks

Leaf = list[Tensor]


class LeafStatistics(RunningStatistics):
    """Running statistics of which each micro-batch starts from the step's start and leaves a difference.

    With momentum m and M micro-batches, the v-th one's difference Δ_v counts (1-m)^(M-1-v): their sum, added to
    the statistics that the step began with, is what a sequential pass leaves.
    """

    def __init__(self, model: nn.Module, section: BatchNormConfig, ranks: Ranks) -> None:
        super().__init__(model, section, ranks)
        self._shared = False  # every rank holds the true statistics, always
        self._kept: list[float] = []  # of each statistic, what one micro-batch leaves of it

    def begin(self, step: Step) -> None:
        super().begin(step)
        self._start = [statistic.clone() for statistic in self.statistics]
        self._counted = [counter.clone() for counter in self._counters]

    def enter(self) -> None:
        """Before a micro-batch: the statistics that the step began with."""
        if self.statistics:
            torch._foreach_copy_(self.statistics, self._start)

    def difference(self, step: Step, index: int) -> Leaf:
        """After a micro-batch: what it changed, aged for those after it."""
        if not self.statistics:
            return []
        if self._calls is None:
            first = step.ranks[self._ranks.rank][0]
            pairs = zip(self._counters, self._counted, strict=True)
            self._calls = [(int(now) - int(then)) // (index + 1 - first) for now, then in pairs]
        later = len(step.micro_batches) - 1 - index
        changes = list(torch._foreach_sub(self.statistics, self._start))
        torch._foreach_mul_(changes, [kept**later for kept in self._kept_by_each()])
        return changes

    def finish(self, step: Step, changes: Leaf) -> None:
        """After the step: its start and the sum of all differences; counters of all micro-batches."""
        if not self.statistics:
            return
        torch._foreach_add_(self._start, changes)
        torch._foreach_copy_(self.statistics, self._start)
        own = step.ranks[self._ranks.rank]
        if self._calls is not None:
            for counter, calls in zip(self._counters, self._calls, strict=True):
                counter.add_(calls * (len(step.micro_batches) - (own[1] - own[0])))

    def _kept_by_each(self) -> list[float]:
        assert self._calls is not None
        kept = []
        for layer, counted in zip(self._layers, self._calls, strict=True):
            calls = counted if isinstance(layer, _BatchNorm) else 1  # instance norms do not count theirs
            kept += [(1.0 - (layer.momentum or 0.0)) ** calls] * 2  # mean and variance
        return kept


class TreeGradients(Gradients):
    """Gradients summed by a fixed tree.

    At most about log2(M) of a rank's own are held at once; on several ranks as many again, twice, are kept for the
    exchange, and one for its result.
    """

    def __init__(self, module: nn.Module, ranks: Ranks, statistics: LeafStatistics, *, may_be_unused: bool) -> None:
        super().__init__(module, module, ranks, may_be_unused=may_be_unused)
        self._averaged_over = 1
        self._statistics = statistics
        self._fold: TreeSum[Leaf] | None = None
        self._has_gradient = dict.fromkeys(self._parameters, False)
        self._buffers: dict[str, Tensor] = {}

    @contextmanager
    def leaf(self, step: Step, indices: IndexRange) -> Iterator[None]:
        index = indices[0]  # alone in its forward: batch.fuse is refused
        if self._fold is None:
            self._fold = TreeSum(len(step.micro_batches), _add)
        self._statistics.enter()
        sibling = self._fold.take((0, index - 1)) if index % 2 else None
        if sibling is not None:
            self._put_back(sibling)
        yield
        gradients, changes = self._harvest(), self._statistics.difference(step, index)
        if sibling is None:
            self._fold.push((0, index), [*gradients, *changes])
        else:
            self._fold.push((1, index // 2), [*gradients, *_add(sibling[len(gradients) :], changes)])

    def _put_back(self, sibling: Leaf) -> None:
        """Let the backward itself add to a left sibling's gradients: the same sums, while they are in the cache."""
        for (name, parameter), gradient in zip(self._parameters.items(), sibling, strict=False):
            parameter.grad = gradient if self._has_gradient[name] else None

    def _harvest(self) -> Leaf:
        """Take the gradients away; a parameter that was not used adds -0, which leaves every number as it is."""
        gradients = []
        for name, parameter in self._parameters.items():
            self._has_gradient[name] |= parameter.grad is not None
            gradients.append(torch.full_like(parameter, -0.0) if parameter.grad is None else parameter.grad)
            parameter.grad = None
        return gradients

    def _combine(self, step: Step) -> None:
        fold = self._fold or TreeSum[Leaf](len(step.micro_batches), _add)
        total = fold.root() if self._ranks.count == 1 else self._exchange(step, fold)
        self._fold = None
        used = list(self._has_gradient.values())
        if self._may_be_unused or step.has_idle_rank:
            used = self._used(used)  # no gradient and a zero one are not the same to an optimizer
        for parameter, gradient, was_used in zip(self._parameters.values(), total, used, strict=False):
            parameter.grad = gradient if was_used else None
        self._has_gradient = dict.fromkeys(self._parameters, False)
        self._statistics.finish(step, total[len(self._parameters) :])

    def _exchange(self, step: Step, fold: TreeSum[Leaf]) -> Leaf:
        """The root, from the nodes of all ranks: shards out, the tree finished on each, shards back."""
        ranks, leaves = self._ranks.count, len(step.micro_batches)
        like = [*self._parameters.values(), *self._statistics.statistics]
        sizes = [tensor.numel() for tensor in like]
        length = -(-sum(sizes) // ranks)
        layout = [nodes_of(*own, leaves) for own in step.ranks]
        own = self._buffer("own", len(fold.nodes), ranks * length)
        for row, (_, leaf) in zip(own, fold.nodes, strict=True):
            torch.cat([tensor.reshape(-1) for tensor in leaf], out=row[: sum(sizes)])
        received = self._buffer("received", sum(map(len, layout)), length)
        distributed.all_to_all_single(
            received.view(-1),
            own.view(len(own), ranks, length).transpose(0, 1).reshape(-1),
            [len(nodes) * length for nodes in layout],
            [len(own) * length] * ranks,
        )
        finished: TreeSum[Tensor] = TreeSum(leaves, Tensor.add_)
        for node, shard in zip([node for nodes in layout for node in nodes], received, strict=True):
            finished.push(node, shard)
        whole = self._buffer("whole", ranks, length)
        self._ranks.all_gather_by_sends(finished.root(), whole)
        parts = torch.split(whole.view(-1)[: sum(sizes)], sizes)
        return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """Memory that is kept from step to step: getting it anew costs as much as filling it."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            dtype = _one_dtype([*self._parameters.values(), *self._statistics.statistics])
            self._buffers[name] = torch.empty(size, dtype=dtype, device=self._ranks.device)
        return self._buffers[name][:size].view(shape)


def _add(left: Leaf, right: Leaf) -> Leaf:
    if left:
        torch._foreach_add_(left, right)
    return left


def _one_dtype(tensors: Leaf) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        named = ", ".join(sorted(map(str, dtypes)))
        raise ConfigError("run.reproducibility", f"bitwise needs parameters of one dtype, and the model has {named}")
    return dtypes.pop()
