"""Empty micro-batches: what a rank runs where others have more to do and every forward needs all ranks.

So it is with `train.parallel=fsdp`: each forward and backward exchanges parameters and gradients between all ranks.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.components.task import WeightedSum
from trainer.core.observers import Observer
from trainer.core.run import Run
from trainer.data.batches import MicroBatch
from trainer.exact.plan import Step
from trainer.exact.reduction import Reduction


class EmptyForwards(Observer):
    """Runs this rank's last micro-batch of a step again, with a loss of zero.

    An observer, because it has to know that micro-batch. A sample that the rank has run already gives finite numbers
    again; another one would have to be read.
    """

    may_stop = False

    def __init__(self, run: Run, reduction: Reduction) -> None:
        self._run = run
        self._reduction = reduction
        self._last: MicroBatch | None = None

    def micro_batch(
        self, step: Step, batch: MicroBatch, output: Any, loss: WeightedSum
    ) -> None:
        self._last = batch

    def step(self, step: Step) -> None:
        self._last = None

    def run(self, step: Step) -> None:
        """Run one forward and backward, which adds zeros to the gradient. A collective."""
        run = self._run
        if self._last is None:
            self._last = self._first_of(step)
        _, loss = run.forward(run.module, self._last, step)
        root = self._reduction.root(loss.total)
        run.precision.backward(root, torch.zeros_like(root))

    def _first_of(self, step: Step) -> MicroBatch:
        """The step's first micro-batch, for a rank that has none."""
        plan = self._run.plan
        return self._run.train_loader.peek(
            plan.sample_ids(step, 0),
            epoch=step.epoch,
            occurrences=plan.occurrences(step, 0),
        )
