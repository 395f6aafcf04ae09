"""trackio: rows as they are, the config, and figures as images, on this machine or in a Hugging Face Space."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from trainer.reporting.trackers.base import (
    Ending,
    Row,
    Session,
    Tracker,
    flat_config,
)

WARNING = "* Trackio warning: "  # begins what trackio prints of a failure, which it never raises
_warnings: list[str] = []


class TrackioTracker(Tracker):
    """A run of `project`, on this machine or in the Space `space_id`; a resumed run continues it.

    Its name is `run_name`, or else the run's.
    """

    module: ClassVar[str] = "trackio"
    package: ClassVar[str] = "trackio"

    def __init__(
        self,
        project: str = "lockstep",
        run_name: str | None = None,
        group: str | None = None,
        space_id: str | None = None,
    ) -> None:
        self._project = project
        self._run_name = run_name
        self._group = group
        self._space_id = space_id

    def begin(self, session: Session) -> None:
        import trackio

        _silence()
        self.id = session.id or self._run_name or session.name
        self._run: Any = trackio.init(
            project=self._project,
            name=self.id,
            group=self._group,
            space_id=self._space_id,
            config=flat_config(session.config),
            resume="never" if session.id is None else "allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def describe(self) -> str:
        space = f", Space {self._space_id}" if self._space_id else ""
        return f"project {self._project}, run {self.id}{space}"

    def log(self, row: Row) -> None:
        numbers = {name: value for name, value in row.items() if name != "step"}
        self._run.log(numbers, step=int(row["step"]))
        _raise_warnings()

    def figures(self, step: int, figures: Mapping[str, Path]) -> None:
        import trackio

        for name, path in figures.items():
            if path.suffix != ".csv":
                self._run.log({f"figures/{name}": trackio.Image(str(path))}, step=step)

    def finish(self, ending: Ending) -> None:
        for name in ("best", "best_epoch", "seconds"):
            value = ending.summary.get(name)
            if value is not None:
                steps = ending.summary["steps"]
                self._run.log({f"summary/{name}": value}, step=steps)
        self._run.finish()
        _raise_warnings()


def _silence() -> None:
    """Have trackio print nothing: it has no setting for that, and stdout is the run's own."""
    _warnings.clear()
    import trackio.run
    import trackio.utils

    for module in (trackio, trackio.run, trackio.utils):
        vars(module)["print"] = _keep_warning


def _keep_warning(*texts: Any, **_: Any) -> None:
    text = str(texts[0]) if texts else ""
    if text.startswith(WARNING):
        _warnings.append(text.removeprefix(WARNING))


def _raise_warnings() -> None:
    if _warnings:
        raise RuntimeError(_warnings[0])
