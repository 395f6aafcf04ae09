"""The evaluations of a run on its validation sets: of its weights, of their average (`ema`), or of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch.optim import Optimizer

from trainer.components.optimizer_modes import evaluation_weights
from trainer.core.ema import WeightAverage
from trainer.core.evaluated_weights import evaluated_phase, evaluated_phases
from trainer.core.evaluation import OnBatch
from trainer.core.metrics import Row
from trainer.core.not_finite import validation_not_finite
from trainer.core.observers import Observers
from trainer.core.recalibrate import recalibrate_statistics
from trainer.core.run import Run
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.plan import Step
from trainer.exact.reduction import Reduction


class Evaluations:
    """Evaluates a run after its steps, and lets its observers see it."""

    def __init__(
        self,
        run: Run,
        optimizer: Optimizer,
        reduction: Reduction,
        average: WeightAverage,
        observers: Observers,
    ) -> None:
        self._run = run
        self.optimizer = optimizer
        self._reduction = reduction
        self._average = average
        self._observers = observers
        # What observers see of the evaluation that is made, if it is one of `columns`.
        self._watch: Callable[[str], OnBatch | None] | None = None

    def weights(self, *, is_average: bool) -> AbstractContextManager[None]:
        """A context in which the model holds the average of its weights, or its own. A collective."""
        if not is_average:
            return nullcontext()
        self._reduction.gather()
        return self._average.in_place()

    def evaluate(self, steps_done: int) -> Row:
        """The loss and metrics over all validation samples, with the present weights. A collective."""
        run = self._run
        with run.settings(), evaluation_weights(self.optimizer):
            self._reduction.gather()
            if run.config.batch_norm.recalibrate_at == "evaluation":
                recalibrate_statistics(run, steps_done)
            return run.evaluate(self._watch)

    def recalibrate_at_end(self, steps_done: int) -> bool:
        """Give the weights, and their average, exact statistics where `batch_norm.recalibrate_at` is "end".

        A collective. True if it changed any; the running statistics must be the true ones.
        """
        run = self._run
        if run.config.batch_norm.recalibrate_at != "end":
            return False
        is_changed = recalibrate_statistics(run, steps_done)
        if is_changed and self._average.is_on:
            with self.weights(is_average=True):
                recalibrate_statistics(run, steps_done)
        return is_changed

    def columns(self, step: Step, evaluate: Callable[[], Row]) -> Row:
        """The columns of all evaluations after `step`, each made by `evaluate`. A collective."""
        row: Row = {}
        for name, is_average in evaluated_phases(self._run.config.ema).items():
            with self.weights(is_average=is_average):
                self._watch = partial(self._observers.watch, name)
                try:
                    metrics = evaluate()
                finally:
                    self._watch = None
                self._show_observers(name, step, metrics)
            row |= {f"{name}/{metric}": value for metric, value in metrics.items()}
        return row

    def _show_observers(self, name: str, step: Step, metrics: Row) -> None:
        """Give observers the metrics of each validation set, by its own name."""
        for item in self._run.validation:
            of_set = {}
            for metric, value in metrics.items():
                if metric.startswith(item.prefix):
                    of_set[metric.removeprefix(item.prefix)] = value
            phase = evaluated_phase(item.phase, name)
            self._observers.evaluation(phase, step, of_set)

    def check_finite(self, row: Row, kept_step: Callable[[], int | None]) -> None:
        """Raise `LockstepError` if a validation loss in `row` is not finite. The weights are, and are kept.

        `kept_step` tells, when asked, the step of the newest checkpoint.
        """
        is_average = evaluated_phases(self._run.config.ema)["val"]
        for item in self._run.validation:
            loss = row.get(f"{item.phase}/loss", 0.0)
            if not math.isfinite(loss):
                with self.weights(is_average=is_average):
                    run = self._run
                    whole = ModelAndLoss(run.module, run.task)
                    raise validation_not_finite(item, loss, kept_step(), whole)
