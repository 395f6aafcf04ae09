"""Writing a run's checkpoints and its best model: what is checked before, and what is known of them afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from trainer.core.ema import WeightAverage
from trainer.core.evaluated_weights import best_is_average
from trainer.core.evaluations import Evaluations
from trainer.core.finite_watch import FiniteWatch
from trainer.core.logged_metrics import epoch_column
from trainer.core.metrics import Row
from trainer.core.observers import Stateful
from trainer.core.run import Run
from trainer.core.same_weights import check_same_weights
from trainer.core.saved_state import SavedState, is_best
from trainer.core.stateful import read_states
from trainer.errors import ConfigError
from trainer.exact.reduction import Reduction
from trainer.process.activity import LOGGING, SAVING, activity
from trainer.storage.checkpoint import Progress


class RunFiles(Protocol):
    """The run's directory and its rows, as saving needs them; the `Journal` of a run is one."""

    directory: Path

    @property
    def rows(self) -> int:
        """Rows in `metrics.jsonl`."""

    @property
    def wandb_id(self) -> str | None: ...

    def check_directory(self) -> None:
        """Raise `LockstepError` if the run's directory was deleted or moved."""

    def sync(self) -> None:
        """Wait until the disk holds every row so far."""

    def note(self, text: str) -> None:
        """Show a line on the main process's console."""


class Saving:
    """Writes a run's checkpoints and its best model, and lets nothing be kept that is not finite.

    Attributes: `saved_step`, of the checkpoint last read or written, None before the first; `saved_best_step`, of the
    best model as that checkpoint knows it, 0 if it knows none.
    """

    def __init__(
        self,
        run: Run,
        state: SavedState,
        *,
        reduction: Reduction,
        average: WeightAverage,
        evaluations: Evaluations,
        finite: FiniteWatch,
    ) -> None:
        self._run = run
        self._state = state
        self._reduction = reduction
        self._average = average
        self._evaluations = evaluations
        self._finite = finite
        self.saved_step: int | None = None
        self.saved_best_step = 0

    def go_on_from(self, progress: Progress) -> None:
        """The run goes on from a checkpoint with this progress."""
        self.saved_step = progress.step
        self.saved_best_step = progress.best_step

    # ---------------------------------------------------------------- what is checked

    def check_finite(self, progress: Progress, directory: Path | None) -> None:
        """Raise `LockstepError`, on every rank, if a step was not finite. Called before anything is kept."""
        self._finite.check(progress, saved_step=self.saved_step, directory=directory)

    def check_state(self, progress: Progress, files: RunFiles) -> None:
        """Raise `LockstepError` if the run is not finite, or the ranks' weights are not the same. A collective."""
        self.check_finite(progress, files.directory)
        self._reduction.gather()
        check_same_weights(self._run, progress.step)
        self._tell_late_buffers(files)

    def check_unsaved(self, progress: Progress, files: RunFiles) -> None:
        """The same, unless a checkpoint of this step was written, before which it was checked."""
        if self.saved_step != progress.step:
            self.check_state(progress, files)

    def _tell_late_buffers(self, files: RunFiles) -> None:
        """Name the buffers that moved first after the first step: until now they followed no rule."""
        names = ", ".join(self._reduction.take_late_buffers())
        if not names:
            return
        fact = f"forward moves {names}, which it left alone in the first step"
        if self._run.bitwise:
            raise ConfigError(
                "run.reproducibility",
                f"bitwise must know in the first step which buffers move, and {fact}; move it in every forward, or in "
                f"none",
            )
        files.note(f"{fact}: up to here it may depend on the number of processes")

    # ---------------------------------------------------------------- what is written

    def write_checkpoint(
        self, progress: Progress, objects: Mapping[str, Stateful], files: RunFiles
    ) -> None:
        """Write a checkpoint of the present step boundary, with the state of `objects`. A collective.

        `check_state` comes before it.
        """
        progress.scaler = self._run.precision.state()
        states = read_states(objects, self._run.ranks)
        if self._run.is_sharded:
            self._check_average(progress.step)
            self._state.collect(progress.step)
        write = partial(self._write_checkpoint, progress, states, files)
        self._run.ranks.on_main(write)
        self.go_on_from(progress)

    def _write_checkpoint(
        self, progress: Progress, states: dict[str, dict[str, Any]], files: RunFiles
    ) -> None:
        self._average.refuse_not_finite(progress.step)
        files.sync()
        progress.rows = files.rows
        progress.wandb_id = files.wandb_id
        self._state.write_checkpoint(files.directory / "checkpoints", progress, states)

    def _check_average(self, step: int) -> None:
        """Raise `LockstepError`, on every rank, if the average is not finite: a rank may see its own part alone."""
        self._run.ranks.on_each(lambda: self._average.refuse_not_finite(step))

    def write_if_best(self, row: Row, progress: Progress, files: RunFiles) -> bool:
        """Save the model if the `row` of its evaluation is the best so far, and return whether it is. A collective.

        Every rank decides alike, from numbers that are the same on all.
        """
        best = self._run.config.best
        value = row.get(epoch_column(best.metric))
        if value is None:
            return False
        progress.history.append(value)
        if not is_best(value, progress.best, best.mode):
            return False
        progress.best = value
        progress.best_step = int(row["step"])
        progress.best_epoch = int(row["epoch"])
        activity.mark(SAVING)
        self._reduction.gather()
        is_average = best_is_average(self._run.config)
        if is_average:
            self._check_average(progress.best_step)
        with self._evaluations.weights(is_average=is_average):
            self._state.collect_best()
            self._run.ranks.on_main(partial(self._write_best, row, files))
        activity.mark(LOGGING)
        return True

    def _write_best(self, row: Row, files: RunFiles) -> None:
        files.check_directory()
        self._state.write_best(
            files.directory, row, saved_best_step=self.saved_best_step
        )
