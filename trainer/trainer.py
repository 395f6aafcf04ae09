"""`Trainer`: the loop, the step, what is logged and what is kept; each reads top to bottom."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.components.optimizer import learning_rates, load_named_state, named_state, set_learning_rate
from trainer.components.schedule import Schedule, build_schedule
from trainer.components.task import Task
from trainer.config.schema import Config
from trainer.config.secrets import without_secrets
from trainer.core.build import Run
from trainer.core.fuse_check import choose_fuse
from trainer.core.metrics import Meter, Row, Stopwatch, Totals
from trainer.data.datasets import MapDataset
from trainer.data.loading import TrainLoader
from trainer.errors import ConfigError, LockstepError, Stopped
from trainer.exact.determinism import refused_operation
from trainer.exact.plan import Step
from trainer.process.signals import StopRequest
from trainer.reporting import summary as report
from trainer.reporting.figures import drawing
from trainer.reporting.journal import Journal
from trainer.storage import checkpoint
from trainer.storage.checkpoint import Checkpoint
from trainer.storage.digest import digest, hexadecimal
from trainer.storage.environment import environment
from trainer.storage.run_directory import check_same_run, config_yaml


class Trainer(Run):
    """A run: what a `Config` describes, on however many processes were launched.

    A model, data sets or a task made elsewhere may be given instead of being named in the config:

        Trainer(Config(), model=net, train_data=train, val_data=val).fit()
    """

    def __init__(
        self,
        config: Config,
        *,
        model: nn.Module | None = None,
        train_data: MapDataset | None = None,
        val_data: MapDataset | None = None,
        task: Task | None = None,
    ) -> None:
        super().__init__(config, model=model, train_data=train_data, val_data=val_data, task=task)
        self.meter = Meter(self.task, self.ranks, exact=self.bitwise)
        self.interval, self.epoch = Totals(), Totals()
        self.grad_norm: Tensor | None = None
        self.schedule = self._schedule()

    # ---------------------------------------------------------------- the run

    def fit(self) -> dict[str, Any]:
        """Train from the start, or from the checkpoint that `run.resume` finds; returns what `summary.json` holds."""
        if self.progress.step:
            raise LockstepError("this Trainer has trained already; make a new one, with run.resume=auto to go on")
        self.fuse = choose_fuse(self)
        with StopRequest(self.ranks) as stop, Journal(self.config, self.ranks) as self.journal:
            self._resume(self.journal.resume_from)
            header = report.header(self, self.schedule, self.journal.directory)
            self.journal.begin(header, self.progress, lambda: environment(self.ranks, self.data))
            self._show_first_batch()
            self.start()
            self.journal.start_clock(self.plan, self.progress.step)
            try:
                self._loop(stop)
                return self._finish()
            except RuntimeError as error:
                raise refused_operation(error) or error from None
            finally:
                self.end_loading()

    def start(self) -> None:
        """Begin to train, at the step after those that are done: what comes before `train_step`."""
        self.stopwatch = Stopwatch(self.progress)
        self.batches = TrainLoader(self.train_loader, self.plan, self.ranks.rank, self.progress.step, self.fuse)
        self.model.train()

    def _show_first_batch(self) -> None:
        if self.config.run.figures and not self.progress.step:
            self.ranks.on_main(lambda: self.journal.figures(drawing.draw_batch(self, self.journal.directory)))

    def end_loading(self) -> None:
        """Loader processes end with the run: left to the interpreter's exit, they would be seen as killed."""
        self.batches.close()
        if self.evaluator is not None:
            self.evaluator.close()

    def _loop(self, stop: StopRequest) -> None:
        for step in self.plan.steps(self.progress.step):
            self.train_step(step)
            if self._is_logged(step):
                self.log(step)
            if step.last_in_epoch:
                self.end_epoch(step)
            if step.last_in_epoch or self._is_checkpointed(step):
                self.save()
            self.journal.advance(step.number)
            if stop.agreed():
                self._stop(stop.signal_number)

    def train_step(self, step: Step) -> None:
        """One optimizer update. Nothing here waits for the device."""
        if step.start == 0:
            self.freeze_as_in(step.epoch)
        set_learning_rate(self.optimizer, self.schedule.factor(step.number - 1))
        self.statistics.begin(step)
        model = self.gradients.model(step)
        for batch in self.batches.step(step):
            with self.gradients.leaf(step, batch.indices):
                output, loss, weight = self.forward(model, batch, step)
                self.precision.backward(loss, self.gradients.seed(step, batch.indices, loss, weight))
            self.meter.add(loss, weight, output, batch.targets)
        self.gradients.reduce(step)
        self._clip(step)
        self.precision.step(self.optimizer)
        self.optimizer.zero_grad()
        self.progress.step = step.number
        self.progress.samples_seen += step.size

    def _clip(self, step: Step) -> None:
        """Clip the whole step's gradient; measure it where it is logged."""
        clipped, shown = self.config.train.max_grad_norm, self._has_histograms(step)
        if clipped is None and not shown and not self._is_logged(step) and step.number != self.plan.total_steps:
            return
        self.precision.unscale(self.optimizer)
        self.grad_norm = self.gradients.norm() if clipped is None else self.gradients.clip(clipped)
        if shown:
            self.journal.histograms(step.number, self.module)

    # ---------------------------------------------------------------- what is logged

    def _is_logged(self, step: Step) -> bool:
        return step.number % self.config.train.log_every == 0 or step.last_in_epoch

    def _has_histograms(self, step: Step) -> bool:
        every = self.config.wandb.log_histograms_every
        return every is not None and step.number % every == 0

    def measure(self, step: Step) -> Row:
        """A row of the steps since the last one: training's only host sync. A collective."""
        self._collect()
        row: Row = {"step": step.number, "epoch": step.epoch + 1}
        row |= {f"train/{name}": value for name, value in self.interval.means().items()}
        row |= learning_rates(self.optimizer)
        if self.grad_norm is not None:
            row["grad_norm"] = self.grad_norm.item()
        row |= self.stopwatch.pace(self.progress.samples_seen, self.batches.take_waited())
        self.epoch.add(self.interval)
        self.interval = Totals()
        return row

    def log(self, step: Step) -> None:
        """Log a row, and end the run where its loss is no finite number."""
        row = self.measure(step)
        self.journal.log(row, self.digest() if self.ranks.is_main else "")
        if not math.isfinite(row.get("train/loss", 0.0)):  # absent where every target was ignored
            raise LockstepError(
                f"the loss is {row['train/loss']} in the steps up to {step.number}; lower optimizer.lr, set "
                f"train.max_grad_norm, or raise train.precision. To see the first such step taken apart, on one "
                f"process:\n\n    python -m trainer replay {self.journal.directory} --step {step.number}\n"
            )

    def digest(self) -> str:
        """Of the weights, which every rank has alike."""
        return hexadecimal(digest(dict(self.module.named_parameters())))

    def _collect(self) -> None:
        """Bring what the meter has summed to the host."""
        self.interval.add(self.meter.read())

    def end_epoch(self, step: Step) -> None:
        """The epoch's row: means over its samples, an evaluation where one is due."""
        row = {f"train/epoch_{name}": value for name, value in self.epoch.means().items()}
        self.epoch = Totals()
        last = step.number == self.plan.total_steps
        self._end_period(step, row, evaluated=last or (step.epoch + 1) % self.config.train.evaluate_every == 0)

    def _end_period(self, step: Step, row: Row, *, evaluated: bool) -> None:
        row = {"step": step.number, "epoch": step.epoch + 1, **row}
        if evaluated and self.evaluator is not None:
            row |= {f"val/{name}": value for name, value in self.evaluate().items()}
        row |= learning_rates(self.optimizer)
        is_best = self._keep_best(row)
        if self.progress.best is not None:
            row[f"best/{self.config.best.metric}"] = self.progress.best
        self.journal.epoch(row, is_best)
        self.stopwatch.mark(self.progress.samples_seen)

    def _keep_best(self, row: Row) -> bool:
        """Keep the model if its row is the best so far: decided from numbers that are the same on every rank."""
        section, progress = self.config.best, self.progress
        value = row.get(section.metric.replace("train/", "train/epoch_"))
        if value is None:
            return False
        progress.history.append(value)
        gain = math.inf if progress.best is None else value - progress.best
        if math.isnan(value) or (gain if section.mode == "max" or progress.best is None else -gain) <= 0:
            return False
        progress.best, progress.best_step, progress.best_epoch = value, int(row["step"]), int(row["epoch"])
        self.statistics.gather()
        self.ranks.on_main(
            lambda: checkpoint.save_best(
                self.journal.directory,
                checkpoint.snapshot(self.module),
                config_yaml(self.config),
                row,
                self.signature.to_dict(),
            )
        )
        return True

    # ---------------------------------------------------------------- checkpoints

    def _is_checkpointed(self, step: Step) -> bool:
        every = self.config.train.checkpoint_every
        return (every is not None and step.number % every == 0) or step.number == self.plan.total_steps

    def save(self) -> None:
        """Write a checkpoint of the present step boundary. A collective."""
        self.statistics.gather()
        self._collect()
        self.stopwatch.stop(self.progress)
        self.progress.interval, self.progress.epoch = self.interval.sums, self.epoch.sums
        self.progress.scaler = self.precision.state()
        self.ranks.on_main(self._write_checkpoint)
        self.stopwatch.mark(self.progress.samples_seen)

    def _write_checkpoint(self) -> None:
        tensors, numbers = named_state(self.optimizer, self.module)
        self.progress.rows, self.progress.wandb_id = self.journal.rows, self.journal.wandb_id
        config = without_secrets(self.config.to_dict())
        held = Checkpoint(checkpoint.snapshot(self.module), tensors, numbers, self.progress, config)
        checkpoint.save(self.journal.directory / "checkpoints", held, keep=self.config.train.keep_checkpoints)

    def _resume(self, path: Path | None) -> None:
        if path is None:
            return
        held = checkpoint.load(path)
        check_same_run(held.config, self.config, self.config.run)
        if held.progress.step > self.plan.total_steps:
            raise ConfigError(
                "train.max_steps" if self.config.train.max_steps else "train.epochs",
                f"the run to resume is at step {held.progress.step} and would end at {self.plan.total_steps}; raise "
                f"it, or start a new run with run.resume=never",
            )
        self.restore(held)
        self.ranks.on_main(lambda: checkpoint.restore_best(self.journal.directory, held.progress.best_step))

    def restore(self, held: Checkpoint) -> None:
        """Become the run at the step boundary of a checkpoint."""
        checkpoint.restore_model(self.module, held.model)
        load_named_state(self.optimizer, self.module, held.optimizer, held.optimizer_numbers)
        self.precision.load_state(held.progress.scaler)
        self.progress = held.progress
        self.interval, self.epoch = Totals(held.progress.interval), Totals(held.progress.epoch)
        self.schedule = self._schedule()
        self.freeze_as_in(min(self.progress.step, self.plan.total_steps - 1) // self.plan.steps_per_epoch)
        if self.evaluator is not None:
            self.evaluator.forget()

    def _stop(self, signal_number: int) -> None:
        self.save()
        raise Stopped(
            f"stopped by signal {signal_number} after step {self.progress.step}; a checkpoint is kept, "
            f"go on with run.resume=auto",
            signal_number,
        )

    def _finish(self) -> dict[str, Any]:
        """The summary and figures; before them, if the run ends inside an epoch, its last row and evaluation.

        Those come after the last checkpoint: a run that goes on from it leaves no trace of having ended here.
        """
        last = self.plan.step(self.plan.total_steps - 1)
        changed = self.config.batch_norm.recalibrate_at == "end" and self.recalibrate()
        if not self._is_logged(last):
            self.log(last)
        if changed or not last.last_in_epoch:
            self._end_period(last, {}, evaluated=True)
        self.statistics.gather()
        self.stopwatch.stop(self.progress)
        summary = report.summary(self)
        figures = drawing.draw(self, self.journal.directory) if self.config.run.figures else {}
        self.journal.finish(summary, report.closing(summary, self.journal.directory), figures)
        return summary

    def _schedule(self) -> Schedule:
        return build_schedule(
            self.config.schedule,
            total_steps=self.plan.total_steps,
            steps_per_epoch=self.plan.steps_per_epoch,
            history=self.progress.history,
            mode=self.config.best.mode,
        )
