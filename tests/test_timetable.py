"""Quiet steps: those that nothing but the next step follows."""

from __future__ import annotations

from itertools import product
from typing import Any

from trainer.config.train_section import TrainConfig
from trainer.core.timetable import Timetable
from trainer.exact.plan import Plan


def test_quiet_steps_are_those_of_no_event() -> None:
    plan = Plan(
        samples=50, batch_size=8, micro_size=8, ranks=1, epochs=4, seed=0, max_steps=25
    )
    for log_every, by_steps, checkpoint, stop in product(
        (1, 3, 50), (None, 4), (None, 5), (None, 11)
    ):
        settings: dict[str, Any] = {
            "log_every": log_every,
            "evaluate_every_steps": by_steps,
            "checkpoint_every": checkpoint,
            "stop_after": stop,
        }
        timetable = Timetable(TrainConfig(**settings), plan, has_validation=True)
        # Forwards as a run goes, and again from the start as one that is resumed.
        steps = [*plan.steps(0, timetable.last_step), *plan.steps(0, 10)]
        for step in steps:
            has_event = (
                timetable.is_logged(step)
                or timetable.is_evaluated(step)
                or timetable.is_evaluated_within_epoch(step)
                or timetable.is_checkpointed(step)
                or step.last_in_epoch
                or step.number == timetable.last_step
            )
            is_quiet = timetable.is_quiet(step)
            assert is_quiet != has_event, (settings, step.number)
            assert timetable.is_quiet(step) == is_quiet
