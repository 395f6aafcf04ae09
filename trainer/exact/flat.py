"""Standard mode's reduction where the gradients of all ranks are summed after the backward, not within it.

For micro-batches that are replayed from graphs (`train.cuda_graphs`): a replay has no backward in which DDP could send
anything. Nothing of the exchange lies in a micro-batch, so one rank may replay what another runs eager.
"""

from __future__ import annotations

from contextlib import nullcontext

from trainer.exact.flat_sum import FlatSum
from trainer.exact.plan import Step
from trainer.exact.running_statistics import RunningStatistics, StatisticsShare
from trainer.exact.standard import StandardReduction


class FlatReduction(StandardReduction):
    """As `StandardReduction`, without DDP."""

    def _wrap(self) -> RunningStatistics:
        # As DDP does, for weights that ranks have drawn for themselves.
        for tensor in [*self._module.parameters(), *self._module.buffers()]:
            self._ranks.broadcast_tensor(tensor)
        self._flat_sum: FlatSum | None = None
        self._has_ddp = False
        self._alone = nullcontext(self._module)
        return StatisticsShare(self._module, self._section, self._ranks, self._loss)

    def _sum_over_ranks(self, step: Step) -> None:
        if self._ranks.count == 1 or not self._parameters:
            return
        if self._flat_sum is None:
            self._flat_sum = FlatSum(self._ranks, list(self._parameters.values()))
        self._flat_sum.sum_()

    def _leave_out_unused_of_loss(self) -> None:
        super()._leave_out_unused_of_loss()
        self._flat_sum = None  # its layout has all parameters
