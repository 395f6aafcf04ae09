"""W&B, from the main process alone. It may be absent, slow or away; training goes on whatever it does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.schema import WandbConfig
from trainer.errors import LockstepError
from trainer.config.secrets import redacted, without_logins
from trainer.reporting.wandb.client import Messages, in_short, start_client, wanted_mode, within
from trainer.reporting.wandb.files import best_model, histograms, is_offline, mark_sent, sessions, shown
from trainer.reporting.wandb.rows import Row, Sent

if TYPE_CHECKING:
    from trainer.reporting.wandb.histograms import Histogram

Note = Callable[[str], None]


def start_wandb(
    section: WandbConfig,
    *,
    run_name: str,
    directory: Path,
    config: Mapping[str, Any],
    run_id: str | None,
    note: Note,
    earlier: Sequence[Row] = (),
    kept: int = 0,
) -> WandbRun | None:
    """The W&B run, or None where it is disabled or cannot start; disabled, wandb is not even imported.

    `run_id` goes on with an earlier run, whose rows were `earlier`; only the first `kept` of them still count.
    """
    if wanted_mode(section) == "disabled":
        return None
    try:
        run = WandbRun(section, run_name=run_name, directory=directory, config=config, run_id=run_id, note=note)
    except LockstepError:
        raise
    except Exception as error:
        warn(section, note, f"W&B did not start ({in_short(error)}); the run goes on without it")
        return None
    if run_id is not None:
        run.go_on(earlier, kept)
    return run


class WandbRun:
    """A W&B run whose files lie in `directory/wandb`.

    Nothing that goes wrong in it is raised, and the first thing is told through `note`; with `wandb.strict` that is
    raised instead.
    """

    def __init__(
        self,
        section: WandbConfig,
        *,
        run_name: str,
        directory: Path,
        config: Mapping[str, Any],
        run_id: str | None,
        note: Note,
        **settings: Any,
    ) -> None:
        self._section, self._note, self._directory = section, note, directory
        self._messages = Messages()
        self._sent = Sent((), 0, None)
        (directory / "wandb").mkdir(parents=True, exist_ok=True)  # wandb would go elsewhere without a word
        arguments = {
            "name": section.name or run_name,
            "dir": str(directory),
            "config": redacted(config),
            "group": section.group,
            "job_type": section.job_type,
            "tags": section.tags or None,
            "notes": section.notes and without_logins(section.notes),
        }
        if "WANDB_SWEEP_ID" not in os.environ:  # else the agent has set project, entity and id
            arguments |= {"project": section.project, "entity": section.entity, "id": run_id, "resume": "allow"}
        before = sessions(directory, unsent=True)
        self._run, self._state, error = start_client(section, arguments, self._messages, **settings)
        self._online = self._state == "online"
        self.id: str = self._run.id
        self._takes_rows, self._failed = True, False
        # An explicit step that is not past the last one is dropped, so the step is a value like any other.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if error is not None:
            mark_sent(file for file in sessions(directory, unsent=True) if file not in before and not is_offline(file))
            warn(section, note, f"W&B is out of reach ({in_short(error)}), so the run is offline; {later(directory)}")

    def describe(self) -> str:
        """`online, <the run's page>`, or `offline (why), files in <directory>`."""
        if self._online:
            return f"online, {self._run.url}"
        return f"{self._state}, files in {self._directory / 'wandb'}"

    def go_on(self, earlier: Sequence[Row], kept: int) -> int:
        """Send what a server lacks of an earlier session's rows, and mind which it has; returns how many it lacked."""

        def catch_up() -> None:
            self._sent = Sent(earlier, kept, dict(self._run.summary) if self._online else None)
            for row in self._sent.missing:
                self._run.log(dict(row))

        self._takes_rows = self._guarded(catch_up)
        return len(self._sent.missing)

    def has(self, name: str) -> bool:
        """Whether the run holds a value of that name."""
        return name in self._run.summary.keys()  # noqa: SIM118 - no mapping

    def log(self, row: Row) -> None:
        """Send a row. After one that failed none is sent: what is missing must be the end, for `sync` to find it."""
        if self._takes_rows and not self._sent.has(row):
            self._takes_rows = self._guarded(lambda: self._run.log(dict(row)))

    def log_histograms(self, step: int, taken: Mapping[str, Histogram]) -> None:
        if step > self._sent.last_step:
            self._guarded(lambda: self._run.log({"step": step, **histograms(taken)}))

    def log_figures(self, step: int, figures: Mapping[str, Path]) -> None:
        """Send PNG files as images and CSV files as tables, each under `figures/` and its name."""
        if figures:
            self._guarded(lambda: self._run.log({"step": step, **shown(figures)}))

    def finish(
        self,
        *,
        status: int = 0,
        failure: str = "",
        alert: bool = True,
        step: int = 0,
        figures: Mapping[str, Path] | None = None,
    ) -> bool:
        """Send the last figures, the best model and an alert of a `failure` where they are wanted, and what is left.

        Takes `wandb.finish_timeout` seconds at most; the rest stays in the files. Returns whether all was sent,
        which it never is offline.
        """
        self._guarded(
            lambda: within(
                self._section.finish_timeout, lambda: self._finish(status, failure, alert, step, figures or {})
            )
        )
        if self._online and not self._failed:
            mark_sent(sessions(self._directory, unsent=True))
        return self._online and not self._failed

    def _finish(self, status: int, failure: str, alert: bool, step: int, figures: Mapping[str, Path]) -> None:
        try:
            if failure:
                self._run.summary["failure"] = failure
            if failure and alert and self._section.alerts:
                self._run.alert(title=f"{self._run.name} failed", text=failure, level="ERROR")
            if figures:
                self._run.log({"step": step, **shown(figures)})
            best = best_model(self._directory, self.id) if self._section.log_model == "best" else None
            if best is not None:
                artifact, aliases = best
                self._run.log_artifact(artifact, aliases=aliases)
        finally:
            self._run.finish(exit_code=status)
        if self._messages.unsent:
            raise RuntimeError("the server refused the rest of the run")

    def _guarded(self, action: Callable[[], Any]) -> bool:
        """Whether `action` went well. The first that does not is told of."""
        try:
            action()
        except Exception as error:
            if not self._failed:
                self._failed = True
                warn(self._section, self._note, f"W&B failed ({in_short(error)}); {later(self._directory)}")
            return False
        return True


def warn(section: WandbConfig, note: Note, message: str) -> None:
    if section.strict:
        raise LockstepError(f"{message} (wandb.strict)")
    note(message)


def later(directory: Path) -> str:
    return f"metrics.jsonl has every row, and `python -m trainer sync {directory}` sends what is left"
