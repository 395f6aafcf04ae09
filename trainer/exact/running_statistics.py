"""Running statistics of norm layers that do not depend on the number of ranks.

A micro-batch is normalised by its own statistics. The running statistics end a step as one process would leave
them that runs the step's micro-batches in order: with momentum m and M micro-batches whose statistics are s_v,

    r_M = (1-m)^M r_0 + Σ_v m (1-m)^(M-1-v) s_v.

They are linear in the s_v, so they can be computed in parts and added up later, as long as nobody reads them. A layer
in training mode does not. One in eval mode does, whoever put it there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from trainer.config.model_sections import BatchNormConfig
from trainer.errors import ConfigError
from trainer.exact.batch_norm import is_held
from trainer.exact.compiled import is_compiled
from trainer.exact.joint_sum import JointSum
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.norm_layer import CallWatch, NormLayer, refuse_shared_statistics
from trainer.exact.observation import (
    Observation,
    agree_on_calls,
    refuse_uneven_calls,
)
from trainer.exact.plan import IndexRange, Step
from trainer.process.ranks import Ranks


class RunningStatistics(ABC):
    """The running statistics of the norm layers of a model and its loss, and the momentum they are updated with.

    In a step, every micro-batch must call a layer equally often in training mode. How often is counted when the layer
    is first seen to train. Raises `ConfigError`, with the layer's name, where that is not so.
    """

    def __init__(
        self,
        model: nn.Module,
        section: BatchNormConfig,
        ranks: Ranks,
        loss: nn.Module | None = None,
    ) -> None:
        self._ranks = ranks
        self._layers: list[NormLayer] = []
        for name, module in ModelAndLoss(model, loss).named_norm_layers():
            if not is_held(module):
                self._layers.append(NormLayer(name, module))
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


class StatisticsShare(RunningStatistics):
    """Each rank keeps a share, and the sum of all shares is the true statistics.

    A rank updates its share on its own micro-batches and ages it for those of the others, so a step needs no
    communication. Shares are added up by `gather`, when somebody reads them.

    Only what is trained is shared: layers that are in training mode when a step begins and that its micro-batches
    update. All others keep the true statistics on every rank. Which they are is observed in the first step, and again
    whenever a mode has changed: every rank begins that step with the true statistics, and takes what it began with
    out of its share at the end. Under SyncBatchNorm, where torch updates every rank alike, and on one rank, there is
    nothing to share: `is_on` is False, and `micro_batch` and `finish` need not be called.
    """

    def __init__(
        self,
        model: nn.Module,
        section: BatchNormConfig,
        ranks: Ranks,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__(model, section, ranks, loss)
        self._candidates = [
            layer
            for layer in self._layers
            if not isinstance(layer.module, nn.SyncBatchNorm)
        ]
        self.is_on = ranks.count > 1 and bool(self._candidates)
        if self.is_on:
            refuse_shared_statistics(self._layers)
        self._is_compiled = is_compiled(model)
        self._is_gathered = True  # every rank holds the true statistics, not its share
        self._modes: list[bool] = []
        self._watch = CallWatch(self._candidates)
        self._observation: Observation | None = None  # while the step is observed
        self._share: list[NormLayer] = []
        # Of the ranks after this one, in the last step.
        self._micro_batches_to_age_for = 0
        self._buffers_by_decay: dict[float, list[Tensor]] = {}

    def begin(self, step: Step) -> None:
        if self.is_on:
            self._follow_modes()
        if self._momentum_is_per_step and self._must_spread_momentum(step):
            self._age(0)  # for the past micro-batches, with the momentum that they had
            self._spread_momentum(step)
            self._buffers_by_decay = {}
        if not self.is_on or self._observation is not None:
            return
        first, end = step.ranks[self._ranks.rank]
        if self._is_gathered:
            self._scatter()
        else:
            self._age(first)
        self._micro_batches_to_age_for = len(step.micro_batches) - end

    def micro_batch(self, indices: IndexRange) -> None:
        """Before each of this rank's forwards."""
        self.end_micro_batch()
        self._watch.begin(is_fused=indices[1] - indices[0] > 1)

    def finish(self, step: Step) -> None:
        """After the step's last micro-batch of this rank. A collective in a step that is observed."""
        self.end_micro_batch()
        if self._observation is not None:
            self._share_what_moved(step, self._observation)
            self._observation = None

    def gather(self) -> None:
        if not self.is_on or self._is_gathered:
            return
        self._age(0)
        counters = [layer.counter for layer in self._share]
        shares = [*self._buffers(), *counters]
        JointSum(self._ranks, shares).sum_(shares)
        self._is_gathered = True

    def restart(self) -> None:
        self._is_gathered = True
        self._micro_batches_to_age_for = 0

    # ---------------------------------------------------------------- what is shared

    def _follow_modes(self) -> None:
        """Observe the step if a layer has changed its mode. A collective then."""
        modes = [layer.is_training for layer in self._candidates]
        if modes == self._modes:
            return
        self._check_modes(modes)
        self.gather()
        self._modes = modes
        self._watch.forget()
        self._share = []
        self._buffers_by_decay = {}
        in_training = [layer for layer in self._candidates if layer.is_training]
        self._observation = None
        if in_training:
            self._observation = Observation(in_training, is_compiled=self._is_compiled)

    def _check_modes(self, modes: list[bool]) -> None:
        for rank, others in enumerate(self._ranks.gather([modes])):
            for layer, mode, other in zip(self._candidates, modes, others, strict=True):
                if mode != other:
                    raise ConfigError(
                        "model",
                        f'norm layer "{layer.name}" is in training mode on some ranks and in eval mode on others '
                        f"(as on rank {rank}); change its mode on every rank alike",
                    )

    def end_micro_batch(self) -> None:
        """After each of this rank's forwards; called once more it does nothing."""
        name = self._watch.end()
        if name is None:
            return
        if self._observation is None:
            raise refuse_uneven_calls(name)
        self._observation.uneven = name  # all ranks hear of it when the step ends

    def _share_what_moved(self, step: Step, observation: Observation) -> None:
        """Turn the true statistics, which this step began with and its micro-batches moved, into shares."""
        first, end = step.ranks[self._ranks.rank]
        own_count = end - first
        moves = dict(zip(self._candidates, self._watch.moves(), strict=True))
        report = observation.end(moves, own_count)
        reports = self._ranks.gather([report])
        calls = agree_on_calls(observation.layers, reports)
        for layer, count in zip(observation.layers, calls, strict=True):
            layer.calls = count
        self._share = [layer for layer in observation.layers if layer.calls]
        # What the step began with is in the share of one rank alone.
        if not self._ranks.is_main:
            observation.subtract(self._share, own_count)
        self._is_gathered = not self._share
        self._micro_batches_to_age_for = len(step.micro_batches) - end

    def _buffers(self) -> list[Tensor]:
        return [buffer for layer in self._share for buffer in layer.buffers]

    # ---------------------------------------------------------------- the shares

    def _scatter(self) -> None:
        """Leave the statistics with rank 0 alone. It runs first, so its share need not age for others yet."""
        if not self._share:
            return
        if not self._ranks.is_main:
            counters = [layer.counter for layer in self._share]
            torch._foreach_zero_([*self._buffers(), *counters])
        self._is_gathered = False

    def _age(self, micro_batches: int) -> None:
        """Age this rank's share for micro-batches of other ranks: `micro_batches`, and those after its own last one."""
        micro_batches += self._micro_batches_to_age_for
        self._micro_batches_to_age_for = 0
        if self._is_gathered or not micro_batches:
            return
        if not self._buffers_by_decay:
            self._group_by_decay()
        for decay, buffers in self._buffers_by_decay.items():
            torch._foreach_mul_(buffers, decay**micro_batches)

    def _group_by_decay(self) -> None:
        """Collect the buffers that one operation can age together."""
        for layer in self._share:
            decay = layer.decay()
            if decay != 1.0:
                self._buffers_by_decay.setdefault(decay, []).extend(layer.buffers)


