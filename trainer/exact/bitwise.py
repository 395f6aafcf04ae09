"""The reduction of bitwise mode: the same bits on any number of ranks.

A sum of floats depends on the order of its additions, so that order is fixed: the tree of `trainer.exact.tree`, over
the step's micro-batches. What a micro-batch contributes is its gradient and its change of the running statistics. A
rank sums its own range of the tree, and `trainer.exact.exchange` finishes the tree over all ranks.

A rank holds about log2(M) contributions at once. On several ranks the exchange keeps two buffers of that size, and
one of a single contribution.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.exact.exchange import ShardExchange
from trainer.exact.plan import IndexRange, Step
from trainer.exact.reduction import Reduction
from trainer.exact.running_statistics import RunningStatistics, StatisticsDifferences
from trainer.exact.tree import Node, TreeSum

# The gradient of each parameter, then the difference of each running statistic.
Contribution = list[Tensor]


class BitwiseReduction(Reduction):
    """Gradients and statistics summed by a fixed tree over the step's micro-batches."""

    _statistics: StatisticsDifferences

    def _wrap(self) -> RunningStatistics:
        self._ranks.broadcast_parameters(self._module)
        self._has_gradient = dict.fromkeys(self._parameters, False)
        self._exchange: ShardExchange | None = None
        return StatisticsDifferences(
            self._module, self._section, self._ranks, self._loss
        )

    def begin(self, step: Step) -> None:
        super().begin(step)
        self._tree_sum: TreeSum[Contribution] = TreeSum(len(step.micro_batches), _add)

    @contextmanager
    def micro_batch(self, step: Step, indices: IndexRange) -> Iterator[nn.Module]:
        # The only one: the config refuses batch.fuse in bitwise mode.
        index = indices[0]
        node = Node(0, index)
        self._statistics.reset()
        if self._moving.has_candidates:
            self._moving.micro_batch()
        sibling = self._tree_sum.pop(node.left_sibling) if node.is_right else None
        if sibling is not None:
            self._put_back_gradients(sibling)
        yield self._module
        gradients = self._take_gradients()
        differences = self._statistics.difference(step, index)
        if sibling is not None:
            # The backward has made the parent's sum of gradients already.
            node = node.parent
            differences = _add(sibling[len(gradients) :], differences)
        self._tree_sum.push(node, gradients + differences)

    def _put_back_gradients(self, sibling: Contribution) -> None:
        """Let the backward itself add to the left sibling's gradients: the same sums, while they are in the cache."""
        gradients = sibling[: len(self._parameters)]
        for (name, parameter), gradient in zip(
            self._parameters.items(), gradients, strict=True
        ):
            if self._has_gradient[name]:
                parameter.grad = gradient

    def _take_gradients(self) -> list[Tensor]:
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
        # What a rank's own micro-batches use can depend on their pixels, so no rank decides alone. The hosts exchange
        # the flags while the devices exchange the gradients.
        is_used = self._ranks.any_rank_each_async(list(self._has_gradient.values()))
        total = self._total(step)
        self._tree_sum.nodes.clear()  # the optimizer's step needs the memory
        count = len(self._parameters)
        for parameter, gradient, used in zip(
            self._parameters.values(), total[:count], is_used(), strict=True
        ):
            # To an optimizer, no gradient and a zero one are not the same.
            parameter.grad = gradient if used else None
        self._has_gradient = dict.fromkeys(self._parameters, False)
        self._statistics.finish(step, total[count:])

    def gather_statistics(self) -> None:
        """Nothing to do: every rank holds the true statistics."""

    def _leave_out_unused_of_loss(self) -> None:
        super()._leave_out_unused_of_loss()
        if len(self._has_gradient) != len(self._parameters):
            self._has_gradient = dict.fromkeys(self._parameters, False)
            self._exchange = None  # its layout has all parameters

    def _total(self, step: Step) -> Contribution:
        """The sum of all micro-batches of all ranks."""
        if self._ranks.count == 1:
            return self._tree_sum.root()
        if self._exchange is None:
            self._exchange = ShardExchange(
                self._ranks, [*self._parameters.values(), *self._statistics.buffers]
            )
        return self._exchange.sum(step, [value for _, value in self._tree_sum.nodes])


def _add(left: Contribution, right: Contribution) -> Contribution:
    if left:
        torch._foreach_add_(left, right)
    return left
