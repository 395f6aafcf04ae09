"""Saving a run's checkpoints and its best model: what is checked before, and the files written in the background."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
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
from trainer.process.activity import ENDING, LOGGING, SAVING, activity
from trainer.storage import best_model, checkpoint
from trainer.storage.checkpoint import Progress
from trainer.storage.snapshot import Snapshot
from trainer.storage.snapshot_writer import SnapshotWriter


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

    def sync_trackers(self) -> None:
        """Wait until the trackers have every row so far."""

    def sync_rows(self) -> None:
        """Wait until the disk holds every row so far. May be called in another thread."""

    def note(self, text: str) -> None:
        """Show a line on the main process's console."""


class Saving:
    """Writes a run's checkpoints and its best model, and lets nothing be kept that is not finite.

    Training waits for a copy of what they hold. The files are written behind its back, one checkpoint or best model
    after the other, so at any moment they are those of a run that waited for each. An error is raised, on every rank,
    by the next save or by `wait`.

    Attributes: `saved_step`, of the checkpoint last read or begun, None before the first.
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
        # Of the best model as that checkpoint knows it; 0 if it knows none.
        self._saved_best_step = 0
        # Of the newest checkpoint that is complete; the writer's thread sets it, too.
        self._complete_step: int | None = None
        # On the main process, from the first save on.
        self._writer: SnapshotWriter | None = None

    def go_on_from(self, progress: Progress) -> None:
        """The run goes on from a checkpoint with this progress."""
        self.saved_step = self._complete_step = progress.step
        self._saved_best_step = progress.best_step

    def kept_step(self) -> int | None:
        """The step of the newest checkpoint that is complete, once the writer is done; None without one. A collective.

        For a message about another error: a failure of the writer is passed over.
        """

        def settle() -> int | None:
            if self._writer is not None:
                with suppress(Exception):
                    self._writer.wait()
            return self._complete_step

        step: int | None = self._run.ranks.on_main(settle)
        return step

    # ---------------------------------------------------------------- what is checked

    def check_finite(self, progress: Progress, directory: Path | None) -> None:
        """Raise `LockstepError`, on every rank, if a step was not finite. Called before anything is kept."""
        self._finite.check(progress, kept_step=self.kept_step, directory=directory)

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
        """Begin to write a checkpoint of the present step boundary, with the state of `objects`. A collective.

        `check_state` comes before it.
        """
        progress.scaler = self._run.precision.state()
        states = read_states(objects, self._run.ranks)
        if self._run.is_sharded:
            self._run.ranks.on_main(self._wait)  # one set of whole tensors at a time
            self._check_average(progress.step)
            self._state.collect(progress.step)
        begin = partial(self._begin_checkpoint, progress, states, files)
        self._run.ranks.on_main(begin)
        self.saved_step = progress.step
        self._saved_best_step = progress.best_step

    def _begin_checkpoint(
        self, progress: Progress, states: dict[str, dict[str, Any]], files: RunFiles
    ) -> None:
        writer = self._writer_for(files)
        writer.wait()
        self._average.refuse_not_finite(progress.step)
        files.check_directory()
        files.sync_trackers()
        progress.rows = files.rows
        progress.wandb_id = files.wandb_id
        snapshot = self._state.take(progress, states)
        writer.write(
            snapshot,
            # The writer's thread may work while an observer has another working directory.
            partial(self._write_checkpoint, files, files.directory.absolute()),
            partial(self._state.refuse_not_finite, progress.step),
        )

    def _write_checkpoint(
        self, files: RunFiles, directory: Path, snapshot: Snapshot
    ) -> None:
        """In the writer's thread."""
        files.sync_rows()  # a checkpoint never counts rows that a crash can take
        # One that is written is kept, even by keep_checkpoints=0: a stopped run goes on from it.
        keep = max(1, self._run.config.train.keep_checkpoints)
        checkpoint.write(directory / "checkpoints", snapshot, keep=keep)
        self._complete_step = snapshot.step

    def _writer_for(self, files: RunFiles) -> SnapshotWriter:
        if self._writer is None:
            self._writer = SnapshotWriter(files.note)
        return self._writer

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
            self._run.ranks.on_main(partial(self._begin_best, row, files))
        activity.mark(LOGGING)
        return True

    def _begin_best(self, row: Row, files: RunFiles) -> None:
        writer = self._writer_for(files)
        writer.wait()
        files.check_directory()
        saved_best_step = self._saved_best_step
        directory = files.directory.absolute()

        def write(snapshot: Snapshot) -> None:
            best_model.write(directory, snapshot, saved_best_step=saved_best_step)

        self._state.with_best(row, lambda snapshot: writer.write(snapshot, write))

    # ---------------------------------------------------------------- until all is written

    def wait(self) -> None:
        """Wait until everything is written. Raises what went wrong, on every rank. A collective."""
        activity.mark(SAVING)
        self._run.ranks.on_main(self._wait)

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.wait()

    def close(self, files: RunFiles) -> None:
        """Wait until everything is written, at the end of a run that may have failed. An error is shown, not raised."""
        if self._writer is None:
            return
        activity.mark(SAVING)
        error = self._writer.close()
        activity.mark(ENDING)
        self._writer = None
        if error is not None:
            files.note(f"the last checkpoint or best model was not written: {error}")
