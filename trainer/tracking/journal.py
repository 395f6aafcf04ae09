"""All that a run tells of itself, from its main process: console, `metrics.jsonl`, W&B, the run directory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint import Progress
from trainer.config import Config
from trainer.distributed import Ranks
from trainer.files import write_json
from trainer.plan import Plan
from trainer.run_directory import RunDirectory, run_path, write_config
from trainer.tracking.console import Console
from trainer.tracking.jsonl import MetricsFile
from trainer.tracking.wandb import WandbRun, start_wandb
from trainer.trial import reason

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

    def __enter__(self) -> Journal:
        self.resume_from: Path | None = self._ranks.on_main(self._open)
        return self

    def _open(self) -> Path | None:
        self._run = RunDirectory(self._config.run)
        return self._run.resume_from

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, *__: object) -> None:
        self.console.close()
        if self._wandb is not None:
            self._wandb.finish(failure=None if error is None else reason(error))
        if self._metrics is not None:
            self._metrics.close()
        if self._run is not None:
            self._run.close()

    def begin(self, header: Facts, plan: Plan, progress: Progress) -> None:
        """Show the header, open the files and start the bar."""
        self._ranks.on_main(lambda: self._begin(header, plan, progress))
        self._epoch_began = time.monotonic()

    def _begin(self, header: Facts, plan: Plan, progress: Progress) -> None:
        assert self._run is not None
        write_config(self.directory, self._config)
        self._metrics = MetricsFile(self.directory / "metrics.jsonl", keep_rows=progress.rows)
        self._wandb = start_wandb(
            self._config.wandb,
            run_name=self._config.run.name,
            directory=self.directory,
            config=self._config.to_dict(),
            run_id=progress.wandb_id,
            note=self.console.note,
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

    def log(self, row: Mapping[str, float]) -> None:
        """A row of an interval of steps."""
        self._ranks.on_main(lambda: self._write(row))
        self.console.log(row)

    def epoch(self, row: Mapping[str, float], is_best: bool) -> None:
        """A row of an epoch's end, or of the run's."""
        self._ranks.on_main(lambda: self._write(row))
        seconds, self._epoch_began = time.monotonic() - self._epoch_began, time.monotonic()
        shown = {name.replace("train/epoch_", "train/"): value for name, value in row.items()}
        self.console.epoch(int(row["epoch"]), self._config.train.epochs, shown, seconds, is_best)

    def _write(self, row: Mapping[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.log(row)
        if self._wandb is not None:
            self._wandb.log(row)

    def finish(self, summary: Mapping[str, Any], facts: Facts, figures: Mapping[str, Path]) -> None:
        """Write `summary.json` and close with what matters of it."""
        self._ranks.on_main(lambda: write_json(self.directory / "summary.json", dict(summary)))
        if self._wandb is not None:
            self._wandb.log_images(figures)
        self.console.summary(facts)
