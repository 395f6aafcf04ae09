"""Going on from a checkpoint: which one, whether it is of this run, and what the run takes over of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from trainer.components.rate_change import describe_rate_change
from trainer.components.schedule import Schedule
from trainer.components.weights import weights_file
from trainer.core.further import restore_modes_of
from trainer.core.observers import Stateful
from trainer.core.preflight import order_digest
from trainer.core.run import Run
from trainer.core.saved_state import SavedState
from trainer.core.stateful import load_states
from trainer.errors import ConfigError
from trainer.exact.plan import Plan
from trainer.storage import best_model, checkpoint
from trainer.storage.checkpoint import Checkpoint, Progress
from trainer.storage.data_record import (
    DataRecord,
    check_same_data,
    check_same_order,
    record_data,
)
from trainer.storage.environment import describe_decoder_change
from trainer.storage.run_directory import check_same_run, run_path
from trainer.storage.shared_checkpoint import load_on_all


class Resuming:
    """Finds a run's checkpoint, checks it against the run, and holds what the run can take over of it only later.

    Attributes: `notes`, on damaged checkpoints, and on stateful objects that the checkpoint or the run lacks;
    `data_note`, what `run.resume_changes=allow` let pass; `rate_note`, what the resume does to the learning rate.
    """

    def __init__(self, run: Run, state: SavedState) -> None:
        self._run = run
        self._state = state
        self.notes: list[str] = []
        self.data_note = ""
        self.rate_note = ""
        # Of a run that is resumed on the same data; None where it is to be made.
        self._data_record: DataRecord | None = None
        # Of the checkpoint, for `start`: modes of modules, and the states of stateful objects.
        self._further: Mapping[str, Any] = {}
        self._states: Mapping[str, Any] | None = None

    # ---------------------------------------------------------------- the checkpoint

    def has_checkpoint(self) -> bool:
        """True if there is a checkpoint to resume from. A collective."""
        section = self._run.config.run
        if section.resume == "never":
            return False
        checkpoints = run_path(section) / "checkpoints"
        path = self._run.ranks.on_main(lambda: checkpoint.latest(checkpoints))
        return path is not None

    def read(self, paths: Sequence[Path], directory: Path) -> Checkpoint:
        """The newest of the checkpoints `paths`, of the run in `directory`, that can be read. A collective.

        Raises `ConfigError` if it is not of this run.
        """
        content, notes = load_on_all(
            paths,
            self._run.module,
            self._run.ranks,
            lambda content: self._check(content, directory),
        )
        self.notes += notes
        return content

    def _check(self, content: Checkpoint, directory: Path) -> None:
        run = self._run
        section = run.config.run
        check_same_run(content.config, run.config, section)
        self._data_record, self.data_note = check_same_data(
            directory, run.data, section
        )
        check_same_order(directory, order_digest(run.plan), section)
        decoder = run.train_loader.device_decoder
        if note := describe_decoder_change(directory, decoder):
            self.notes.append(note)
        if content.progress.step > run.plan.total_steps:
            raise ConfigError(
                "train.max_steps" if run.config.train.max_steps else "train.epochs",
                f"the run to resume is at step {content.progress.step} and would end at {run.plan.total_steps}; raise "
                f"it, or start a new run with run.resume=never",
            )

    def data_record(self) -> DataRecord:
        """What the run reads. Only the main process needs it."""
        if self._data_record is None:
            weights = weights_file(self._run.config.model, nullcontext)
            self._data_record = record_data(
                self._run.data, weights, order_digest(self._run.plan)
            )
        return self._data_record

    # ---------------------------------------------------------------- what is taken over

    def restore(self, content: Checkpoint) -> None:
        """Take over weights, loss and optimizer; the rest waits for `restore_modes` and `load_states`."""
        self._further, self._states = self._state.restore(content)

    def restore_best(self, content: Checkpoint, directory: Path) -> None:
        """Make `best/` the one that the checkpoint knows. A collective."""
        step = content.progress.best_step
        self._run.ranks.on_main(lambda: best_model.restore(directory, step))

    def describe_rate(self, content: Checkpoint, schedule: Schedule) -> None:
        """Note what becomes of the learning rate, now by `schedule`."""
        self.rate_note = describe_rate_change(
            content.config,
            self._run.config,
            schedule,
            plan=self._run.plan,
            history=content.progress.history,
            steps_done=content.progress.step,
        )

    def restore_modes(self) -> None:
        """Put the modules into the modes that the checkpoint has them in."""
        restore_modes_of(self._further, self._run.module)
        self._further = {}

    def load_states(self, objects: Mapping[str, Stateful]) -> None:
        """Give stateful objects their states, once observers have seen the model."""
        if self._states is not None:
            self.notes += load_states(objects, self._states)
            self._states = None


def epoch_to_go_on_in(progress: Progress, plan: Plan) -> int:
    """The epoch of the next step; that of the last one where its epoch has not ended yet."""
    next_step = min(progress.step, plan.total_steps - 1)
    step = progress.step - 1 if progress.epoch_end_is_due else next_step
    return step // plan.steps_per_epoch
