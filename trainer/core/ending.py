"""A run that ends before its last step, because `early_stop` or an observer asks for it (`run.stop`)."""

from __future__ import annotations

from collections.abc import Callable

from trainer.core.early_stop import EarlyStop
from trainer.core.metrics import Row
from trainer.core.run import Run
from trainer.exact.plan import Step
from trainer.storage.checkpoint import Progress


class Ending:
    """Brings all ranks to one answer after each logged row: does the run end here?

    Ranks meet there anyway, so the answer costs a step nothing, and it is the same step on any number of ranks.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._early_stop = EarlyStop(run.config.early_stop)
        self._may_come = False

    @property
    def early_stop(self) -> EarlyStop | None:
        """What a checkpoint keeps; None in a run without early stopping."""
        is_on = self._run.config.early_stop.patience is not None
        return self._early_stop if is_on else None

    def begin(self, *, code_may_stop: bool) -> None:
        """Before the first step of a session; whether somebody's code may call `run.stop`, the same on every rank."""
        self._may_come = code_may_stop or self.early_stop is not None

    def take_note(self, row: Row) -> None:
        """Let early stopping see the row of an evaluation."""
        reason = self._early_stop.update(row)
        if reason:
            self._run.stop(reason)

    def reason_after(self, step: Step) -> str:
        """After a logged `step`: why the run ends with it, "" if it goes on. A collective."""
        if not self._may_come:
            return ""
        reason: str = self._run.ranks.on_main(lambda: self._run.stop_reason)
        return "" if step.number == self._run.plan.total_steps else reason

    def was_before(self, progress: Progress, note: Callable[[str], None]) -> bool:
        """True for a resumed run that has ended, and is not to go on by `run.resume=continue`."""
        reason = progress.stopped_by
        if not reason:
            return False
        if self._run.config.run.resume == "continue":
            progress.stopped_by = ""
            self._early_stop.wait_anew()
            return False
        note(
            f"this run has ended, after step {progress.step} ({reason}); run.resume=continue goes on with it"
        )
        return True
