"""The reduction of standard mode: DDP sums gradients, and each rank keeps a share of the running statistics.

DDP averages over ranks bucket by bucket, during a rank's last backward; in the micro-batches before that one,
gradients only accumulate. A step in which some rank has nothing to do, which every rank knows from the plan, runs
without DDP and is summed after the backward. DDP would wait for that rank for ever: in the backward and, early in a
run, even in the forward, where the ranks agree on the buckets.

DDP also waits for ever where a rank's last micro-batch leaves a parameter out: on the other ranks in the backward, and
on that rank until its next forward fails. Which parameters a micro-batch uses can depend on its pixels, so the rank
completes its backward: `trainer.exact.completion`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from trainer.exact.completion import complete_backward, is_complete
from trainer.exact.plan import IndexRange, Step
from trainer.exact.reduction import Reduction
from trainer.exact.running_statistics import RunningStatistics, StatisticsShare


class StandardReduction(Reduction):
    """Equal mathematics on any number of ranks; the order of additions is DDP's."""

    _statistics: StatisticsShare

    def _wrap(self) -> RunningStatistics:
        self._model = self._ranks.prepare(
            self._module, find_unused_parameters=self._find_unused_parameters
        )
        self._ranks_averaged_over = self._ranks.count
        return StatisticsShare(self._module, self._section, self._ranks, self._loss)

    def micro_batch(
        self, step: Step, indices: IndexRange
    ) -> AbstractContextManager[nn.Module]:
        self._statistics.micro_batch(indices)
        self._moving.micro_batch()
        if step.has_idle_rank:
            return nullcontext(self._module)
        _, end = indices
        _, end_of_rank = step.ranks[self._ranks.rank]
        if self._ranks.count == 1:
            return nullcontext(self._model)
        if end == end_of_rank:
            return self._with_synchronization()
        return self._without_synchronization()

    @contextmanager
    def _with_synchronization(self) -> Iterator[nn.Module]:
        yield self._model
        # With find_unused_parameters, DDP itself looks for them.
        if not self._find_unused_parameters and not is_complete(self._model):
            complete_backward(self._model, self._parameters)

    @contextmanager
    def _without_synchronization(self) -> Iterator[nn.Module]:
        with self._ranks.accelerator.no_sync(self._model):
            yield self._model

    def finish(self, step: Step) -> None:
        self._statistics.finish(step)
        super().finish(step)

    def _sum_over_ranks(self, step: Step) -> None:
        # DDP knows the model's parameters alone.
        summed_here = self._parameters if step.has_idle_rank else self._loss_parameters
        if self._ranks.count == 1 or not summed_here:
            return
        parameters = list(summed_here.values())
        has_gradient = [parameter.grad is not None for parameter in parameters]
        is_used = self._ranks.any_rank_each(has_gradient)
        for parameter, used in zip(parameters, is_used, strict=True):
            if not used:
                continue
            # Every rank takes part in the sum, also one whose micro-batches did not use the parameter.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._ranks.sum_(parameter.grad).div_(self._ranks_averaged_over)
