"""TensorBoard: rows as scalars, figures as images, the config on the HParams page."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from trainer.config.yaml_dump import to_yaml
from trainer.reporting.trackers.base import (
    Ending,
    Row,
    Session,
    Tracker,
    flat_config,
    numbers_in,
    read_pixels,
)


class TensorBoardTracker(Tracker):
    """Event files in `log_dir`, a path from the working directory; by default `tensorboard` in the run's directory.

    The digest, a text, is left out.
    """

    module: ClassVar[str] = "torch.utils.tensorboard"
    package: ClassVar[str] = "tensorboard"
    cuts: ClassVar[bool] = True

    def __init__(self, log_dir: str | None = None) -> None:
        if log_dir is not None and not log_dir.strip():
            raise ValueError(
                "log_dir is empty; leave it out for the folder tensorboard of the run"
            )
        self._log_dir = log_dir

    def target(self, directory: Path) -> Path:
        """What it writes, where the run's directory is `directory`."""
        return Path(self._log_dir or directory / "tensorboard")

    def begin(self, session: Session) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = _purge_step(session)
        # As it is written: it may be the address of a bucket.
        directory = self._log_dir or str(self.target(session.directory))
        self._writer: Any = SummaryWriter(directory, purge_step=purge_step)
        self._write_config(session)
        if purge_step is not None:
            # Whole steps are purged, and the checkpoint may lie between two rows of one step.
            for row in session.rows:
                if row["step"] >= purge_step:
                    self.log(row)
        self._writer.flush()

    def _write_config(self, session: Session) -> None:
        from torch.utils.tensorboard import summary as summaries

        # `add_hparams` would make a run of its own for them.
        make: Any = summaries.hparams
        metrics = {session.best_metric: None}
        for summary in make(flat_config(session.config), metrics):
            self._writer.file_writer.add_summary(summary)
        text = to_yaml(session.config, sort_keys=False, allow_unicode=True)
        self._writer.add_text("config", _as_code(text), session.step)

    def describe(self) -> str:
        return f"files in {self._writer.log_dir}"

    def log(self, row: Row) -> None:
        step = int(row["step"])
        for name, value in numbers_in(row).items():
            self._writer.add_scalar(name, value, step)
        # A process that is killed loses no row.
        self._writer.flush()

    def figures(self, step: int, figures: Mapping[str, Path]) -> None:
        for name, path in figures.items():
            if path.suffix == ".csv":
                self._writer.add_text(f"figures/{name}", _as_table(path), step)
            else:
                pixels = read_pixels(path)
                self._writer.add_image(
                    f"figures/{name}", pixels, step, dataformats="HWC"
                )

    def finish(self, ending: Ending) -> None:
        if ending.summary:
            text = _as_code(json.dumps(dict(ending.summary), indent=2))
            self._writer.add_text("summary", text, ending.summary["steps"])
        elif ending.reason:
            self._writer.add_text("failure", ending.reason)
        self._writer.close()


def _purge_step(session: Session) -> int | None:
    """The first step to write anew; None for a new run. A step that was never written is written now."""
    if session.step == 0:
        return None
    return min([session.step, *(int(row["step"]) for row in session.missing)])


def _as_code(text: str) -> str:
    """Text that TensorBoard shows as it is: in Markdown, four spaces begin a line of code."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _as_table(path: Path) -> str:
    with path.open(newline="") as file:
        heading, *rows = csv.reader(file)
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
