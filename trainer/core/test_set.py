"""The test set: evaluated once, at the end of a run, with the best weights. The run's own state stays as it is."""

from __future__ import annotations

from typing import NamedTuple

from trainer.core.evaluation import EvaluationSet
from trainer.core.metrics import Row
from trainer.core.proof.state import without_trace
from trainer.core.run import Run
from trainer.errors import LockstepError
from trainer.storage.checkpoint import Progress


class FinalResult(NamedTuple):
    """The metrics, as `test/loss`; the step of the weights; and a note if these are not the best ones."""

    row: Row
    step: int
    note: str


def evaluate_test_set(run: Run, test: EvaluationSet, progress: Progress) -> FinalResult:
    """Evaluate with the best weights, or with the present ones if there are no others. A collective.

    The model's running statistics must be the true ones.
    """
    with without_trace(run, weights=True):
        note = _load_best(run, progress)
        means = test.evaluator.evaluate()
    test.evaluator.close()
    row = {f"test/{name}": value for name, value in means.items()}
    # The note says why there were no best weights.
    step = progress.step if note else progress.best_step
    return FinalResult(row, step, note)


def _load_best(run: Run, progress: Progress) -> str:
    """Load the best weights; returns why they are not, or ""."""
    reason = f"no evaluation had a finite {run.config.best.metric}"
    if progress.best is not None:
        try:
            run.load_best()
            return ""
        except LockstepError as error:
            reason = str(error)
    return f"the test set is evaluated with the last weights, for there are no best ones: {reason}"
