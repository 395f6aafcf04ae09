"""Everything a run reports of itself, from its main process: console, `metrics.jsonl`, trackers, the run directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from trainer.config.schema import Config
from trainer.data.bad_samples import BadSample, Quarantine
from trainer.errors import LockstepError, Stopped
from trainer.exact.plan import Plan
from trainer.process.activity import activity
from trainer.process.parent import failure_reason
from trainer.process.ranks import Ranks
from trainer.reporting.console import Console
from trainer.reporting.formats import Row
from trainer.reporting.jsonl import MetricsFile, readable_rows
from trainer.reporting.trackers.base import Ending, Tracker
from trainer.reporting.trackers.group import Trackers
from trainer.reporting.wandb.run import WandbRun, start_wandb
from trainer.storage import bad_samples
from trainer.storage.checkpoint import Progress
from trainer.storage.data_record import DataRecord, write_record
from trainer.storage.environment import ENVIRONMENT_FILE
from trainer.storage.files import write_json
from trainer.storage.run_directory import (
    RunDirectory,
    run_path,
    sees_token,
    write_config,
)

Facts = Sequence[tuple[str, str]]


class Journal:
    """Opened by all ranks together, as a context; only the main process writes and shows anything.

    Attributes: `directory`, the run's; `resume_from`, the checkpoints to resume from; `wandb`, the W&B run,
    None on every other process, where W&B is disabled, and before `begin`.
    """

    def __init__(
        self, config: Config, ranks: Ranks, trackers: Sequence[Tracker] = ()
    ) -> None:
        self.directory = run_path(config.run)
        self.console = Console(active=ranks.is_main)
        self.wandb: WandbRun | None = None
        # Of the main process; the others have none.
        self._trackers = Trackers(trackers, config, self.console.note)
        self._config = config
        self._ranks = ranks
        self._run_directory: RunDirectory | None = None
        self._metrics: MetricsFile | None = None
        self._epoch_start = 0.0
        self._final_step = 0
        self._final_figures: dict[str, Path] = {}
        self._summary: Mapping[str, Any] = {}

    # ---------------------------------------------------------------- begin and end

    def __enter__(self) -> Journal:
        self.resume_from: list[Path] = self._ranks.on_main(self._open)
        return self

    def _open(self) -> list[Path]:
        self._run_directory = RunDirectory(self._config.run)
        return self._run_directory.resume_from

    def with_sharing(
        self, facts_of_ranks: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """The facts of each rank with whether it sees the run's directory. A collective.

        Only the main process uses the directory, so a run needs no shared disk for it.
        """
        token = self._ranks.on_main(self._token)
        sees_directory = partial(sees_token, self.directory, token)
        if sees_directory():
            # A process that ends by itself takes its token back.
            activity.is_main_lost = sees_directory
        sees = self._ranks.gather([sees_directory()])
        facts = []
        for values, shares in zip(facts_of_ranks, sees, strict=True):
            facts.append({**values, "shares_run_directory": shares})
        return facts

    def _token(self) -> str:
        assert self._run_directory is not None
        return self._run_directory.token

    def begin(
        self,
        header: Facts,
        progress: Progress,
        record_data: Callable[[], DataRecord],
        environment: Callable[[DataRecord], dict[str, Any]],
    ) -> None:
        """Open the files, start W&B and show the header. Only the main process calls the functions."""
        self._ranks.on_main(
            partial(self._begin, header, progress, record_data, environment)
        )

    def _begin(
        self,
        header: Facts,
        progress: Progress,
        record_data: Callable[[], DataRecord],
        environment: Callable[[DataRecord], dict[str, Any]],
    ) -> None:
        assert self._run_directory is not None
        write_config(self.directory, self._config)
        record = record_data()
        write_record(self.directory, record)
        write_json(self.directory / ENVIRONMENT_FILE, environment(record))
        rows = self._open_metrics(progress)
        tracking = [
            "W&B disabled" if self.wandb is None else self.wandb.describe(),
            *self._trackers.begin(self.directory, progress.step, rows),
        ]
        self.console.header([*header, *(("tracking", line) for line in tracking)])
        if self._run_directory.moved_to is not None:
            self.console.note(
                f"{self.directory} held an earlier run, which is now {self._run_directory.moved_to}"
            )
        if progress.step:
            self.console.note(f"resumed after step {progress.step}")

    def _open_metrics(self, progress: Progress) -> list[dict[str, Any]]:
        """Open `metrics.jsonl` and W&B, each with the rows that the checkpoint counted; returns these."""
        # The rows after the checkpoint go from the file, because the resumed run computes them again. They are read
        # before, because W&B may have received them already and must not get them twice.
        path = self.directory / "metrics.jsonl"
        earlier_rows = readable_rows(path) if progress.rows and path.exists() else []
        self._metrics = MetricsFile(path, keep_rows=progress.rows)
        if self._metrics.rows < progress.rows:
            self.console.note(
                f"{path} has {self._metrics.rows} rows where the checkpoint counted {progress.rows}; the others are "
                f"lost, and the run itself is not touched by it"
            )
        self.wandb = start_wandb(
            self._config.wandb,
            run_name=self._config.run.name,
            directory=self.directory,
            config=self._config.to_dict(),
            run_id=progress.wandb_id,
            note=self.console.note,
            earlier_rows=earlier_rows,
            valid_rows=self._metrics.rows,
        )
        return earlier_rows[: self._metrics.rows]

    def start_clock(
        self, plan: Plan, first_step: int, last_step: int | None = None
    ) -> None:
        """Training starts now, after `first_step` steps of earlier sessions: start the bar and the first epoch's time.

        The bar ends at `last_step`, where this session stops; by default at the run's end.

        What was drawn and uploaded before belongs to no epoch, so the epochs' times add up to at most the run's.
        """
        total_steps = plan.total_steps if last_step is None else last_step
        self.console.begin(total_steps, plan.steps_per_epoch, first_step)
        self._epoch_start = monotonic()

    def keep_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`. A collective."""
        self._ranks.on_main(partial(self._write_summary, summary))

    def _write_summary(self, summary: Mapping[str, Any]) -> None:
        self.check_directory()
        write_json(self.directory / "summary.json", dict(summary))

    def finish(
        self, summary: Mapping[str, Any], facts: Facts, figures: Mapping[str, Path]
    ) -> None:
        """Show the results, and send `figures` to W&B and the trackers when the journal closes."""
        # They get the figures last of all, when the journal closes: it may take seconds, and it may fail.
        self._summary = summary
        self._final_step = summary["steps"]
        self._final_figures = dict(figures)
        self.console.summary(facts)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        self.console.close()
        if self._metrics is not None:
            self._metrics.close()
        try:
            if self.wandb is not None:
                self._finish_wandb(self.wandb, error)
            self._trackers.figures(self._final_step, self._final_figures)
            self._trackers.finish(_ending(error, self._summary))
        finally:
            if self._run_directory is not None:
                self._run_directory.close()

    def _finish_wandb(self, run: WandbRun, error: BaseException | None) -> None:
        step = self._final_step
        figures = self._final_figures
        if error is None:
            run.finish(step=step, figures=figures)
            return
        status = error.exit_status if isinstance(error, LockstepError) else 1
        alert = not isinstance(error, Stopped)  # a stop by signal is intended
        run.finish(
            status=status,
            failure=failure_reason(error),
            alert=alert,
            step=step,
            figures=figures,
        )

    # ---------------------------------------------------------------- while the run goes on

    @property
    def rows(self) -> int:
        """Rows in `metrics.jsonl`; 0 on every process but the main one."""
        return 0 if self._metrics is None else self._metrics.rows

    @property
    def wandb_id(self) -> str | None:
        return None if self.wandb is None else self.wandb.id

    def bad_samples(self, quarantine: Quarantine, added: Sequence[BadSample]) -> None:
        """Write the list of all bad samples, and show those that were `added` to it. A collective."""
        self._ranks.on_main(partial(self._write_bad_samples, quarantine))
        for bad in added:
            self.console.note(
                f"left out from step {bad.step} on: {bad.name()}: {bad.reason}"
            )

    def _write_bad_samples(self, quarantine: Quarantine) -> None:
        self.check_directory()
        bad_samples.write(self.directory, quarantine.samples)

    def check_directory(self) -> None:
        """Raise `LockstepError` if the run's directory was deleted or moved. On the main process only."""
        if self._run_directory is not None:
            self._run_directory.check()

    def sync_rows(self) -> None:
        """Wait until the disk holds every row so far, before a checkpoint that counts them is written."""
        if self._metrics is not None:
            self._metrics.sync()

    def sync_trackers(self) -> None:
        """Wait until the trackers have every row so far."""
        self._trackers.sync()

    def note(self, text: str) -> None:
        """Show a line on the console."""
        self.console.note(text)

    def advance(self, step_number: int) -> None:
        self.console.advance(step_number)

    def log(self, row: Row, digest: str) -> None:
        """Log the row of an interval of steps, with the digest of the weights after it. A collective."""
        self._ranks.on_main(partial(self._write, {**row, "digest": digest}))
        self.console.log(row)

    def epoch(
        self, row: Row, is_best: bool, *, steps_per_epoch: int | None = None
    ) -> None:
        """Log and show the row of an epoch's end, or of the run's. A collective.

        With `steps_per_epoch`, that of an evaluation within an epoch: its place is shown in epochs done, as 2.50. The
        time is all since the last such row: steps, evaluation and checkpoints.
        """
        self._ranks.on_main(partial(self._write, row))
        now = monotonic()
        seconds = now - self._epoch_start
        self._epoch_start = now
        # The console shows `train/epoch_loss`, the mean of the epoch, in its column `train/loss`.
        columns = {
            name.replace("train/epoch_", "train/"): value for name, value in row.items()
        }
        epoch = str(int(row["epoch"]))
        if steps_per_epoch is not None:
            epoch = f"{row['step'] / steps_per_epoch:.2f}"
        self.console.epoch(epoch, self._config.train.epochs, columns, seconds, is_best)

    def test(self, row: Row) -> None:
        """Log the row of the test set; the summary shows it. A collective."""
        self._ranks.on_main(partial(self._write, row))

    def _write(self, row: Mapping[str, Any]) -> None:
        self.check_directory()
        if self._metrics is not None:
            self._metrics.log(row)
        if self.wandb is not None:
            self.wandb.log(row)
        self._trackers.log(row)

    def figures(self, figures: Mapping[str, Path], step: int = 0) -> None:
        """Send the figures that were drawn after a step, or before the first one."""
        if self.wandb is not None:
            self.wandb.log_figures(step, figures)
        self._trackers.figures(step, figures)


def _ending(error: BaseException | None, summary: Mapping[str, Any]) -> Ending:
    if error is None:
        return Ending("finished", summary, "")
    status: Literal["stopped", "failed"] = (
        "stopped" if isinstance(error, Stopped) else "failed"
    )
    return Ending(status, {}, failure_reason(error))
