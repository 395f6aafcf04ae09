"""A run's W&B run, on the main process only. W&B may be absent, slow or down; training continues in any case."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trainer.config.run_sections import WandbConfig
from trainer.config.secrets import redacted, without_logins
from trainer.errors import LockstepError
from trainer.reporting.formats import shorten_error
from trainer.reporting.wandb.client import (
    ClientMessages,
    effective_mode,
    run_with_timeout,
    start_client,
)
from trainer.reporting.wandb.files import (
    Histogram,
    best_model_artifact,
    is_offline,
    mark_sent,
    sessions,
    wrap_figures,
    wrap_histograms,
)
from trainer.reporting.wandb.rows import EarlierRows, Row

Note = Callable[[str], None]  # shows one line to the user


def start_wandb(
    section: WandbConfig,
    *,
    run_name: str,
    directory: Path,
    config: Mapping[str, Any],
    run_id: str | None,
    note: Note,
    earlier_rows: Sequence[Row] = (),
    valid_rows: int = 0,
) -> WandbRun | None:
    """Start the W&B run; None if it is disabled (then wandb is not even imported) or cannot start.

    With a `run_id` it continues that run, whose rows were `earlier_rows`; only the first `valid_rows` still count.
    Raises `LockstepError` for what the user must correct.
    """
    if effective_mode(section) == "disabled":
        return None
    try:
        run = WandbRun(
            section,
            run_name=run_name,
            directory=directory,
            config=config,
            run_id=run_id,
            note=note,
        )
    except LockstepError:
        raise
    except Exception as error:
        _warn(
            section,
            note,
            f"W&B did not start ({shorten_error(error)}); the run continues without it",
        )
        return None
    if run_id is not None:
        run.send_missing_rows(earlier_rows, valid_rows)
    return run


class WandbRun:
    """A W&B run whose files are in `directory/wandb`.

    No failure of W&B is raised: `note` reports the first one. With `wandb.strict` it is raised as a `LockstepError`.
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
        self._section = section
        self._note = note
        self._directory = directory
        self._messages = ClientMessages()
        self._earlier_rows = EarlierRows((), 0, None)
        self._accepts_rows = True
        self._failed = False
        # If it is missing, wandb silently writes elsewhere.
        (directory / "wandb").mkdir(parents=True, exist_ok=True)
        sessions_before = sessions(directory, unsent=True)
        arguments = _init_arguments(section, run_name, directory, config, run_id)
        client = start_client(section, arguments, self._messages, **settings)
        self._run = client.run
        self._state = client.state
        self._online = client.state == "online"
        self.id: str = self._run.id
        # W&B drops a row whose explicit `step=` is not past the last one, so the step is a value like any other.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if client.error is not None:
            # The failed online start left a session without rows: there is nothing to send of it.
            for file in sessions(directory, unsent=True):
                if file not in sessions_before and not is_offline(file):
                    mark_sent([file])
            reason = shorten_error(client.error)
            _warn(
                section,
                note,
                f"W&B is out of reach ({reason}), so the run is offline; {_sync_hint(directory)}",
            )

    def describe(self) -> str:
        """`online, <the run's page>`, or `offline (why), files in <directory>`."""
        if self._online:
            return f"online, {self._run.url}"
        return f"{self._state}, files in {self._directory / 'wandb'}"

    def send_missing_rows(self, earlier_rows: Sequence[Row], valid_rows: int) -> int:
        """Send the rows of earlier sessions that the server lacks; returns how many those were.

        From then on, `log` skips every row that the server has already.
        """
        self._accepts_rows = self._attempt(
            self._send_missing_rows, earlier_rows, valid_rows
        )
        return len(self._earlier_rows.missing)

    def _send_missing_rows(self, earlier_rows: Sequence[Row], valid_rows: int) -> None:
        summary = dict(self._run.summary) if self._online else None
        self._earlier_rows = EarlierRows(earlier_rows, valid_rows, summary)
        for row in self._earlier_rows.missing:
            self._run.log(dict(row))

    def has(self, name: str) -> bool:
        """True if the run has a value of that name."""
        return name in self._run.summary.keys()  # noqa: SIM118 - the summary is no mapping

    def log(self, row: Row) -> None:
        """Send a row. After a failure no more rows are sent: `sync` expects the missing ones at the end."""
        if self._accepts_rows and not self._earlier_rows.has_received(row):
            self._accepts_rows = self._attempt(self._run.log, dict(row))

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        if step > self._earlier_rows.last_step:
            self._attempt(self._send_histograms, step, histograms)

    def _send_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        self._run.log({"step": step, **wrap_histograms(histograms)})

    def log_figures(self, step: int, figures: Mapping[str, Path]) -> None:
        """Send PNG files as images and CSV files as tables, each under `figures/` and its name."""
        if figures:
            self._attempt(self._send_figures, step, figures)

    def _send_figures(self, step: int, figures: Mapping[str, Path]) -> None:
        self._run.log({"step": step, **wrap_figures(figures)})

    def finish(
        self,
        *,
        status: int = 0,
        failure: str = "",
        alert: bool = True,
        step: int = 0,
        figures: Mapping[str, Path] | None = None,
    ) -> bool:
        """Send the last figures and all that is left; by config, the best model too, and an alert of a `failure`.

        Takes `wandb.finish_timeout` seconds at most (`KILL_DELAY` more if the client hangs); the rest stays in the
        files. Returns True if the server has everything, which is never the case offline.
        """
        finish = partial(
            self._finish,
            status=status,
            failure=failure,
            alert=alert,
            step=step,
            figures=figures or {},
        )
        self._attempt(run_with_timeout, self._section.finish_timeout, finish)
        is_complete = self._online and not self._failed
        if is_complete:
            mark_sent(sessions(self._directory, unsent=True))
        return is_complete

    def _finish(
        self,
        *,
        status: int,
        failure: str,
        alert: bool,
        step: int,
        figures: Mapping[str, Path],
    ) -> None:
        try:
            if failure:
                self._run.summary["failure"] = failure
            if failure and alert and self._section.alerts:
                self._run.alert(
                    title=f"{self._run.name} failed", text=failure, level="ERROR"
                )
            if figures:
                self._send_figures(step, figures)
            if self._section.log_model == "best":
                self._send_best_model()
        finally:
            self._run.finish(exit_code=status)
        if self._messages.upload_stopped:
            raise RuntimeError("the server refused the rest of the run")

    def _send_best_model(self) -> None:
        best = best_model_artifact(self._directory, self.id)
        if best is not None:
            artifact, aliases = best
            self._run.log_artifact(artifact, aliases=aliases)

    def _attempt(self, action: Callable[..., Any], *arguments: Any) -> bool:
        """Call `action`. True if it succeeded; only the first failure is reported."""
        try:
            action(*arguments)
        except Exception as error:
            if not self._failed:
                self._failed = True
                message = f"W&B failed ({shorten_error(error)}); {_sync_hint(self._directory)}"
                _warn(self._section, self._note, message)
            return False
        return True


def _init_arguments(
    section: WandbConfig,
    run_name: str,
    directory: Path,
    config: Mapping[str, Any],
    run_id: str | None,
) -> dict[str, Any]:
    """The arguments of `wandb.init`."""
    arguments = {
        "name": section.name or run_name,
        "dir": str(directory),
        "config": redacted(config),
        "group": section.group,
        "job_type": section.job_type,
        "tags": section.tags or None,
        "notes": section.notes and without_logins(section.notes),
    }
    # In a sweep, the agent has set project, entity and id.
    if "WANDB_SWEEP_ID" not in os.environ:
        arguments |= {
            "project": section.project,
            "entity": section.entity,
            "id": run_id,
            "resume": "allow",
        }
    return arguments


def _warn(section: WandbConfig, note: Note, message: str) -> None:
    if section.strict:
        raise LockstepError(f"{message} (wandb.strict)")
    note(message)


def _sync_hint(directory: Path) -> str:
    return f"metrics.jsonl has every row, and `python -m trainer sync {directory}` sends what is left"
