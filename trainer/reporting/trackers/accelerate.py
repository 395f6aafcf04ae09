"""Any of Accelerate's trackers by its import path: `accelerate.tracking.CometMLTracker` and its like."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.registry import build
from trainer.reporting.trackers.base import (
    Ending,
    Row,
    Session,
    Tracker,
    flat_config,
    numbers_in,
    read_pixels,
)


def adapted(
    place: str, target: Any, arguments: Mapping[str, Any], run_name: str
) -> Tracker | None:
    """`target` as a tracker, if it is a class of Accelerate's; None for anything else.

    `run_name` is what it gets as its `run_name` unless the config's `arguments` name one.
    """
    from accelerate.tracking import GeneralTracker

    if not isinstance(target, type) or not issubclass(target, GeneralTracker):
        return None
    return AccelerateTracker(build(place, target, arguments, run_name=run_name))


class AccelerateTracker(Tracker):
    """One of Accelerate's trackers. It starts a run of its own in every session, without the rows it had before."""

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker

    def begin(self, session: Session) -> None:
        self._tracker.start()
        self._tracker.store_init_configuration(flat_config(session.config))

    def describe(self) -> str:
        return str(self._tracker.name)

    def log(self, row: Row) -> None:
        self._tracker.log(numbers_in(row), step=int(row["step"]))

    def figures(self, step: int, figures: Mapping[str, Path]) -> None:
        if not hasattr(self._tracker, "log_images"):
            return
        for name, path in figures.items():
            if path.suffix != ".csv":
                pixels = read_pixels(path)[None]
                self._tracker.log_images({f"figures/{name}": pixels}, step=step)

    def finish(self, ending: Ending) -> None:
        self._tracker.finish()
