"""All that a run tells of itself, from its main process: console, `metrics.jsonl`, W&B, the run directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from trainer.config.schema import Config
from trainer.errors import Stopped
from trainer.exact.plan import Plan
from trainer.process.parent import failure_reason
from trainer.process.ranks import Ranks
from trainer.reporting.console import Console
from trainer.reporting.jsonl import MetricsFile, read_rows
from trainer.reporting.wandb.histograms import take_histograms
from trainer.reporting.wandb.run import WandbRun, start_wandb
from trainer.storage.checkpoint import Progress
from trainer.storage.files import write_json
from trainer.storage.run_directory import RunDirectory, run_path, write_config

Facts = Sequence[tuple[str, str]]


class Journal:
    """Opened by every rank together; only the main one's writes anything.

    `resume_from` is the checkpoint to go on from, or None.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.directory = run_path(config.run)
        self.console = Console(active=ranks.is_main)
        self._config = config
        self._ranks = ranks
        self._run: RunDirectory | None = None
        self._metrics: MetricsFile | None = None
        self._wandb: WandbRun | None = None
        self._steps, self._figures = 0, dict[str, Path]()  # drawn at the end

    def __enter__(self) -> Journal:
        self.resume_from: Path | None = self._ranks.on_main(self._open)
        return self

    def _open(self) -> Path | None:
        self._run = RunDirectory(self._config.run)
        return self._run.resume_from

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.console.close()
        if self._metrics is not None:
            self._metrics.close()
        try:
            if self._wandb is not None:
                failure = "" if error is None else failure_reason(error)
                status = 0 if error is None else getattr(error, "exit_status", 1)
                wanted = not isinstance(error, Stopped)
                self._wandb.finish(
                    status=status, failure=failure, alert=wanted, step=self._steps, figures=self._figures
                )
        finally:
            if self._run is not None:
                self._run.close()

    def begin(self, header: Facts, plan: Plan, progress: Progress, environment: Callable[[], dict[str, Any]]) -> None:
        """Show the header, open the files and start the bar. The main process alone asks for the `environment`."""
        self._ranks.on_main(lambda: self._begin(header, plan, progress, environment()))
        self._epoch_began = time.monotonic()

    def _begin(self, header: Facts, plan: Plan, progress: Progress, environment: dict[str, Any]) -> None:
        assert self._run is not None
        write_config(self.directory, self._config)
        write_json(self.directory / "environment.json", environment)
        path = self.directory / "metrics.jsonl"
        earlier = read_rows(path) if progress.rows and path.exists() else []
        self._metrics = MetricsFile(path, keep_rows=progress.rows)
        self._wandb = start_wandb(
            self._config.wandb,
            run_name=self._config.run.name,
            directory=self.directory,
            config=self._config.to_dict(),
            run_id=progress.wandb_id,
            note=self.console.note,
            earlier=earlier,
            kept=progress.rows,
        )
        self.console.header([*header, ("tracking", self._wandb.describe() if self._wandb else "W&B disabled")])
        if self._run.moved_to is not None:
            self.console.note(f"{self.directory} held a run; it is now {self._run.moved_to}")
        if progress.step:
            self.console.note(f"resumed after step {progress.step}")
        self.console.begin(plan.total_steps, plan.steps_per_epoch, progress.step)

    @property
    def rows(self) -> int:
        return self._metrics.rows if self._metrics else 0

    @property
    def wandb_id(self) -> str | None:
        return self._wandb.id if self._wandb else None

    def advance(self, step_number: int) -> None:
        self.console.advance(step_number)

    def log(self, row: Mapping[str, float], digest: str) -> None:
        """A row of an interval of steps, and the digest of the weights after it."""
        self._ranks.on_main(lambda: self._write({**row, "digest": digest}))
        self.console.log(row)

    def epoch(self, row: Mapping[str, float], is_best: bool) -> None:
        """A row of an epoch's end, or of the run's."""
        self._ranks.on_main(lambda: self._write(row))
        seconds, self._epoch_began = time.monotonic() - self._epoch_began, time.monotonic()
        shown = {name.replace("train/epoch_", "train/"): value for name, value in row.items()}
        self.console.epoch(int(row["epoch"]), self._config.train.epochs, shown, seconds, is_best)

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.log(row)
        if self._wandb is not None:
            self._wandb.log(row)

    def histograms(self, step: int, module: nn.Module) -> None:
        """Send histograms of weights and gradients to W&B, the only place for them."""
        if self._wandb is not None:
            self._wandb.log_histograms(step, take_histograms(module))

    def figures(self, figures: Mapping[str, Path]) -> None:
        """Show what was drawn before the first step."""
        if self._wandb is not None:
            self._wandb.log_figures(0, figures)

    def finish(self, summary: Mapping[str, Any], facts: Facts, figures: Mapping[str, Path]) -> None:
        """Write `summary.json` and close with what matters of it."""
        self._ranks.on_main(lambda: write_json(self.directory / "summary.json", dict(summary)))
        self._steps, self._figures = summary["steps"], dict(figures)
        self.console.summary(facts)
