"""What the checks of the proof try: a run, and the step that it would train next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from trainer.components.task import WeightedSum
from trainer.core.build import Run
from trainer.core.observers import Stateful
from trainer.core.proof.finding import Finding
from trainer.data.loading import TrainLoader
from trainer.data.samples import MicroBatch
from trainer.exact.plan import Step, split_evenly

MICRO_BATCHES = 4  # of the step, that a check runs at most


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
    # Of each forward and backward so far.
    seconds: list[float] = field(default_factory=list)
    _loaded: dict[int, MicroBatch] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """True if every bit must be equal."""
        return self.run.bitwise

    @property
    def repeats_bits(self) -> bool:
        """True if a forward gives the same bits again. A GPU's atomic additions come in any order."""
        return self.exact or self.run.ranks.device.type == "cpu"

    @property
    def module(self) -> nn.Module:
        return self.run.module

    def short_step(self, ranks: int) -> Step:
        """The first micro-batches of the step, as a step of its own on `ranks` ranks."""
        micro_batches = self.step.micro_batches[: self.micro_batches]
        count = len(micro_batches)
        return self.step._replace(
            size=micro_batches[-1][1],
            micro_batches=micro_batches,
            ranks=split_evenly(count, ranks),
            has_idle_rank=count < ranks,
        )

    def batch(self, index: int) -> MicroBatch:
        """A micro-batch of the step, on the device; loaded once, and copied, since a model may write to its input."""
        if index not in self._loaded:
            ids = self.run.plan.sample_ids(self.step, index)
            self._loaded[index] = self.run.train_loader.peek(ids, index)
        batch = self._loaded[index]
        return batch._replace(
            inputs=tree_map(_copy, batch.inputs), targets=tree_map(_copy, batch.targets)
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
        start = perf_counter()
        _, loss = self.run.forward(model or self.module, batch, self.step)
        factor = _one_over_weight(loss) if scale is None else scale(loss)
        self.run.precision.backward(loss.total, factor)
        if self.run.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(perf_counter() - start)
        return loss


Check = Callable[[Trial], list[Finding]]


def _one_over_weight(loss: WeightedSum) -> torch.Tensor:
    weight = torch.as_tensor(loss.weight).to(loss.total)
    return 1 / weight.clamp(min=1)


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, torch.Tensor) else value
