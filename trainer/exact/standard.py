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

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn

from trainer.exact.compiled import is_compiled
from trainer.exact.completion import complete_backward, is_complete
from trainer.exact.flat_sum import FlatSum
from trainer.exact.plan import IndexRange, Step
from trainer.exact.reduction import Reduction, refuse_sparse_gradients
from trainer.exact.running_statistics import RunningStatistics, StatisticsShare

EXCHANGES_UNTIL_BUCKETS = 2  # are in the order in which gradients come


class _Synchronized(AbstractContextManager[nn.Module]):
    """The context of a rank's last micro-batch, in whose backward DDP adds up the gradients of all ranks."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self._model = model
        self._parameters = parameters
        self.count = 0  # of those that have ended

    def __enter__(self) -> nn.Module:
        return self._model

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            # On its way in DDP, such a gradient fails with words of torch's.
            refuse_sparse_gradients(self._parameters)
            return
        self.count += 1
        if not is_complete(self._model):
            complete_backward(self._model, self._parameters)


class StandardReduction(Reduction):
    """Equal mathematics on any number of ranks; the order of additions is DDP's."""

    _statistics: StatisticsShare

    def _wrap(self) -> RunningStatistics:
        # Without DDP's own search for unused parameters. In steps without DDP it would note what is used as well, and
        # fail where the next step does not use it.
        self._model = self._ranks.prepare(self._module)
        self._ranks_averaged_over = self._ranks.count
        self._has_ddp = self._ranks.count > 1
        # Contexts, made once.
        self._alone = nullcontext(self._module)
        self._is_compiled = is_compiled(self._module)
        self._in_step_with_others = _Synchronized(self._model, self._parameters)
        return StatisticsShare(self._module, self._section, self._ranks, self._loss)

    def micro_batch(
        self, step: Step, indices: IndexRange
    ) -> AbstractContextManager[nn.Module]:
        if self._statistics.is_on:
            self._statistics.micro_batch(indices)
        if self._moving.has_candidates:
            self._moving.micro_batch()
        if step.has_idle_rank or not self._has_ddp:
            return self._alone
        _, end = indices
        _, end_of_rank = step.ranks[self._ranks.rank]
        if end == end_of_rank:
            return self._in_step_with_others
        has_buckets = self._in_step_with_others.count >= EXCHANGES_UNTIL_BUCKETS
        if has_buckets and not self._is_compiled:
            # DDP expects no gradients after a forward of the module itself, and takes no time.
            return self._alone
        return self._without_synchronization()

    @contextmanager
    def _without_synchronization(self) -> Iterator[nn.Module]:
        """DDP's own way to let gradients add up.

        At first DDP arranges its buckets anew at the next forward, and would round gradients that are there by then in
        another way. And within DDP's forward a model is compiled in pieces, whose gradients DDP sends early.
        """
        with self._ranks.accelerator.no_sync(self._model):
            yield self._model

    def finish(self, step: Step) -> None:
        if self._statistics.is_on:
            self._statistics.finish(step)
        super().finish(step)

    def _sum_over_ranks(self, step: Step) -> None:
        # DDP knows the model's parameters alone.
        summed_here = self._parameters if step.has_idle_rank else self._loss_parameters
        if self._ranks.count == 1 or not summed_here:
            return
        parameters = list(summed_here.values())
        # Made anew each time: kept, it would hold memory that few steps need.
        FlatSum(self._ranks, parameters).sum_()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self._ranks_averaged_over)
