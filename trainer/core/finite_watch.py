"""Every step's loss and gradient, watched for NaN and infinities: what becomes of a step that has one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from trainer.core.metrics import Row
from trainer.core.not_finite import (
    all_skipped,
    describe_step,
    first_bad_step,
    skipped_in_a_row,
)
from trainer.core.run import Run
from trainer.exact.finite import BadSteps, FiniteFlags
from trainer.storage.checkpoint import Progress

# By then fp16's loss scale is 2^-34 of what it began with.
MOST_SKIPPED_IN_A_ROW = 50


class FiniteWatch:
    """Marks each step on the device, and tells at log intervals what was found.

    A step that is not finite ends the run (`check`), before anything of it is kept. With `train.non_finite=skip` it
    is left out instead, which every rank must know before the update: so each step waits for the device and for the
    other ranks. fp16 leaves a step out by itself where its gradient overflowed.

    Attributes: `leaves_out`, True with `skip`; `is_held_back`, True if the last step must not update the weights.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._flags = FiniteFlags(run.ranks.device)
        self._bad_steps = BadSteps()
        self.is_held_back = False
        # Of the last step, on the device, `(1,)`: 1 if its gradient is not finite, so that fp16 leaves the step out.
        self.gradient_flag: Tensor | None = None
        overflows = run.precision.skips_overflow
        self.leaves_out = run.config.train.non_finite == "skip" and not overflows
        # Where asking costs nothing, so that the weights stay as they were before the step.
        is_on_cpu = run.ranks.device.type == "cpu"
        self._asks_at_once = is_on_cpu and not overflows and not self.leaves_out

    @property
    def counts(self) -> bool:
        """True where steps may be left out, and rows count them."""
        return self.leaves_out or self._run.precision.skips_overflow

    def mark(self, step: int, losses: list[Tensor], gradients: list[Tensor]) -> bool:
        """Note whether they are finite; returns `is_held_back`. A collective with `leaves_out`."""
        # One operation for nearly every step; only a bad one is looked at more closely.
        if self._asks_at_once and self._flags.are_finite(losses, gradients):
            self.is_held_back = False
            return False
        of_loss, of_gradient = self._flags.mark(step, losses, gradients)
        self.gradient_flag = of_gradient
        if self.leaves_out:
            is_bad = bool(of_loss) or bool(of_gradient)
            [self.is_held_back] = self._run.ranks.any_rank_each([is_bad])
        elif self._asks_at_once:
            self.is_held_back = bool(of_gradient)
        return self.is_held_back

    def count(self, progress: Progress) -> Row:
        """The columns of a row: how many steps were left out so far. A collective; waits for the device.

        Raises `LockstepError` where one step after the other is left out.
        """
        bad = self._flags.read()
        if self.leaves_out:
            steps = {*bad.loss, *bad.gradient}
            everywhere = set(self._run.ranks.gather(list(steps)))
            _count_skipped(progress, sorted(everywhere), "train.non_finite=skip")
        elif self._run.precision.skips_overflow:
            _count_skipped(progress, bad.gradient, "fp16")
            self._bad_steps.loss += bad.loss
        else:
            self._bad_steps.loss += bad.loss
            self._bad_steps.gradient += bad.gradient
        return {"skipped_steps": progress.skipped_steps} if self.counts else {}

    def check(
        self,
        progress: Progress,
        *,
        kept_step: Callable[[], int | None] = lambda: None,
        directory: Path | None = None,
    ) -> None:
        """Raise `LockstepError`, on every rank, if a step was not finite. A collective; waits for the device.

        `kept_step` tells, when asked, the step of the newest checkpoint; `directory` is the run's.
        """
        self.count(progress)
        first = first_bad_step(self._bad_steps, self._run)
        if first is not None:
            number, what = first
            raise describe_step(
                self._run,
                self._run.plan.step(number - 1),
                what,
                saved_step=kept_step(),
                directory=directory,
            )

    def check_end(self, progress: Progress) -> None:
        """Raise `LockstepError` if every step of the run was left out."""
        if self.counts and progress.skipped_steps == progress.step:
            raise all_skipped(progress.step)


def _count_skipped(progress: Progress, steps: list[int], by: str) -> None:
    for step in steps:
        follows = step == progress.last_skipped_step + 1
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if follows else 1
        progress.last_skipped_step = step
        progress.skipped_steps += 1
        if progress.skipped_in_a_row == MOST_SKIPPED_IN_A_ROW:
            raise skipped_in_a_row(MOST_SKIPPED_IN_A_ROW, step, by)
