"""What the checks of the proof try: a run, and the step that it would train next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from trainer.components.task import WeightedSum
from trainer.core.observers import Stateful
from trainer.core.run import Run
from trainer.data.batches import MicroBatch
from trainer.data.train_loader import TrainLoader
from trainer.exact.plan import Ids, Step, split_evenly

MICRO_BATCHES = 4  # of the step, that a check runs at most


class Tolerances(NamedTuple):
    """How far apart two results may be, relative to their norm, where not every bit must be equal."""

    fp64: float
    fp32: float
    autocast: float  # which keeps few digits
    on_gpu: float  # at least: atomic additions come in any order


@dataclass
class Trial:
    """A run before its first step, for checks that leave no trace (`trainer.core.proof.state.without_trace`).

    Every rank makes the same checks in the same order, because a model may have collective operations.
    """

    run: Run
    step: Step
    samples: int  # how many samples to fetch
    optimizer: Optimizer | None = None
    stateful: Mapping[str, Stateful] = field(default_factory=dict)
    batches: TrainLoader | None = None  # the run's own, where processes load for it
    micro_batches: int = MICRO_BATCHES
    # Of a forward and backward, on the slowest rank; None before it is measured.
    seconds: float | None = None
    _loaded: MicroBatch | None = None

    @property
    def exact(self) -> bool:
        """True if every bit must be equal."""
        return self.run.bitwise

    @property
    def repeats_bits(self) -> bool:
        """True if a forward gives the same bits again. A GPU's atomic additions come in any order."""
        return self.exact or self.run.ranks.device.type == "cpu"

    def tolerance(self, tolerances: Tolerances) -> float | None:
        """The one that goes for this run; None if every bit must be equal."""
        if self.exact:
            return None
        precision = self.run.precision
        if precision.autocasts:
            return tolerances.autocast
        is_double = precision.dtype == torch.float64
        tolerance = tolerances.fp64 if is_double else tolerances.fp32
        is_on_cpu = self.run.ranks.device.type == "cpu"
        return tolerance if is_on_cpu else max(tolerance, tolerances.on_gpu)

    @property
    def module(self) -> nn.Module:
        return self.run.module

    @property
    def is_idle(self) -> bool:
        """True if this rank has nothing to do in the step."""
        first, end = self.step.ranks[self.run.ranks.rank]
        return first == end

    @property
    def own_index(self) -> int:
        """The first micro-batch of the step that this rank runs; the very first for an idle rank."""
        return 0 if self.is_idle else self.step.ranks[self.run.ranks.rank][0]

    def short_step(self, ranks: int) -> Step:
        """A step of a few micro-batches, as large as this rank's first one, on `ranks` ranks."""
        start, stop = self.step.micro_batches[self.own_index]
        count = min(self.micro_batches, len(self.step.micro_batches))
        size = count * (stop - start)
        return self.step._replace(
            size=size,
            micro_batches=split_evenly(size, count),
            ranks=split_evenly(count, ranks),
            has_idle_rank=count < ranks,
        )

    def batch(self, index: int) -> MicroBatch:
        """The samples of this rank's first micro-batch, as number `index` of its step, on the device.

        Loading more would take long, and show no more. They are copied, since a model may write to its input.
        """
        if self.batches is None and self.run.train_loader.is_look_up:
            # Which takes no longer than a copy, and nothing is held while the model runs.
            return self._load()._replace(first=index)
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded._replace(
            first=index,
            inputs=tree_map(_copy, self._loaded.inputs),
            targets=tree_map(_copy, self._loaded.targets),
        )

    def _load(self) -> MicroBatch:
        if self.batches is not None and not self.is_idle:
            batch = self.batches.peek()
            if batch is not None and batch.fused == 1:
                return batch
        plan = self.run.plan
        return self.peek(
            plan.sample_ids(self.step, self.own_index),
            plan.occurrences(self.step, self.own_index),
        )

    def peek(
        self, ids: Sequence[int] | Ids, occurrences: Ids | None = None
    ) -> MicroBatch:
        """Some samples as the model sees them in the step's epoch, loaded in this process."""
        return self.run.train_loader.peek(
            ids, self.own_index, epoch=self.step.epoch, occurrences=occurrences
        )

    def forward_and_backward(
        self,
        index: int,
        *,
        model: nn.Module | None = None,
        scale: Callable[[WeightedSum], torch.Tensor] | None = None,
    ) -> WeightedSum:
        """Run a micro-batch as the training step does; the gradient is that of its mean, or scaled by `scale`."""
        batch = self.batch(index)
        _, loss = self.run.forward(model or self.module, batch, self.step)
        factor = _one_over_weight(loss) if scale is None else scale(loss)
        self.run.precision.backward(loss.total, factor)
        if self.run.ranks.device.type == "cuda":
            torch.cuda.synchronize()  # its time is measured
        return loss


def _one_over_weight(loss: WeightedSum) -> torch.Tensor:
    weight = torch.as_tensor(loss.weight).to(loss.total)
    return 1 / weight.clamp(min=1)


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, torch.Tensor) else value
