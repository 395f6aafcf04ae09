"""After which steps a run evaluates and writes checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.config.train_section import TrainConfig
from trainer.exact.plan import Plan, Step


@dataclass(frozen=True)
class Timetable:
    """A pure function of the config and the plan, so every rank and every session has the same.

    Without validation data, nothing happens at the steps of `train.evaluate_every_steps`.
    """

    section: TrainConfig
    plan: Plan
    has_validation: bool
    # Steps that are known to be quiet: the first, and the one past the last. Remembered, because every step asks; in a
    # list, which a frozen instance can change.
    _quiet: list[int] = field(
        default_factory=lambda: [0, 0], init=False, repr=False, compare=False
    )

    @property
    def last_step(self) -> int:
        """The step after which this session ends: the run's last, or `train.stop_after` if that comes first."""
        stop_after = self.section.stop_after
        total = self.plan.total_steps
        return total if stop_after is None else min(total, stop_after)

    def is_quiet(self, step: Step) -> bool:
        """True only if nothing but the next step follows: no row, no evaluation, no checkpoint, no end of any kind."""
        first, end = self._quiet
        if not first <= step.number < end:
            first, end = self._quiet[:] = step.number, self._next_event(step.number)
        return step.number < end

    def _next_event(self, number: int) -> int:
        """The first step from `number` on that is not quiet."""
        section = self.section
        intervals = [self.plan.steps_per_epoch, section.log_every]
        for every in (section.evaluate_every_steps, section.checkpoint_every):
            if every is not None:
                intervals.append(every)
        # The first multiple of each interval that is not below `number`.
        events = [-(-number // every) * every for every in intervals]
        return min(*events, max(number, self.last_step))

    def is_logged(self, step: Step) -> bool:
        """True if the row of an interval ends with `step`."""
        return step.number % self.section.log_every == 0 or step.last_in_epoch

    def is_evaluated(self, step: Step) -> bool:
        """True if the run evaluates after `step`, wherever this session ends."""
        if self._is_evaluated_by_steps(step):
            return True
        is_last = step.number == self.plan.total_steps
        is_due = (step.epoch + 1) % self.section.evaluate_every == 0
        return step.last_in_epoch and (is_last or is_due)

    def is_evaluated_within_epoch(self, step: Step) -> bool:
        """True if `step` is no epoch's last and has an evaluation, whose row is its own."""
        return not step.last_in_epoch and self._is_evaluated_by_steps(step)

    def _is_evaluated_by_steps(self, step: Step) -> bool:
        every = self.section.evaluate_every_steps
        return self.has_validation and every is not None and not step.number % every

    def is_checkpointed(self, step: Step) -> bool:
        """True if a checkpoint is written after `step`."""
        is_last = step.number == self.last_step
        if not self.section.keep_checkpoints:
            # Of a run that stops before its end, there must be something to go on from.
            return is_last and step.number < self.plan.total_steps
        every = self.section.checkpoint_every
        if is_last or (every is not None and step.number % every == 0):
            return True
        epochs_done = step.epoch + 1
        is_epoch_due = epochs_done % self.section.checkpoint_every_epochs == 0
        return step.last_in_epoch and is_epoch_due
