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


class RunningStatistics(ABC):
    """The running statistics of a model's trained norm layers, and the momentum with which they are updated.

    `buffers` holds the mean and the variance of each layer. Every layer must be called equally often in each
    micro-batch; how often is counted in the first step.
    """

    def __init__(self, model: nn.Module, section: BatchNormConfig, ranks: Ranks) -> None:
        self._ranks = ranks
        self._layers = [layer for layer in norm_layers(model) if not is_held(layer)]
        self._momenta = [float(layer.momentum or 0.0) for layer in self._layers]
        self.buffers = [buffer for layer in self._layers for buffer in _mean_and_variance(layer)]
        self._counters = [_counter(layer) for layer in self._layers]
        self._calls: list[int] | None = None  # of each layer, in one micro-batch
        self._momentum_is_per_step = section.momentum_per == "step"
        self._micro_batches_per_update = ranks.count if section.mode == "sync" else 1
        self._updates_per_step = 0  # over which each momentum is spread at present; 0: as the layers have it

    @abstractmethod
    def begin(self, step: Step) -> None:
        """Make ready for the micro-batches of `step`."""

    @abstractmethod
    def gather(self) -> None:
        """Put the true statistics on every rank. A collective; cheap where nothing has changed."""

    def restore_momentum(self) -> None:
        """Give the layers their own momentum back."""
        for layer, momentum in zip(self._layers, self._momenta, strict=True):
            layer.momentum = momentum
        self._updates_per_step = 0

    def _must_spread_momentum(self, step: Step) -> bool:
        """True if `momentum_per: step` asks for another momentum than that of the step before."""
        return self._momentum_is_per_step and self._updates_of(step) != self._updates_per_step

    def _spread_momentum(self, step: Step) -> None:
        """Make the step's n updates together age the statistics as one would: each with 1 - (1 - m)^(1/n)."""
        updates = self._updates_of(step)
        for layer, momentum in zip(self._layers, self._momenta, strict=True):
            layer.momentum = 1.0 - (1.0 - momentum) ** (1.0 / updates)
        self._updates_per_step = updates

    def _updates_of(self, step: Step) -> int:
        return len(step.micro_batches) // self._micro_batches_per_update

    def _count_calls(self, before: list[int], micro_batches: int) -> None:
        """Set the calls of each layer in a micro-batch, from its counter `micro_batches` ago and now."""
        self._calls = []
        for layer, counter, start in zip(self._layers, self._counters, before, strict=True):
            # Instance norms are called once and do not count it.
            is_counted = isinstance(layer, _BatchNorm)
            self._calls.append((int(counter) - start) // micro_batches if is_counted else 1)

    def _decays(self) -> list[float]:
        """What one micro-batch leaves of the statistics of each layer: (1 - momentum)^calls."""
        assert self._calls is not None
        pairs = zip(self._layers, self._calls, strict=True)
        return [(1.0 - (layer.momentum or 0.0)) ** calls for layer, calls in pairs]


class StatisticsShare(RunningStatistics):
    """Each rank keeps a share, and the sum of all shares is the true statistics.

    A rank updates its share on its own micro-batches and ages it for those of the others, so a step needs no
    communication. Shares are added up by `gather`, when somebody reads them. Under SyncBatchNorm, where torch
    updates every rank alike, and on one rank, there is nothing to share.
    """

    def __init__(self, model: nn.Module, section: BatchNormConfig, ranks: Ranks) -> None:
        super().__init__(model, section, ranks)
        self._is_shared = ranks.count > 1 and section.mode == "micro" and bool(self._layers)
        self._is_gathered = True  # every rank holds the true statistics, not its share
        self._unaged = 0  # micro-batches of later ranks for which this share has not aged yet
        self._first_step: tuple[list[int], int] | None = None  # counters before it, this rank's micro-batches in it
        self._buffers_by_decay: dict[float, list[Tensor]] = {}

    def begin(self, step: Step) -> None:
        self._count_calls_of_first_step()
        if self._must_spread_momentum(step):
            self._age(0)  # for the past micro-batches, with the momentum that they had
            self._spread_momentum(step)
            self._buffers_by_decay = {}
        if not self._is_shared:
            return
        first, last = step.ranks[self._ranks.rank]
        if self._is_gathered:
            self._scatter()
        else:
            self._age(first)
        self._unaged = len(step.micro_batches) - last
        if self._first_step is None and last > first:
            counts = [int(counter) for counter in self._counters]
            self._first_step = counts, last - first

    def gather(self) -> None:
        if not self._is_shared or self._is_gathered:
            return
        self._count_calls_of_first_step()
        self._age(0)
        for tensors in (self.buffers, self._counters):
            total = self._ranks.sum_(torch.cat([tensor.reshape(-1) for tensor in tensors]))
            sizes = [tensor.numel() for tensor in tensors]
            for tensor, part in zip(tensors, torch.split(total, sizes), strict=True):
                tensor.copy_(part.view_as(tensor))
        self._is_gathered = True

    def _scatter(self) -> None:
        """Leave the statistics with rank 0 alone. It runs first, so its share has not to age for others yet."""
        if not self._ranks.is_main:
            torch._foreach_zero_([*self.buffers, *self._counters])
        self._is_gathered = False

    def _age(self, more: int) -> None:
        """Age this rank's share for the micro-batches of others: those still due, and `more`."""
        micro_batches = self._unaged + more
        self._unaged = 0
        if not self._is_shared or self._is_gathered or not micro_batches:
            return
        if self._calls is None:
            return  # this rank has run nothing yet, so its share is empty
        if not self._buffers_by_decay:
            self._group_by_decay()
        for decay, buffers in self._buffers_by_decay.items():
            torch._foreach_mul_(buffers, decay**micro_batches)

    def _count_calls_of_first_step(self) -> None:
        if self._calls is None and self._first_step is not None:
            self._count_calls(*self._first_step)

    def _group_by_decay(self) -> None:
        for layer, decay in zip(self._layers, self._decays(), strict=True):
            if decay != 1.0:
                self._buffers_by_decay.setdefault(decay, []).extend(_mean_and_variance(layer))


class StatisticsDifferences(RunningStatistics):
    """Every micro-batch starts from the step's first statistics and leaves a difference.

    With momentum m and M micro-batches, the difference of the v-th counts (1-m)^(M-1-v). Their sum, added to what
    the step began with, is what a sequential pass leaves. Every rank holds the true statistics between steps.
    """

    def begin(self, step: Step) -> None:
        if self._must_spread_momentum(step):
            self._spread_momentum(step)
        self._start = [buffer.clone() for buffer in self.buffers]
        self._counters_at_start = [counter.clone() for counter in self._counters]

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
        if self._calls is None:
            first = step.ranks[self._ranks.rank][0]
            before = [int(counter) for counter in self._counters_at_start]
            self._count_calls(before, index + 1 - first)
        later = len(step.micro_batches) - 1 - index
        factors: list[float] = []
        for decay in self._decays():
            factors += [decay**later] * 2  # for the mean and for the variance
        differences = list(torch._foreach_sub(self.buffers, self._start))
        torch._foreach_mul_(differences, factors)
        return differences

    def finish(self, step: Step, differences: list[Tensor]) -> None:
        """After the step: its start plus the sum of all `differences`; counters of all micro-batches."""
        if not self.buffers:
            return
        torch._foreach_add_(self._start, differences)
        torch._foreach_copy_(self.buffers, self._start)
        if self._calls is None:
            return
        first, last = step.ranks[self._ranks.rank]
        of_others = len(step.micro_batches) - (last - first)
        for layer, counter, calls in zip(self._layers, self._counters, self._calls, strict=True):
            if isinstance(layer, _BatchNorm):
                counter.add_(calls * of_others)


def _mean_and_variance(layer: _NormBase) -> list[Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return [layer.running_mean, layer.running_var]


def _counter(layer: _NormBase) -> Tensor:
    assert layer.num_batches_tracked is not None
    return layer.num_batches_tracked