class StatisticsDifferences(RunningStatistics):
    """Every micro-batch starts from the step's first statistics and leaves a difference.

    With momentum m and M micro-batches, the difference of the v-th counts (1-m)^(M-1-v). Their sum, added to what
    the step began with, is what a sequential pass leaves. Every rank holds the true statistics between steps, so a
    layer may be read at any time.
    """

    def __init__(
        self,
        model: nn.Module,
        section: BatchNormConfig,
        ranks: Ranks,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__(model, section, ranks, loss)
        refuse_shared_statistics(self._layers)
        self.buffers = [buffer for layer in self._layers for buffer in layer.buffers]
        self._start = [torch.empty_like(buffer) for buffer in self.buffers]
        self._watch = CallWatch(self._layers)
        self._modes: list[bool] = []
        # Of one micro-batch, by which the layers' calls were counted.
        self._moves: list[int] = []
        self._counters_before: list[Tensor] | None = None
        # A rank that had nothing to do cannot know which layers were called.
        self._had_work = False
        self._counters_may_differ = False

    def begin(self, step: Step) -> None:
        if self._must_spread_momentum(step):
            self._spread_momentum(step)
        if self.buffers:
            torch._foreach_copy_(self._start, self.buffers)
        self._watch.forget()
        modes = [layer.is_training for layer in self._layers]
        if modes != self._modes or self._counters_before is not None:
            self._modes = modes
            self._counters_before = [layer.counter.clone() for layer in self._layers]

    def gather(self) -> None:
        """Refuse what ranks have called differently. Every rank holds the true statistics, but perhaps not counters."""
        if self._ranks.count == 1 or not self._layers:
            return
        reports = self._ranks.gather([self._moves if self._had_work else None])
        seen = [moves for moves in reports if moves is not None]
        for moves in seen:
            for layer, first, other in zip(self._layers, seen[0], moves, strict=True):
                if first != other:
                    raise refuse_uneven_calls(layer.name)
        if self._counters_may_differ:
            for layer in self._layers:
                self._ranks.broadcast_tensor(layer.counter)
            self._counters_may_differ = False

    def reset(self) -> None:
        """Before a micro-batch: put back what the step began with."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self._start)
            self._watch.begin(is_fused=False)

    def difference(self, step: Step, index: int) -> list[Tensor]:
        """After micro-batch `index`: how much it changed each buffer, aged for the micro-batches after it."""
        if not self.buffers:
            return []
        name = self._watch.end()
        if name is not None:
            raise refuse_uneven_calls(name)
        if self._watch.moves() != self._moves:
            self._count_calls()
        self._counters_before = None
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
        first, end = step.ranks[self._ranks.rank]
        self._had_work = end > first
        self._counters_may_differ |= step.has_idle_rank
        if not self._had_work:
            return
        micro_batches_of_others = len(step.micro_batches) - (end - first)
        counters = []
        calls_of_others = []
        for layer, moves in zip(self._layers, self._moves, strict=True):
            if moves and layer.counts_calls:
                counters.append(layer.counter)
                calls_of_others.append(layer.calls * micro_batches_of_others)
        if counters and micro_batches_of_others:
            torch._foreach_add_(counters, calls_of_others)

    def _count_calls(self) -> None:
        """Set the layers' calls, after the first micro-batch with other ones than before."""
        self._moves = self._watch.moves()
        for number, (layer, moves) in enumerate(
            zip(self._layers, self._moves, strict=True)
        ):
            layer.refuse_replaced_buffers()
            # One that does not move leaves no difference, or is one's own and does not count.
            layer.calls = max(1, moves)
            if moves and self._counters_before is not None:
                counter = self._counters_before[number]
                layer.calls = layer.count_calls(counter, moves, count=1)
