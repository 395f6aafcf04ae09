"""How `train.profile` joins a session of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer.core.observers import Observers
from trainer.core.profile.observer import FOLDER, ProfileObserver
from trainer.core.profile.windows import WARM_UP_STEPS, find_windows
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
        return None, (
            f"none: after its first {WARM_UP_STEPS} steps, this session has not {count} and then {count + 1} in a row "
            f"without an evaluation or a checkpoint between them; lower train.profile"
        )
    observer = ProfileObserver(windows, directory, note)
    observers.add(observer)
    return observer, f"{windows.describe()}: {directory / FOLDER}"
