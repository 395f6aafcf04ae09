"""Which steps `train.profile` looks at."""

from __future__ import annotations

from typing import NamedTuple

from trainer.core.timetable import Timetable
from trainer.exact.plan import Plan

# Until then kernels are chosen, code is compiled, and loader processes fill their queues.
WARM_UP_STEPS = 10
MAX_SEARCHED = 100_000  # steps; where none fit in so many, none will


class Windows(NamedTuple):
    """`[first, last]` step numbers: those whose time is taken as it is, and those that the profiler traces.

    The profiler slows down what it traces, so how long a step takes is measured without it. It starts one step before
    those that count, since it is slowest there.
    """

    timed: tuple[int, int]
    traced: tuple[int, int]

    def describe(self) -> str:
        timed_first, timed_last = self.timed
        first, last = self.traced
        return (
            f"steps {timed_first} to {timed_last} are timed, {first} to {last} traced"
        )


def steps_needed(count: int) -> int:
    """How many steps a session has at least, if `count` are to be traced."""
    return WARM_UP_STEPS + count + 1 + count


def find_windows(
    plan: Plan, timetable: Timetable | None, *, steps_done: int, count: int
) -> Windows | None:
    """The windows of a session that begins after `steps_done` steps, `count` steps each; None if it has too few.

    Between the steps of a window nothing is evaluated or saved, as `timetable` says; None where nothing ever is.
    """
    last = plan.total_steps if timetable is None else timetable.last_step
    last = min(last, steps_done + MAX_SEARCHED)
    timed = _uninterrupted(plan, timetable, steps_done + WARM_UP_STEPS, last, count)
    if timed is None:
        return None
    under_profiler = _uninterrupted(plan, timetable, timed[1], last, count + 1)
    if under_profiler is None:
        return None
    return Windows(timed, (under_profiler[0] + 1, under_profiler[1]))


def _uninterrupted(
    plan: Plan, timetable: Timetable | None, after: int, last: int, count: int
) -> tuple[int, int] | None:
    """The first `count` steps in a row after step `after`; only the last of them may be followed by anything."""
    length = 0
    for step in plan.steps(after, last):
        length += 1
        if length == count:
            return step.number - count + 1, step.number
        if timetable is not None and (
            timetable.is_evaluated(step)
            or timetable.is_evaluated_within_epoch(step)
            or timetable.is_checkpointed(step)
        ):
            length = 0
    return None
