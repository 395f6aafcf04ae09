"""`Trainer`: the loop, the step, the logged rows and the checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.components.optimizer import (
    build_optimizer,
    learning_rates,
    load_named_state,
    named_state,
    set_learning_rate,
)
from trainer.components.schedule import Schedule, build_schedule
from trainer.components.task import Task
from trainer.config.registry import build_observers
from trainer.config.schema import Config
from trainer.core.build import build_run, settings_of
from trainer.core.further import (
    of_best,
    read_further,
    restore_further,
    restore_modes_of,
)
from trainer.core.fuse_check import choose_fuse
from trainer.core.metrics import Meter, Row, Stopwatch, Totals
from trainer.core.observers import Observer, Observers, Stateful
from trainer.core.preflight import notes_on
from trainer.core.recalibrate import recalibrate_statistics
from trainer.core.refused import refuse_nondeterministic
from trainer.core.rehearsal import check_disk, check_states, rehearse
from trainer.core.same_weights import check_same_weights
from trainer.core.stateful import (
    StatefulObjects,
    keeps_statistics,
    load_states,
    read_states,
)
from trainer.data.datasets import MapDataset
from trainer.data.loading import TrainLoader
from trainer.errors import ConfigError, LockstepError, Stopped
from trainer.exact.bitwise import BitwiseReduction
from trainer.exact.determinism import refused_operation
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.modes import modes_of_others, restore_modes
from trainer.exact.plan import Plan, Step
from trainer.exact.standard import StandardReduction
from trainer.process.ranks import Ranks
from trainer.process.signals import StopRequest
from trainer.reporting import summary as report
from trainer.reporting.figures import drawing
from trainer.reporting.journal import Journal
from trainer.reporting.wandb.histograms import HistogramObserver
from trainer.storage import checkpoint
from trainer.storage.checkpoint import FURTHER, Checkpoint, Progress
from trainer.storage.digest import digest, hexadecimal
from trainer.storage.environment import environment
from trainer.storage.run_directory import check_same_run, config_yaml
from trainer.storage.shared_checkpoint import load_on_all


class Trainer:
    """Trains what a `Config` describes, on however many processes were launched.

    A model, data sets or a task can be passed instead of being named in the config:

        Trainer(Config(), model=net, train_data=train, val_data=val).fit()

    `observers` see every step. `stateful` objects are saved in every checkpoint, each under its name, and so are a
    subclass's own attributes that have `state_dict` and `load_state_dict`. A resume loads those that exist by the
    time of `start`. See docs/extending.md.

    Raises `ConfigError` or `DataError` if the config cannot be run.
    """

    stopwatch: Stopwatch

    def __init__(
        self,
        config: Config,
        *,
        model: nn.Module | None = None,
        train_data: MapDataset | None = None,
        val_data: MapDataset | None = None,
        task: Task | nn.Module | None = None,
        observers: Sequence[Observer] = (),
        stateful: Mapping[str, Stateful] | None = None,
    ) -> None:
        # Those that a subclass assigned before this call.
        attributes_before = frozenset(vars(self))
        with settings_of(config):
            self.run = build_run(
                config, model=model, train_data=train_data, val_data=val_data, task=task
            )
            self.optimizer = build_optimizer(
                self.config.optimizer,
                self.module,
                head=self.config.model.head,
                loss=self.run.task,
            )
            self.run.freezing.apply(epoch=0)
            kind = BitwiseReduction if self.run.bitwise else StandardReduction
            self.reduction = kind(
                self.module,
                self.config.batch_norm,
                self.ranks,
                find_unused_parameters=self.config.train.find_unused_parameters,
                loss=self.run.task,
            )
        self.observers = Observers(
            [*build_observers(self.config.observers, Observer), *observers]
        )
        self.stateful: dict[str, Stateful] = dict(stateful or {})
        self.progress = Progress()
        self.schedule = self._build_schedule()
        self.meter = Meter(self.run.task, self.ranks, exact=self.run.bitwise)
        self.interval_totals = Totals()
        self.epoch_totals = Totals()
        self.grad_norm: Tensor | None = None
        self.fuse = 1  # micro-batches in one forward, chosen before training
        self.fuse_note = ""  # why batch.fuse=auto chose 1
        # Stateful objects that the checkpoint or the run lacks.
        self.state_notes: list[str] = []
        self._restored_states: Mapping[str, Any] | None = None
        self._further_restored: Mapping[str, Any] = {}
        self._statistics_are_read = False  # after each step, by an observer or its like
        self._saved_step: int | None = None  # of the checkpoint last read or written
        self._batches: TrainLoader | None = None
        self._journal: Journal | None = None
        self._attributes_of_trainer = frozenset(vars(self)) - attributes_before
        self._stateful_objects()  # refuses now what could not be saved later

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def ranks(self) -> Ranks:
        return self.run.ranks

    @property
    def module(self) -> nn.Module:
        """The model itself, without DDP."""
        return self.run.module

    @property
    def plan(self) -> Plan:
        return self.run.plan

    # ---------------------------------------------------------------- the run

    def fit(self) -> dict[str, Any]:
        """Train from the first step or the checkpoint that `run.resume` finds; returns the contents of `summary.json`.

        Raises `LockstepError` if the loss is not finite or the run cannot go on, `Stopped` after a signal.
        """
        if self.progress.step:
            raise LockstepError(
                "this Trainer has trained already; make a new one, with run.resume=auto to go on"
            )
        self._stateful_objects()  # refuses now what could not be saved later
        with self.run.settings():
            refuse_nondeterministic(self.run)
            self.fuse, self.fuse_note = choose_fuse(self.run)
            rehearse(self.run)
            check_disk(self.run)
            with (
                StopRequest(self.ranks) as stop,
                Journal(self.config, self.ranks) as self._journal,
            ):
                self._resume(self._journal.resume_from)
                self._introduce()
                try:
                    self.start()
                    for note in self.state_notes:
                        self.journal.console.note(note)
                    self.journal.start_clock(self.plan, self.progress.step)
                    self._loop(stop)
                    return self._finish()
                except RuntimeError as error:
                    cause = refused_operation(error) or self.ranks.explain(error)
                    if cause is None:
                        raise
                    raise cause from None
                finally:
                    self.end_loading()

    def _introduce(self) -> None:
        """Show what will run, and its first samples."""
        journal = self.journal
        header = report.header(
            self.run, self.schedule, self.fuse, self.fuse_note, journal.directory
        )
        facts = journal.with_sharing(self.run.facts_of_ranks)
        journal.begin(
            header,
            self.progress,
            partial(environment, self.ranks, self.run.data, facts),
        )
        for note in notes_on(facts):
            journal.console.note(note)
        if self.config.run.figures and not self.progress.step:
            self.ranks.on_main(
                lambda: journal.figures(drawing.draw_batch(self.run, journal.directory))
            )
        every = self.config.wandb.log_histograms_every
        if every is not None and journal.wandb is not None:
            self.observers.add(HistogramObserver(self.module, journal.wandb, every))

    def start(self) -> None:
        """Begin at the step after those that are done. A loop of one's own calls it once before `train_step`."""
        stateful = self._stateful_objects()  # refuses now what could not be saved later
        self.stopwatch = Stopwatch(self.progress)
        self.load_from(self.progress.step)
        self.module.train()
        restore_modes_of(self._further_restored, self.module)
        self._further_restored = {}
        self.run.loss_state.begin()
        self.observers.begin(self.run)
        if self._restored_states is not None:
            self.state_notes = load_states(stateful, self._restored_states)
            self._restored_states = None
        check_states(stateful, self.run)
        self._statistics_are_read = self.observers.read_statistics or keeps_statistics(
            stateful
        )

    def load_from(self, steps_done: int) -> None:
        """Load the samples of the step after `steps_done` next."""
        self._batches = TrainLoader(
            self.run.train_loader, self.plan, self.ranks.rank, steps_done, self.fuse
        )

    @property
    def batches(self) -> TrainLoader:
        """This rank's micro-batches, step by step. Raises `LockstepError` before `start`."""
        if self._batches is None:
            raise LockstepError("train_step needs samples: call start() once before it")
        return self._batches

    @property
    def journal(self) -> Journal:
        """The run directory, the console and W&B. Raises `LockstepError` before `fit` opens them."""
        if self._journal is None:
            raise LockstepError(
                "fit() opens the run directory, which log, end_epoch and save write to; in a loop of your own, use "
                "measure() and evaluate()"
            )
        return self._journal

    def end_loading(self) -> None:
        """End the loader processes. If they were left to the interpreter's exit, they would count as killed."""
        if self._batches is not None:
            self._batches.close()
        if self.run.evaluator is not None:
            self.run.evaluator.close()

    def _loop(self, stop: StopRequest) -> None:
        if self.progress.epoch_end_is_due:
            self.end_epoch(self.plan.step(self.progress.step - 1))
        for step in self.plan.steps(self.progress.step):
            self.train_step(step)
            if self._is_logged(step):
                self.log(step)
            self.progress.epoch_end_is_due = step.last_in_epoch
            # Before the evaluation, which may fail on a sample that training never saw.
            if step.last_in_epoch or self._is_checkpointed(step):
                self.save()
            if step.last_in_epoch:
                self.end_epoch(step)
            self.journal.advance(step.number)
            if stop.agreed():
                self._stop(stop.signal_number)

    def train_step(self, step: Step) -> None:
        """One optimizer update on the step's samples, over all ranks. Never waits for the device.

        Steps are taken in order, after `start`.
        """
        run, reduction = self.run, self.reduction
        if step.first_in_epoch:
            self._freeze(step.epoch)
        set_learning_rate(self.optimizer, self.schedule.factor(step.number - 1))

        reduction.begin(step)
        # This rank's micro-batches, on the device.
        for batch in self.batches.step(step):
            with reduction.micro_batch(step, batch.indices) as model:
                output, loss = run.forward(model, batch, step)
                run.precision.backward(
                    loss.total, reduction.loss_scale(step, batch.indices, *loss)
                )
            self.meter.add(batch, output, loss)
            self.observers.micro_batch(step, batch, output, loss)
        reduction.finish(step)

        needs_norm = self._needs_gradient_norm(step)
        if needs_norm or self.observers.look_at_gradients:
            run.precision.unscale(self.optimizer)
        if needs_norm:
            self.grad_norm = reduction.clip(self.config.train.max_grad_norm)
        self.observers.gradient(step)
        run.precision.step(self.optimizer)
        self.optimizer.zero_grad()
        self.progress.step = step.number
        self.progress.samples_seen += step.size
        if self._statistics_are_read:
            reduction.gather_statistics()
        self.observers.step(step)

    def _needs_gradient_norm(self, step: Step) -> bool:
        is_clipped = self.config.train.max_grad_norm is not None
        return (
            is_clipped or self._is_logged(step) or step.number == self.plan.total_steps
        )

    def _freeze(self, epoch: int) -> None:
        """Freeze and thaw parameters as `epoch` asks for. A collective, at an epoch's first step."""
        modes = modes_of_others(self.module)
        if self.run.freezing.apply(epoch):
            self.reduction.rebuild()
            self.module.train()
            restore_modes(modes)
            self.run.forget_features()

    # ---------------------------------------------------------------- what is logged

    def _is_logged(self, step: Step) -> bool:
        return step.number % self.config.train.log_every == 0 or step.last_in_epoch

    def measure(self, step: Step) -> Row:
        """A row of the steps since the last row. A collective; only here does training wait for the device."""
        self._read_meter()
        row: Row = {"step": step.number, "epoch": step.epoch + 1}
        row |= _with_prefix("train/", self.interval_totals.means())
        row |= learning_rates(self.optimizer)
        if self.grad_norm is not None:
            row["grad_norm"] = self.grad_norm.item()
        row |= self.stopwatch.pace(
            self.progress.samples_seen, self.batches.take_waited()
        )
        self.epoch_totals.add(self.interval_totals)
        self.interval_totals = Totals()
        return row

    def log(self, step: Step) -> None:
        """Log a row. Raises `LockstepError` if its loss is not finite."""
        row = self.measure(step)
        self.observers.row(row)
        self.journal.log(row, self.digest() if self.ranks.is_main else "")
        loss = row.get("train/loss")  # absent where every target was ignored
        if loss is not None and not math.isfinite(loss):
            raise LockstepError(
                f"the loss is {loss} in the steps up to {step.number}; lower optimizer.lr, set "
                f"train.max_grad_norm, or raise train.precision. To see the first such step taken apart, on one "
                f"process:\n\n    python -m trainer replay {self.journal.directory} --step {step.number}\n"
            )

    def digest(self) -> str:
        """The digest of the weights, a loss's own included, which are the same on every rank."""
        whole = ModelAndLoss(self.module, self.run.task)
        of_loss = whole.trained_loss_parameters()
        return hexadecimal(digest(dict(self.module.named_parameters()) | of_loss))

    def _read_meter(self) -> None:
        self.interval_totals.add(self.meter.read())

    def end_epoch(self, step: Step) -> None:
        """Log the epoch's row: means over its samples, and an evaluation every `train.evaluate_every` epochs."""
        means = _with_prefix("train/epoch_", self.epoch_totals.means())
        self.epoch_totals = Totals()
        is_last = step.number == self.plan.total_steps
        is_due = (step.epoch + 1) % self.config.train.evaluate_every == 0
        self._log_epoch(step, means, evaluate=is_last or is_due)
        self.progress.epoch_end_is_due = False

    def _log_epoch(self, step: Step, means: Row, *, evaluate: bool) -> None:
        row = {"step": step.number, "epoch": step.epoch + 1, **means}
        if evaluate and self.run.evaluator is not None:
            row |= _with_prefix("val/", self.evaluate())
        row |= learning_rates(self.optimizer)
        self.observers.row(row)
        is_best = self._save_if_best(row)
        if self.progress.best is not None:
            row[f"best/{self.config.best.metric}"] = self.progress.best
        self.journal.epoch(row, is_best)
        self.observers.epoch(step, row)
        self.stopwatch.mark(self.progress.samples_seen)

    def evaluate(self) -> Row:
        """The loss and metrics over all validation samples, with the present weights. A collective.

        It may be called before, after and without `fit`; `end_loading` then ends its loader processes. Raises
        `ConfigError` if there are no validation samples.
        """
        with self.run.settings():
            self.reduction.gather()
            if self.config.batch_norm.recalibrate_at == "evaluation":
                recalibrate_statistics(self.run, self.progress.step)
            return self.run.evaluate()

    def load_best(self) -> Row:
        """Load the best weights so far on every rank; returns the row that was saved with them."""
        return self.run.load_best()

    def _save_if_best(self, row: Row) -> bool:
        """Save the model if its row is the best so far, and return whether it is.

        Every rank decides alike, from numbers that are the same on all.
        """
        progress = self.progress
        value = row.get(self.config.best.metric.replace("train/", "train/epoch_"))
        if value is None:
            return False
        progress.history.append(value)
        if not self._is_best(value):
            return False
        progress.best = value
        progress.best_step = int(row["step"])
        progress.best_epoch = int(row["epoch"])
        self.reduction.gather()
        self.ranks.on_main(lambda: self._save_best(row))
        return True

    def _is_best(self, value: float) -> bool:
        """True if `value` is better than the best so far; NaN never is."""
        if math.isnan(value):
            return False
        best = self.progress.best
        if best is None:
            return True
        return value > best if self.config.best.mode == "max" else value < best

    def _save_best(self, row: Row) -> None:
        checkpoint.save_best(
            self.journal.directory,
            checkpoint.snapshot(self.module),
            config_yaml(self.config),
            row,
            self.run.signature.to_dict(),
            further=of_best(self._further()),
        )

    # ---------------------------------------------------------------- checkpoints

    def _is_checkpointed(self, step: Step) -> bool:
        every = self.config.train.checkpoint_every
        is_due = every is not None and step.number % every == 0
        return is_due or step.number == self.plan.total_steps

    def save(self) -> None:
        """Write a checkpoint of the present step boundary. A collective."""
        self.reduction.gather()
        check_same_weights(self.run, self.progress.step)
        self._read_meter()
        self.stopwatch.stop(self.progress)
        self.progress.interval = self.interval_totals.sums
        self.progress.epoch = self.epoch_totals.sums
        self.progress.scaler = self.run.precision.state()
        states = read_states(self._stateful_objects(), self.ranks)
        self._tell_late_buffers()
        self.ranks.on_main(lambda: self._write_checkpoint(states))
        self._saved_step = self.progress.step
        self.stopwatch.mark(self.progress.samples_seen)

    def _tell_late_buffers(self) -> None:
        """Name the buffers that moved first after the first step: until now they followed no rule."""
        names = ", ".join(self.reduction.take_late_buffers())
        if not names:
            return
        fact = f"forward moves {names}, which it left alone in the first step"
        if self.run.bitwise:
            raise ConfigError(
                "run.reproducibility",
                f"bitwise must know in the first step which buffers move, and {fact}; move it in every forward, or in "
                f"none",
            )
        self.journal.console.note(
            f"{fact}: up to here it may depend on the number of processes"
        )

    def _write_checkpoint(self, states: dict[str, dict[str, Any]]) -> None:
        tensors, numbers = named_state(self.optimizer, self.module, self.run.task)
        self.progress.rows = self.journal.rows
        self.progress.wandb_id = self.journal.wandb_id
        config = self.config.to_dict(digests=True)
        further = self._further()
        if further:
            states = states | {FURTHER: further}
        content = Checkpoint(
            checkpoint.snapshot(self.module),
            tensors,
            numbers,
            self.progress,
            config,
            stateful=states,
        )
        checkpoint.save(
            self.journal.directory / "checkpoints",
            content,
            keep=self.config.train.keep_checkpoints,
        )

    def _further(self) -> dict[str, Any]:
        return read_further(
            self.module,
            self.run.loss_state,
            self.optimizer,
            self.reduction.moving_buffers,
        )

    def _resume(self, path: Path | None) -> None:
        if path is None:
            return
        content = load_on_all(path, self.module, self.ranks, self._check_resumable)
        self.restore(content)
        self.ranks.on_main(
            lambda: checkpoint.restore_best(
                self.journal.directory, content.progress.best_step
            )
        )

    def _check_resumable(self, content: Checkpoint) -> None:
        check_same_run(content.config, self.config, self.config.run)
        if content.progress.step > self.plan.total_steps:
            raise ConfigError(
                "train.max_steps" if self.config.train.max_steps else "train.epochs",
                f"the run to resume is at step {content.progress.step} and would end at {self.plan.total_steps}; raise "
                f"it, or start a new run with run.resume=never",
            )

    def restore(self, content: Checkpoint) -> None:
        """Take over the state of a checkpoint. Stateful objects take theirs over in `start`."""
        checkpoint.restore_model(self.module, content.model)
        states = dict(content.stateful)
        self._further_restored = states.pop(FURTHER, {})
        restore_further(
            self._further_restored, self.module, self.run.loss_state, self.optimizer
        )
        load_named_state(
            self.optimizer,
            self.module,
            content.optimizer,
            content.optimizer_numbers,
            self.run.task,
        )
        self.run.precision.load_state(content.progress.scaler)
        self.progress = content.progress
        self._saved_step = content.progress.step
        self.interval_totals = Totals(content.progress.interval)
        self.epoch_totals = Totals(content.progress.epoch)
        self.schedule = self._build_schedule()
        # Loaded by `start`, once observers have seen the model.
        self._restored_states = states
        self._freeze(self._epoch_to_go_on_in())
        self.run.forget_features()

    def _epoch_to_go_on_in(self) -> int:
        """The epoch of the next step; that of the last one where its epoch has not ended yet."""
        next_step = min(self.progress.step, self.plan.total_steps - 1)
        step = self.progress.step - 1 if self.progress.epoch_end_is_due else next_step
        return step // self.plan.steps_per_epoch

    def _stateful_objects(self) -> dict[str, Stateful]:
        """What `stateful` holds, a subclass's own attributes, and observers with a state, by name."""
        # Saved with the model.
        model_parts = {id(part) for part in self.module.modules()}
        attributes = {}
        for name, value in vars(self).items():
            if name not in self._attributes_of_trainer and id(value) not in model_parts:
                attributes[name] = value
        objects = StatefulObjects()
        objects.add_named(self.stateful)
        objects.add_attributes(attributes)
        objects.add_observers(self.observers)
        return objects.by_name

    def _stop(self, signal_number: int) -> None:
        if self._saved_step != self.progress.step:
            self.save()
        raise Stopped(
            f"stopped by signal {signal_number} after step {self.progress.step}; a checkpoint is kept, "
            f"go on with run.resume=auto",
            signal_number,
        )

    def _finish(self) -> dict[str, Any]:
        """Write and return the summary, and draw figures. A run that ends inside an epoch is evaluated before that.

        All this comes after the last checkpoint, so a run that goes on from it shows no trace of having ended here.
        """
        last = self.plan.step(self.plan.total_steps - 1)
        self.reduction.gather()
        recalibrate = self.config.batch_norm.recalibrate_at == "end"
        is_changed = recalibrate and recalibrate_statistics(
            self.run, self.progress.step
        )
        if not self._is_logged(last):
            self.log(last)
        if is_changed or not last.last_in_epoch:
            self._log_epoch(last, {}, evaluate=True)
        self.stopwatch.stop(self.progress)
        summary = report.summary(self.run, self.progress, self.optimizer)
        figures = {}
        if self.config.run.figures:
            figures = drawing.draw(
                self.run,
                self.journal.directory,
                has_best=self.progress.best is not None,
            )
        self.journal.finish(
            summary, report.closing(summary, self.journal.directory), figures
        )
        self.observers.end(summary)
        return summary

    def _build_schedule(self) -> Schedule:
        return build_schedule(
            self.config.schedule,
            total_steps=self.plan.total_steps,
            steps_per_epoch=self.plan.steps_per_epoch,
            history=self.progress.history,
            mode=self.config.best.mode,
        )


def _with_prefix(prefix: str, row: Row) -> Row:
    """The row with `prefix` before the name of every column."""
    return {prefix + name: value for name, value in row.items()}
