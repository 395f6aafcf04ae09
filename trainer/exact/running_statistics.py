"""Running statistics of norm layers that do not depend on the number of ranks.

A micro-batch is normalised by its own statistics. The running statistics end a step as one process would leave
them that runs the step's micro-batches in order: with momentum m and M micro-batches whose statistics are s_v,

    r_M = (1-m)^M r_0 + Σ_v m (1-m)^(M-1-v) s_v.

Training never reads them and they are linear in the s_v. So they can be computed in parts and added up later.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from trainer.config.schema import BatchNormConfig
from trainer.exact.batch_norm import is_held, norm_layers
from trainer.exact.plan import Step
from trainer.process.ranks import Ranks


class NormLayer:
    """One norm layer: its `buffers` (mean and variance), its `counter` of calls, and its calls in a micro-batch."""

    def __init__(self, module: _NormBase) -> None:
        assert module.running_mean is not None
        assert module.running_var is not None
        assert module.num_batches_tracked is not None
        self.buffers = [module.running_mean, module.running_var]
        self.counter = module.num_batches_tracked
        self.calls = 1
        # Instance norms have a counter and do not use it.
        self.counts_calls = isinstance(module, _BatchNorm)
        self._module = module
        self._configured_momentum = float(module.momentum or 0.0)

    def restore_momentum(self) -> None:
        """Update by the momentum that the layer was built with."""
        self._module.momentum = self._configured_momentum

    def spread_momentum(self, updates: int) -> None:
        """Make n updates together age the statistics as one would: each with momentum 1 - (1 - m)^(1/n)."""
        self._module.momentum = 1.0 - (1.0 - self._configured_momentum) ** (
            1.0 / updates
        )

    def decay(self) -> float:
        """What one micro-batch leaves of the statistics before it: (1 - momentum)^calls."""
        return (1.0 - (self._module.momentum or 0.0)) ** self.calls


class RunningStatistics(ABC):
    """The running statistics of a model's trained norm layers, and the momentum with which they are updated.

    `buffers` holds the mean and the variance of each layer. Every layer must be called equally often in each
    micro-batch; how often is counted in the first step.
    """

    def __init__(
        self, model: nn.Module, section: BatchNormConfig, ranks: Ranks
    ) -> None:
        self._ranks = ranks
        self._layers: list[NormLayer] = []
        self.buffers: list[Tensor] = []
        for module in norm_layers(model):
            if not is_held(module):
                layer = NormLayer(module)
                self._layers.append(layer)
                self.buffers += layer.buffers
        self._counters = [layer.counter for layer in self._layers]
        self._calls_are_counted = False
        self._momentum_is_per_step = section.momentum_per == "step"
        self._micro_batches_per_update = ranks.count if section.mode == "sync" else 1
        # Over which each momentum is spread at present; 0: as the layers were built.
        self._updates_per_step = 0

    @abstractmethod
    def begin(self, step: Step) -> None:
        """Prepare for the micro-batches of `step`."""

    @abstractmethod
    def gather(self) -> None:
        """Put the true statistics on every rank. A collective; cheap where nothing has changed."""

    def restart(self) -> None:
        """Go on from statistics that were put into the layers from outside: every rank holds the true ones."""
        return

    def restore_momentum(self) -> None:
        """Give the layers their own momentum back."""
        for layer in self._layers:
            layer.restore_momentum()
        self._updates_per_step = 0

    def _must_spread_momentum(self, step: Step) -> bool:
        """True if `momentum_per: step` asks for another momentum than that of the step before."""
        return (
            self._momentum_is_per_step
            and self._updates_of(step) != self._updates_per_step
        )

    def _spread_momentum(self, step: Step) -> None:
        self._updates_per_step = self._updates_of(step)
        for layer in self._layers:
            layer.spread_momentum(self._updates_per_step)

    def _updates_of(self, step: Step) -> int:
        return len(step.micro_batches) // self._micro_batches_per_update

    def _read_counters(self) -> list[int]:
        """The counter of every layer. Waits for the device, so only the first step calls it."""
        return [int(counter) for counter in self._counters]

    def _count_calls(self, counts_before: list[int], micro_batches: int) -> None:
        """Set the calls of each layer in a micro-batch, from its counter `micro_batches` ago and now."""
        self._calls_are_counted = True
        for layer, before, now in zip(
            self._layers, counts_before, self._read_counters(), strict=True
        ):
            if layer.counts_calls:
                layer.calls = (now - before) // micro_batches


class StatisticsShare(RunningStatistics):
    """Each rank keeps a share, and the sum of all shares is the true statistics.

    A rank updates its share on its own micro-batches and ages it for those of the others, so a step needs no
    communication. Shares are added up by `gather`, when somebody reads them. Under SyncBatchNorm, where torch
    updates every rank alike, and on one rank, there is nothing to share.
    """

    def __init__(
        self, model: nn.Module, section: BatchNormConfig, ranks: Ranks
    ) -> None:
        super().__init__(model, section, ranks)
        self._is_shared = (
            ranks.count > 1 and section.mode == "micro" and bool(self._layers)
        )
        self._is_gathered = True  # every rank holds the true statistics, not its share
        # Of the ranks after this one, in the last step.
        self._micro_batches_to_age_for = 0
        self._counts_before_first_step: list[int] | None = None
        self._micro_batches_in_first_step = 0  # of this rank
        self._buffers_by_decay: dict[float, list[Tensor]] = {}

    def begin(self, step: Step) -> None:
        self._count_calls_of_first_step()
        if self._must_spread_momentum(step):
            self._age(0)  # for the past micro-batches, with the momentum that they had
            self._spread_momentum(step)
            self._buffers_by_decay = {}
        if not self._is_shared:
            return
        first, end = step.ranks[self._ranks.rank]
        if self._is_gathered:
            self._scatter()
        else:
            self._age(first)
        self._micro_batches_to_age_for = len(step.micro_batches) - end
        if self._counts_before_first_step is None and end > first:
            self._counts_before_first_step = self._read_counters()
            self._micro_batches_in_first_step = end - first

    def gather(self) -> None:
        if not self._is_shared or self._is_gathered:
            return
        self._count_calls_of_first_step()
        self._age(0)
        self._sum_over_ranks(self.buffers)
        self._sum_over_ranks(self._counters)
        self._is_gathered = True

    def restart(self) -> None:
        self._is_gathered = True
        self._micro_batches_to_age_for = 0

    def _scatter(self) -> None:
        """Leave the statistics with rank 0 alone. It runs first, so its share need not age for others yet."""
        if not self._ranks.is_main:
            torch._foreach_zero_([*self.buffers, *self._counters])
        self._is_gathered = False

    def _age(self, micro_batches: int) -> None:
        """Age this rank's share for micro-batches of other ranks: `micro_batches`, and those after its own last one."""
        micro_batches += self._micro_batches_to_age_for
        self._micro_batches_to_age_for = 0
        if not self._is_shared or self._is_gathered or not micro_batches:
            return
        if not self._calls_are_counted:
            return  # this rank has run nothing yet, so its share is empty
        if not self._buffers_by_decay:
            self._group_by_decay()
        for decay, buffers in self._buffers_by_decay.items():
            torch._foreach_mul_(buffers, decay**micro_batches)

    def _group_by_decay(self) -> None:
        """Collect the buffers that one operation can age together."""
        for layer in self._layers:
            decay = layer.decay()
            if decay != 1.0:
                self._buffers_by_decay.setdefault(decay, []).extend(layer.buffers)

    def _count_calls_of_first_step(self) -> None:
        if not self._calls_are_counted and self._counts_before_first_step is not None:
            self._count_calls(
                self._counts_before_first_step, self._micro_batches_in_first_step
            )

    def _sum_over_ranks(self, tensors: list[Tensor]) -> None:
        """Add up some tensors over all ranks, in place, in one operation."""
        total = self._ranks.sum_(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, part in zip(tensors, torch.split(total, sizes), strict=True):
            tensor.copy_(part.view_as(tensor))


class StatisticsDifferences(RunningStatistics):
    """Every micro-batch starts from the step's first statistics and leaves a difference.

    With momentum m and M micro-batches, the difference of the v-th counts (1-m)^(M-1-v). Their sum, added to what
    the step began with, is what a sequential pass leaves. Every rank holds the true statistics between steps.
    """

    def begin(self, step: Step) -> None:
        if self._must_spread_momentum(step):
            self._spread_momentum(step)
        self._start = [buffer.clone() for buffer in self.buffers]
        if not self._calls_are_counted:
            self._counts_at_start = self._read_counters()

    def gather(self) -> None:
        """Nothing to do: every rank holds the true statistics."""

    def reset(self) -> None:
        """Before a micro-batch: put back what the step began with."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self._start)

    def difference(self, step: Step, index: int) -> list[Tensor]:
        """After micro-batch `index`: how much it changed each buffer, aged for the micro-batches after it."""
        if not self.buffers:
            return []
        if not self._calls_are_counted:
            first = step.ranks[self._ranks.rank][0]
            self._count_calls(self._counts_at_start, index + 1 - first)
        micro_batches_after = len(step.micro_batches) - 1 - index
        factors: list[float] = []
        for layer in self._layers:
            factor = layer.decay() ** micro_batches_after
            factors += [factor, factor]  # for the mean and for the variance
        differences = list(torch._foreach_sub(self.buffers, self._start))
        torch._foreach_mul_(differences, factors)
        return differences

    def finish(self, step: Step, differences: list[Tensor]) -> None:
        """After the step: its start plus the sum of all `differences`; counters of all micro-batches."""
        if not self.buffers:
            return
        torch._foreach_add_(self._start, differences)
        torch._foreach_copy_(self.buffers, self._start)
        if not self._calls_are_counted:
            return
        first, end = step.ranks[self._ranks.rank]
        micro_batches_of_others = len(step.micro_batches) - (end - first)
        for layer in self._layers:
            if layer.counts_calls:
                layer.counter.add_(layer.calls * micro_batches_of_others)
