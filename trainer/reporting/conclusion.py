"""How a run closes, after its last step: the row of its test set, its summary and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from trainer.components.optimizer_modes import evaluation_weights
from trainer.components.schedule import Schedule
from trainer.core.proof.prove import Proof
from trainer.core.run import Run
from trainer.core.test_set import FinalResult, evaluate_test_set
from trainer.errors import LockstepError
from trainer.exact.plan import Step
from trainer.process.activity import ENDING, activity
from trainer.reporting import summary as report
from trainer.reporting.figures import drawing
from trainer.reporting.journal import Journal
from trainer.storage.checkpoint import Progress


def conclude(
    run: Run,
    journal: Journal,
    optimizer: Optimizer,
    progress: Progress,
    schedule: Schedule,
    *,
    last: Step,
    proof: Proof,
    average: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Evaluate the test set, write the summary and draw the figures; returns the summary. A collective.

    `last` is the last step of the session, `average` the tensors of a moving average of the weights, if there is one.
    """
    test = log_test(run, journal, optimizer, progress, last)
    summary = report.summary(run, progress, optimizer, proof, average)
    if test is not None:
        summary |= {**test.row, "test_step": test.step}
    journal.keep_summary(summary)
    closing = report.closing(summary, journal.directory)
    figures = draw_figures(run, journal, progress, schedule)
    journal.finish(summary, closing, figures)
    return summary


def log_test(
    run: Run, journal: Journal, optimizer: Optimizer, progress: Progress, last: Step
) -> FinalResult | None:
    """Evaluate the test set and log its row, the run's last; None without one, or if the run is to go on.

    A collective. `last` is the last step of the session. The model's running statistics must be the true ones.
    """
    goes_on = last.number < run.plan.total_steps and not progress.stopped_by
    if run.test is None or goes_on:
        return None
    with evaluation_weights(optimizer):
        result = evaluate_test_set(run, run.test, progress)
    activity.mark(ENDING)
    if result.note:
        journal.note(result.note)
    journal.test({"step": last.number, "epoch": last.epoch + 1, **result.row})
    return result


def draw_figures(
    run: Run, journal: Journal, progress: Progress, schedule: Schedule
) -> dict[str, Path]:
    """Draw the figures of the finished run. A collective.

    A full disk or a damaged best model costs them, never the summary.
    """
    if not run.config.run.figures:
        return {}
    has_best = progress.best is not None
    try:
        return drawing.draw(
            run, journal.directory, has_best=has_best, schedule=schedule
        )
    except LockstepError as error:
        journal.note(f"the figures are not complete: {error}")
        return {}
