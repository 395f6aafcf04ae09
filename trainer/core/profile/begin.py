"""How `train.profile` joins a session of a run."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

from trainer.core.observers import Observers
from trainer.core.profile.observer import FOLDER, ProfileObserver
from trainer.core.profile.windows import WARM_UP_STEPS, find_windows, steps_needed
from trainer.core.run import Run
from trainer.core.timetable import Timetable


def add_profile(
    observers: Observers,
    run: Run,
    timetable: Timetable,
    *,
    steps_done: int,
    directory: Path,
    note: Callable[[str], None],
) -> tuple[ProfileObserver | None, str]:
    """Profile what `train.profile` asks for in this session; returns the observer, and a line for the header."""
    count = run.config.train.profile
    if count is None:
        return None, ""
    windows = find_windows(run.plan, timetable, steps_done=steps_done, count=count)
    if windows is None:
        return None, _why_none(run, timetable, steps_done, count)
    observer = ProfileObserver(windows, directory, note)
    observers.add(observer)
    return observer, f"{windows.describe()}: {directory / FOLDER}"


def _why_none(run: Run, timetable: Timetable, steps_done: int, count: int) -> str:
    """Why no `count` steps of this session can be profiled, and what helps."""
    steps = timetable.last_step - steps_done
    least = steps_needed(1)
    if steps < least:
        return (
            f"none: it needs a session of {least} steps or more, and this one has {steps:,}; make it longer "
            f"(train.epochs, train.max_steps, train.stop_after)"
        )
    reason = (
        f"none: after its first {WARM_UP_STEPS} steps, this session has not {count} and then {count + 1} in a row "
        f"without an evaluation or a checkpoint between them"
    )

    def fits(fewer: int) -> bool:
        found = find_windows(run.plan, timetable, steps_done=steps_done, count=fewer)
        return found is not None

    most = bisect_left(range(1, count), True, key=lambda fewer: not fits(fewer))
    if most == 0:
        return f"{reason}; make both rarer (train.evaluate_every, train.checkpoint_every_epochs and their like)"
    return f"{reason}; lower train.profile to {most}"
