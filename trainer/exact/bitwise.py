"""The reduction of bitwise mode: the same bits on any number of ranks.

A sum of floats depends on the order of its additions, so that order is fixed: the tree of `trainer.exact.tree`, over
the step's micro-batches. What a micro-batch contributes is its gradient and its change of the running statistics. A
rank sums its own range of the tree, and `trainer.exact.exchange` finishes the tree over all ranks.

A rank holds about log2(M) contributions at once. On several ranks the exchange keeps three buffers of that size (two
where a rank's range is one node of the tree), and one of a single contribution; on two ranks with a node each, two.

Which parameters were used travels with the sums, as a number for each: what a rank's micro-batches use can depend on
their pixels, so no rank knows alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.exact.compiled import is_compiled
from trainer.exact.early_exchange import EarlyExchange
from trainer.exact.exchange import ShardExchange, Terms, buckets_of
from trainer.exact.gradient_pieces import GradientPieces
from trainer.exact.plan import IndexRange, Step
from trainer.exact.reduction import Reduction
from trainer.exact.running_statistics import RunningStatistics, StatisticsDifferences
from trainer.exact.tree import Node, TreeSum

# The gradient of each parameter, then the difference of each running statistic.
Contribution = list[Tensor]
# In a contribution that is still to come.
NOT_YET = torch.empty(0)


class BitwiseReduction(Reduction):
    """Gradients and statistics summed by a fixed tree over the step's micro-batches."""

    _statistics: StatisticsDifferences

    def _wrap(self) -> RunningStatistics:
        self._ranks.broadcast_parameters(self._module)
        self._has_gradient = dict.fromkeys(self._parameters, False)
        self._exchange: ShardExchange | None = None
        # Whether a micro-batch adds to a gradient more than once: known after this rank's first step.
        self._in_pieces = False
        self._knows_pieces = False
        self._is_compiled = is_compiled(self._module)
        return StatisticsDifferences(
            self._module, self._section, self._ranks, self._loss
        )

    def begin(self, step: Step) -> None:
        super().begin(step)
        self._tree_sum: TreeSum[Terms] = TreeSum(len(step.micro_batches), _join)

    @contextmanager
    def micro_batch(self, step: Step, indices: IndexRange) -> Iterator[nn.Module]:
        # The only one: the config refuses batch.fuse in bitwise mode.
        index = indices[0]
        node = Node(0, index)
        self._statistics.reset()
        if self._moving.has_candidates:
            self._moving.micro_batch()
        sibling = None
        if node.is_right and not self._in_pieces:
            sibling = self._tree_sum.pop(node.left_sibling)
        if sibling is not None:
            self._put_back_gradients(sibling[0])
            # The backward makes the parent's sum of gradients.
            node = node.parent
        contribution: Contribution = [NOT_YET] * self._tensors
        self._tree_sum.push(node, [contribution])
        is_last = index + 1 == step.ranks[self._ranks.rank][1]
        watch = self._watch(step, contribution, is_last=is_last)
        with watch or nullcontext():
            yield self._module
        if watch is not None and watch.in_pieces:
            self._note_pieces(watch.in_pieces, is_summed=sibling is not None)
        if not self._knows_pieces:
            self._refuse_sparse_gradients()
        gradients = self._take_gradients()
        differences = self._statistics.difference(step, index)
        if sibling is not None:
            differences = _add(sibling[0][len(gradients) :], differences)
        contribution[:] = gradients + differences
        if is_last:
            self._knows_pieces = True
        if not is_last or self._ranks.count == 1:
            self._add_up()

    def _watch(
        self, step: Step, contribution: Contribution, *, is_last: bool
    ) -> EarlyExchange | GradientPieces | None:
        """What watches the gradients of a micro-batch come, if anything does."""
        if not self._knows_pieces:
            return GradientPieces(self._parameters)
        exchange = self._exchange
        if not is_last or exchange is None or self._in_pieces or self._is_compiled:
            return None
        if len(exchange.buckets) == 1:
            return None
        return EarlyExchange(
            exchange, self._parameters, step, self._terms(), contribution
        )

    def _note_pieces(self, name: str, *, is_summed: bool) -> None:
        """`is_summed` if there was a sum to add to, or one is on its way."""
        if is_summed or self._knows_pieces:
            raise ConfigError(
                "run.reproducibility",
                f"bitwise: a micro-batch changes the gradient of {name} after it is complete, as a backward within the "
                f"backward does, and the first one did not; let all do so (checkpoint without use_reentrant), or set "
                f"it to standard",
            )
        self._in_pieces = True

    def _terms(self) -> list[Terms]:
        return [terms for _, terms in self._tree_sum.nodes]

    def _add_up(self) -> None:
        """Make the sums of the nodes so far. On several ranks, those of the last micro-batch are the exchange's."""
        for _, terms in self._tree_sum.nodes:
            total = terms[0]
            for term in terms[1:]:
                total = _add(total, term)
            terms[:] = [total]

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
        total, is_used = self._total(step)
        self._tree_sum.nodes.clear()  # the optimizer's step needs the memory
        count = len(self._parameters)
        for parameter, gradient, used in zip(
            self._parameters.values(), total[:count], is_used, strict=True
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

    @property
    def _tensors(self) -> int:
        """How many tensors the contribution of a micro-batch has."""
        return len(self._parameters) + len(self._statistics.buffers)

    def _total(self, step: Step) -> tuple[Contribution, list[bool]]:
        """The sum of all micro-batches of all ranks, and whether any of them used each parameter."""
        is_used = list(self._has_gradient.values())
        if self._ranks.count == 1:
            return self._tree_sum.root()[0], is_used
        if self._exchange is None:
            self._exchange = self._new_exchange()
        uses = self._uses(is_used)
        nodes = self._terms()
        for terms in nodes:
            for term in terms:
                term.append(uses)
        *total, uses = self._exchange.sum(step, nodes)
        if not all(is_used):
            # Another rank may have used more. One that used all need not look, and wait for its device.
            is_used = (uses > 0).tolist()
        return total, is_used

    def _uses(self, is_used: list[bool]) -> Tensor:
        """A number above 0 for each parameter that this rank has used, `(parameters,)`, on the device."""
        if all(is_used):
            return self._all_used
        like = self._all_used
        # A copy that the host does not wait for.
        return torch.tensor(is_used, dtype=like.dtype).to(like, non_blocking=True)

    def _new_exchange(self) -> ShardExchange:
        parameters = list(self._parameters.values())
        self._all_used = torch.ones(
            len(parameters), dtype=parameters[0].dtype, device=parameters[0].device
        )
        return ShardExchange(
            self._ranks,
            [*parameters, *self._statistics.buffers, self._all_used],
            # A compiled model's gradients come all at once.
            None if self._is_compiled else buckets_of(parameters, self._tensors + 1),
        )


def _join(left: Terms, right: Terms) -> Terms:
    return right + left


def _add(left: Contribution, right: Contribution) -> Contribution:
    if left:
        torch._foreach_add_(left, right)
    return left
