"""`Trainer`: the loop, the step, the logged rows and the checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.components.metrics import Metrics
from trainer.components.optimizer import (
    build_optimizer,
    learning_rates,
    set_learning_rate,
)
from trainer.components.optimizer_modes import begin_training
from trainer.components.optimizer_step import forget_gradients
from trainer.components.schedule import Schedule, build_schedule
from trainer.components.task import Task, WeightedSum
from trainer.config.schema import Config
from trainer.core.backward import forward_and_backward
from trainer.core.build import build_run
from trainer.core.build_observers import observers_of_run
from trainer.core.build_reduction import build_reduction
from trainer.core.decoding_notes import DecodingNotes
from trainer.core.ema import build_average
from trainer.core.ending import Ending
from trainer.core.evaluations import Evaluations
from trainer.core.finite_watch import FiniteWatch
from trainer.core.given_objects import check_given
from trainer.core.graphs.graphs import build_graphs
from trainer.core.left_out import LeftOut
from trainer.core.metrics import Meter, Row, Stopwatch
from trainer.core.observers import Observer, Stateful
from trainer.core.preflight import check_order
from trainer.core.profile.begin import add_profile
from trainer.core.profile.observer import ProfileObserver
from trainer.core.proof.prove import Proof, prove
from trainer.core.rehearsal import check_states
from trainer.core.resuming import Resuming, epoch_to_go_on_in
from trainer.core.row_means import RowMeans
from trainer.core.run import settings_of
from trainer.core.saved_state import SavedState
from trainer.core.saving import Saving
from trainer.core.stateful import StatefulObjects, keeps_statistics
from trainer.core.timetable import Timetable
from trainer.core.try_out import explained, try_out
from trainer.core.whole_step import build_whole_step
from trainer.data.batches import MicroBatch
from trainer.data.datasets import MapDataset
from trainer.data.left_out import train_loader
from trainer.data.train_loader import TrainLoader
from trainer.errors import LockstepError, Stopped
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.modes import modes_of_others, restore_modes
from trainer.exact.plan import Plan, Step
from trainer.exact.reduction import Reduction
from trainer.process import launcher
from trainer.process.activity import (
    ENDING,
    EXCHANGING,
    LOGGING,
    SAVING,
    UPDATING,
    activity,
)
from trainer.process.loader_start import end_if_imported_to_load
from trainer.process.one_at_a_time import one_at_a_time
from trainer.process.ranks import Ranks
from trainer.process.signals import StopRequest
from trainer.process.watchdog import watching
from trainer.reporting import summary as report
from trainer.reporting.conclusion import conclude
from trainer.reporting.introduction import introduce
from trainer.reporting.journal import Journal
from trainer.reporting.trackers.base import Tracker
from trainer.reporting.trackers.group import build_trackers
from trainer.reporting.wandb.histograms import HistogramObserver
from trainer.storage.checkpoint import Checkpoint, Progress
from trainer.storage.digest import digest, digest_of_shards, hexadecimal


class Trainer:
    """Trains what a `Config` describes, on however many processes were launched.

    A model, data sets or a task can be passed instead of being named in the config:

        Trainer(Config(), model=net, train_data=train, val_data=val).fit()

    `val_data` may be a dict of validation sets by name. `test_data` is evaluated once, at the end of the run, with the
    best weights.

    `metrics` are torchmetrics' objects, in a list or by the names to log them under; see docs/metrics.md.

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
        val_data: MapDataset | Mapping[str, MapDataset] | None = None,
        test_data: MapDataset | None = None,
        task: Task | nn.Module | None = None,
        metrics: Metrics = (),
        observers: Sequence[Observer] = (),
        stateful: Mapping[str, Stateful] | None = None,
    ) -> None:
        check_given(config, model)
        if launcher.world_size() > 1:  # it would join as a rank that is there already
            end_if_imported_to_load()
        # Those that a subclass assigned before this call.
        attributes_before = frozenset(vars(self))
        with one_at_a_time(), settings_of(config), watching(config.run.timeout):
            self.run = build_run(
                config,
                model=model,
                train_data=train_data,
                val_data=val_data,
                test_data=test_data,
                task=task,
                metrics=metrics,
            )
            self._build_update()
        self.stateful: dict[str, Stateful] = dict(stateful or {})
        self.progress = Progress()
        self.grad_norm: Tensor | None = None
        self.fuse = 1  # micro-batches in one forward, chosen before training
        self.fuse_note = ""  # why batch.fuse=auto chose 1
        self.proof = Proof(off="not made")  # until `prove`
        self._statistics_are_read = False  # after each step, by an observer or its like
        self._has_begun = False  # in `fit`, which may have failed within its first step
        self._batches: TrainLoader | None = None
        self._profile: ProfileObserver | None = None
        self._journal: Journal | None = None
        self._build_parts_of_step(observers)
        self._build_parts_between_steps()
        self._attributes_of_trainer = frozenset(vars(self)) - attributes_before
        self._stateful_objects()  # refuses now what could not be saved later

    def _build_update(self) -> None:
        """What makes one gradient of all ranks', and what updates the weights by it. A collective."""
        self.optimizer = build_optimizer(
            self.config.optimizer,
            self.module,
            head=self.config.model.head,
            loss=self.run.task,
        )
        # The optimizer has what is thawed later, too; the reduction has what requires a gradient now.
        self.run.freezing.apply(epoch=0)
        self.reduction = self.reduction_for(self.module, loss=self.run.task)

    def _build_parts_of_step(self, observers: Sequence[Observer]) -> None:
        run = self.run
        self.timetable = Timetable(
            self.config.train,
            self.plan,
            has_validation=run.evaluator is not None,
        )
        self.observers = observers_of_run(run, self.reduction, observers)
        self.schedule = self._build_schedule()
        self.meter = Meter(run.task, self.ranks, exact=run.bitwise)
        self.whole_step = build_whole_step(run, self.reduction, self.meter)
        self.graphs = build_graphs(run, self.reduction)
        self.finite = FiniteWatch(run)
        self._average = build_average(run, self.optimizer)

    def _build_parts_between_steps(self) -> None:
        """What logs, evaluates, saves, resumes and ends."""
        run = self.run
        self.row_means = RowMeans(self.meter)
        self.left_out = LeftOut(run)
        self._decoding_notes = DecodingNotes(run)
        self.evaluations = Evaluations(
            run, self.optimizer, self.reduction, self._average, self.observers
        )
        saved_state = SavedState(run, self.optimizer, self.reduction)
        self.saving = Saving(
            run,
            saved_state,
            reduction=self.reduction,
            average=self._average,
            evaluations=self.evaluations,
            finite=self.finite,
        )
        self.resuming = Resuming(run, saved_state)
        self._ending = Ending(run)

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

    def reduction_for(
        self, module: nn.Module, *, loss: nn.Module | None = None
    ) -> Reduction:
        """What makes one gradient of those of all micro-batches and ranks, in the run's mode. A collective.

        For a step of your own that trains another module beside the model: drive it as `train_step` does `reduction`,
        with the parameters that require a gradient now. Every rank goes on with rank 0's weights.
        """
        return build_reduction(self.run, module, loss)

    @property
    def last_step(self) -> int:
        """The step after which this session ends: the run's last, or `train.stop_after` if that comes first."""
        return self.timetable.last_step

    # ---------------------------------------------------------------- the run

    def fit(self) -> dict[str, Any]:
        """Train from the first step or the checkpoint that `run.resume` finds; returns the contents of `summary.json`.

        Raises `LockstepError` if the loss is not finite or the run cannot go on, `Stopped` after a signal.
        """
        end_if_imported_to_load()
        if self.progress.step or self._has_begun:
            raise LockstepError(
                "this Trainer has trained already; make a new one, with run.resume=auto to go on"
            )
        self._stateful_objects()  # refuses now what could not be saved later
        with (
            one_at_a_time(),
            self.run.settings(),
            watching(self.config.run.timeout),
            explained(self.run, self._position),
        ):
            trackers = self._build_trackers()
            self.try_out()
            is_resumed = self.resuming.has_checkpoint()
            if not is_resumed:
                self.prove()  # a refused run leaves an earlier run's directory where it is
            with (
                StopRequest(self.ranks) as stop,
                Journal(self.config, self.ranks, trackers) as self._journal,
            ):
                activity.directory = self._journal.directory
                self._resume(self._journal.resume_from)
                self.left_out.list_in(
                    self._journal.directory, self._journal.bad_samples
                )
                if is_resumed:
                    self.prove()  # on the samples of its next step
                self._introduce()
                # `explained` also here: a hang is reported before anything is cleaned up.
                with self._cleaned_up(), explained(self.run, self._position):
                    return self._train(stop)

    @contextmanager
    def _cleaned_up(self) -> Iterator[None]:
        """However the body ends, end what works beside it: all of that, whatever goes wrong with one of them."""
        with ExitStack() as at_end:  # which begins with the last
            at_end.callback(self.saving.close, self.journal)
            at_end.callback(self._end_profile)
            at_end.callback(self.end_loading)
            at_end.push(lambda _kind, error, _trace: activity.leave(error))
            yield

    def _end_profile(self) -> None:
        if self._profile is not None:
            self._profile.end_session()

    def _build_trackers(self) -> list[Tracker]:
        """The trackers of the config, on the main process; the others need no packages for them."""
        trackers: list[Tracker] = []
        self.ranks.on_main(lambda: trackers.extend(build_trackers(self.config)))
        return trackers

    def _position(self) -> tuple[int, int]:
        return self.fuse, self.progress.step + 1

    def _train(self, stop: StopRequest) -> dict[str, Any]:
        self._has_begun = True
        self.start()
        for note in self.resuming.notes:
            self.journal.note(note)
        self.journal.start_clock(self.plan, self.progress.step, self.last_step)
        self._loop(stop)
        return self._finish()

    def try_out(self) -> None:
        """Find out what would fail later, and choose `fuse`, before anything is trained. A collective."""
        self.fuse, self.fuse_note = try_out(self.run)

    def prove(self, *, thorough: bool = False) -> None:
        """Try the promise on this run's model, loss and data, before `start`; see docs/proof.md. A collective.

        Raises `ConfigError` for what breaks it, in bitwise mode or with `run.proof=strict`.
        """
        config = self.config
        if config.run.proof != "off" and config.data.workers:
            # Loader processes are started once, and `start` goes on with them.
            self.load_from(self.progress.step)
        try:
            self.proof = prove(
                self.run,
                self.progress.step,
                optimizer=self.optimizer,
                stateful=self._stateful_objects(),
                batches=self._batches,
                thorough=thorough,
            )
        # Also Ctrl-C: loader processes may have been started for the proof.
        except BaseException:
            self.end_loading()
            raise

    def _introduce(self) -> None:
        """Show what will run, and its first samples."""
        header = report.header(
            self.run,
            self.schedule,
            self.fuse,
            self.fuse_note,
            directory=self.journal.directory,
            proof=self.proof,
            optimizer=self.optimizer,
        )
        if self.resuming.rate_note:
            header.append(("resumed", self.resuming.rate_note))
        if line := self._begin_profile():
            header.append(("profile", line))
        introduce(self.run, self.journal, header, self.progress, self.resuming)
        every = self.config.wandb.log_histograms_every
        if every is not None and self.journal.wandb is not None:
            self.observers.add(
                HistogramObserver(self.module, self.journal.wandb, every)
            )

    def _begin_profile(self) -> str:
        """Profile what `train.profile` asks for; returns the header's line."""
        self._profile, line = add_profile(
            self.observers,
            self.run,
            self.timetable,
            steps_done=self.progress.step,
            directory=self.journal.directory,
            note=self.journal.note,
        )
        return line

    def start(self) -> None:
        """Begin at the step after those that are done. A loop of one's own calls it once before `train_step`."""
        stateful = self._stateful_objects()  # refuses now what could not be saved later
        self._refuse_other_optimizer()
        self.stopwatch = Stopwatch(self.progress)
        if self._batches is None:  # the proof may have started loading
            self.load_from(self.progress.step)
        self.module.train()
        self.resuming.restore_modes()  # after `train`, which reaches every module
        self.run.loss_state.begin()
        begin_training(self.optimizer)
        self._average.begin()
        self.observers.begin(self.run)
        # After `begin`, in which an observer may make what has the state.
        self.resuming.load_states(stateful)
        check_states(stateful, self.run)
        # The average asks for them itself, at its own steps.
        others = {n: v for n, v in stateful.items() if v is not self._average}
        observers_read = self.observers.read_statistics
        self._statistics_are_read = observers_read or keeps_statistics(others)
        is_subclass = type(self) is not Trainer
        self._ending.begin(code_may_stop=self.observers.may_stop or is_subclass)

    def _refuse_other_optimizer(self) -> None:
        """Raise `LockstepError` for one that has been put in the place of the run's own."""
        if self.evaluations.optimizer is not self.optimizer:
            raise LockstepError(
                f"the optimizer was replaced by {type(self.optimizer).__name__} after the Trainer was made, and "
                f"checkpoints would hold the state of the one before; name yours in optimizer.name"
            )

    def load_from(self, steps_done: int) -> None:
        """Load the samples of the step after `steps_done` next."""
        self._batches = train_loader(
            self.run.train_loader,
            self.plan,
            self.ranks.rank,
            steps_done,
            fuse=self.fuse,
            quarantine=self.run.quarantine,
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
        self.run.end_evaluations()

    def _loop(self, stop: StopRequest) -> None:
        if self._ending.was_before(self.progress, self.journal.note):
            return
        if self._evaluate_where_due() and self._end_early():
            return
        for step in self.plan.steps(self.progress.step, self.last_step):
            self.train_step(step)
            if self.progress.step != step.number:
                raise LockstepError(
                    f"{type(self).__name__}.train_step has not trained step {step.number}: call "
                    f"super().train_step(step) in it"
                )
            activity.is_first_step = False
            has_row = False
            if self.finite.is_held_back or not self.timetable.is_quiet(step):
                has_row = self._write_what_is_due(step)
            self.journal.advance(step.number)
            if stop.agreed(begins_epoch=step.first_in_epoch):
                self._stop(stop.signal_number)
            # Ranks meet at rows.
            if has_row and self._end_early():
                return

    def _write_what_is_due(self, step: Step) -> bool:
        """Log, save and evaluate where that is due after `step`; True if the plan has a row there."""
        is_logged = self._is_logged(step)
        is_bad = self.finite.is_held_back and not self.finite.leaves_out
        if is_bad or is_logged:
            self.log(step)
        self.progress.epoch_end_is_due = step.last_in_epoch
        self.progress.evaluation_is_due = self.timetable.is_evaluated_within_epoch(step)
        # Before the evaluation, which may fail on a sample that training never saw.
        if self.timetable.is_checkpointed(step):
            self.save()
        return self._evaluate_where_due() or is_logged

    def _end_early(self) -> bool:
        """True if the run ends here because `early_stop` or an observer asked for it. A collective."""
        reason = self._ending.reason_after(self.plan.step(self.progress.step - 1))
        if not reason:
            return False
        self.progress.stopped_by = reason
        self.save()
        return True

    def _evaluate_where_due(self) -> bool:
        """What follows the last step: its epoch's end, or an evaluation within the epoch; False if it was neither.

        A run that resumes from that step's checkpoint, which was written before, does it again.
        """
        progress = self.progress
        if progress.epoch_end_is_due:
            self.end_epoch(self.plan.step(progress.step - 1))
        elif progress.evaluation_is_due:
            self._evaluate_within_epoch(self.plan.step(progress.step - 1))
        else:
            return False
        return True

    def train_step(self, step: Step) -> None:
        """One optimizer update on the step's samples, over all ranks. Never waits for the device.

        Steps are taken in order, after `start`.
        """
        run, reduction, loader = self.run, self.reduction, self.batches
        activity.step = step.number
        if step.first_in_epoch:
            self._begin_epoch(step.epoch)
        set_learning_rate(self.optimizer, self.schedule.factor(step.number - 1))
        step = loader.prepare(step)
        if not step.size:
            self._pass_over(step)
            return

        undo = self._undo_of_step() if self.finite.leaves_out else None
        losses = self._run_micro_batches(step)
        activity.mark(EXCHANGING)
        reduction.finish(step)
        activity.mark(UPDATING)
        is_held_back = self.finite.mark(
            step.number, losses, reduction.gradients_to_check()
        )

        needs_norm = self._needs_gradient_norm(step)
        if needs_norm or self.observers.look_at_gradients:
            run.precision.unscale(self.optimizer)
        if needs_norm:
            self.grad_norm = reduction.clip(self.config.train.max_grad_norm)
        for observer in self.observers.all:
            observer.gradient(step)
        if not is_held_back:
            run.precision.step(self.optimizer)
        elif undo is not None:
            undo()
            self.grad_norm = None
        forget_gradients(self.optimizer)
        self.progress.step = step.number
        self.progress.samples_seen += step.size
        is_averaged = self._average.is_due(step)
        if self._statistics_are_read or is_averaged:
            reduction.gather_statistics()
        if is_averaged and not is_held_back:
            self._average.update(self.finite.gradient_flag)
        self._observe(step)

    def _observe(self, step: Step) -> None:
        for observer in self.observers.all:
            observer.step(step)
        if self.observers.all:
            self.observers.after()

    def _run_micro_batches(self, step: Step) -> list[Tensor]:
        """The forward and backward of this rank's micro-batches of `step`; returns their losses."""
        # On the device.
        batches: Iterable[MicroBatch] = self.batches.step(step)
        if self.whole_step is not None:
            batches = self.whole_step.begin(step, batches)
        self.reduction.begin(step)
        if self.graphs is not None:
            self.graphs.begin(step)
        losses = []
        for loaded in batches:
            batch = self.run.forward.mixed(loaded, step)
            with self.reduction.micro_batch(step, batch.indices) as model:
                output, loss = self._forward_and_backward(model, batch, step)
            total = loss.total.detach()
            losses.append(total)
            if self.whole_step is None:
                self.meter.add(batch, output, WeightedSum(total, loss.weight))
            for observer in self.observers.all:
                observer.micro_batch(step, batch, output, loss)
        if self.whole_step is not None:
            self.whole_step.finish()
        return losses

    def _forward_and_backward(
        self, model: nn.Module, batch: MicroBatch, step: Step
    ) -> tuple[Any, WeightedSum]:
        """Add a micro-batch's share of the step's gradient; returns its output and its loss."""
        if self.whole_step is not None:
            return self.whole_step.forward_and_backward(model, batch)
        if self.graphs is not None:
            return self.graphs.forward_and_backward(model, batch, step)
        return forward_and_backward(self.run, self.reduction, model, batch, step)

    def _pass_over(self, step: Step) -> None:
        """A step of which no sample can be read changes nothing but the run's position."""
        self.grad_norm = None
        self.progress.step = step.number
        self._observe(step)

    def _undo_of_step(self) -> Callable[[], None]:
        """A function that undoes what a step without its update does: to buffers, and to the sums of the next row."""
        restore_buffers = self.reduction.snapshot()
        forget_sums = self.meter.mark()

        def undo() -> None:
            restore_buffers()
            forget_sums()

        return undo

    def _needs_gradient_norm(self, step: Step) -> bool:
        if self.run.config.train.max_grad_norm is not None:
            return True
        if self.timetable.is_quiet(step):
            return False
        return self._is_logged(step) or step.number == self.last_step

    def _begin_epoch(self, epoch: int) -> None:
        """What ranks check and do together at an epoch's first step. A collective."""
        check_order(self.plan, self.ranks, epoch=epoch)
        self._freeze(epoch)
        self._average.follow_thawing()

    def _freeze(self, epoch: int) -> None:
        """Freeze and thaw parameters as `epoch` asks for. A collective, at an epoch's first step."""
        modes = modes_of_others(self.module)
        if self.run.freezing.apply(epoch):
            activity.is_first_step = True  # what was compiled is compiled anew
            self.reduction.rebuild()
            self.module.train()
            restore_modes(modes)
            self.run.forget_features()

    # ---------------------------------------------------------------- what is logged

    def _is_logged(self, step: Step) -> bool:
        return self.timetable.is_logged(step)

    def measure(self, step: Step) -> Row:
        """A row of the steps since the last row. A collective; only here does training wait for the device."""
        self.row_means.read_meter()
        skipped = self.finite.count(self.progress)
        row: Row = {"step": step.number, "epoch": step.epoch + 1}
        row |= self.row_means.end_interval()
        row |= learning_rates(self.optimizer)
        if self.grad_norm is not None:
            row["grad_norm"] = self.grad_norm.item()
        row |= skipped
        row |= self.left_out.count()
        row |= self.stopwatch.pace(
            self.progress.samples_seen, self.batches.take_waited()
        )
        return row

    def log(self, step: Step) -> None:
        """Log a row. Raises `LockstepError` if a loss or a gradient since the last row is not finite."""
        activity.mark(LOGGING)
        row = self.measure(step)
        self.observers.row(row)
        # Of shards a digest is a collective.
        has_digest = self.ranks.is_main or self.run.is_sharded
        self.journal.log(row, self.digest() if has_digest else "")
        if self.graphs is not None:
            self.graphs.report(self.journal.note)
        self.saving.check_finite(self.progress, self.journal.directory)

    def digest(self) -> str:
        """The digest of the weights, a loss's own included, which is the same on every rank.

        With `train.parallel=fsdp` a collective.
        """
        weights: dict[str, Tensor] = dict(self.module.named_parameters())
        if self.run.is_sharded:
            return hexadecimal(digest_of_shards(weights, self.ranks))
        whole = ModelAndLoss(self.module, self.run.task)
        return hexadecimal(digest(weights | whole.trained_loss_parameters()))

    def end_epoch(self, step: Step) -> None:
        """Log the epoch's row: means over its samples, and an evaluation every `train.evaluate_every` epochs."""
        self.saving.check_unsaved(self.progress, self.journal)
        means = self.row_means.end_epoch()
        note = self._decoding_notes.take_note(step.epoch)
        if note:
            self.journal.note(note)
        self._log_epoch(step, means, evaluate=self.timetable.is_evaluated(step))
        self.progress.epoch_end_is_due = False

    def _evaluate_within_epoch(self, step: Step) -> None:
        """Log a row of an evaluation alone. It counts as an epoch's does: for the best model and for `plateau`."""
        self.saving.check_unsaved(self.progress, self.journal)
        self._log_epoch(step, {}, evaluate=True)
        self.progress.evaluation_is_due = False

    def _log_epoch(self, step: Step, means: Row, *, evaluate: bool) -> None:
        row = {"step": step.number, "epoch": step.epoch + 1, **means}
        is_evaluated = evaluate and self.run.evaluator is not None
        if is_evaluated:
            # Not `self.evaluations.evaluate`: a subclass may override this one.
            row |= self.evaluations.columns(step, self.evaluate)
            activity.mark(LOGGING)
            for note in self.run.metrics.take_notes():
                self.journal.note(note)
        row |= learning_rates(self.optimizer)
        row |= self.left_out.count(is_evaluated=is_evaluated)
        self.observers.row(row)
        is_best = self.saving.write_if_best(row, self.progress, self.journal)
        if self.progress.best is not None:
            row[f"best/{self.config.best.metric}"] = self.progress.best
        is_within_epoch = self.progress.evaluation_is_due
        self.journal.epoch(
            row,
            is_best,
            steps_per_epoch=self.plan.steps_per_epoch if is_within_epoch else None,
        )
        if not is_within_epoch:
            self.observers.epoch(step, row)
        self._ending.take_note(row)
        if is_evaluated and self.config.run.figures and self.observers.draw_figures:
            self.ranks.on_main(partial(self._draw_of_observers, step))
        self.evaluations.check_finite(row, self.saving.kept_step)
        self.stopwatch.mark(self.progress.samples_seen)

    def evaluate(self) -> Row:
        """The loss and metrics over all validation samples, with the present weights. A collective.

        It may be called before, after and without `fit`; `end_loading` then ends its loader processes. Raises
        `ConfigError` if there are no validation samples.
        """
        return self.evaluations.evaluate(self.progress.step)

    def load_best(self) -> Row:
        """Load the best weights so far on every rank; returns the row that was saved with them. A collective."""
        self.finish_saving()
        return self.run.load_best()

    # ---------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Begin to write a checkpoint of the present step boundary. A collective.

        Training goes on with a copy made. The checkpoint is complete by the next `save`, by the end of `fit`, and after
        `finish_saving`; an error of writing it is raised there, too.

        Raises `LockstepError` if the run is not finite: no checkpoint holds NaN or an infinity.
        """
        activity.mark(SAVING)
        self.saving.check_state(self.progress, self.journal)
        self.row_means.read_meter()
        self.stopwatch.stop(self.progress)
        self.row_means.save(self.progress)
        self.left_out.save(self.progress)
        self.saving.write_checkpoint(
            self.progress, self._stateful_objects(), self.journal
        )
        activity.mark(UPDATING)
        self.stopwatch.mark(self.progress.samples_seen)

    def finish_saving(self) -> None:
        """Wait until the last checkpoint and the best model are complete in their files. A collective."""
        phase = activity.phase
        self.saving.wait()
        activity.mark(phase)

    def _draw_of_observers(self, step: Step) -> None:
        figures = self.observers.figures(step, self.journal.directory / "figures")
        self.journal.figures(figures, step.number)

    def _resume(self, paths: Sequence[Path]) -> None:
        """Take over the newest of the checkpoints `paths` that can be read, if there are any."""
        if not paths:
            return
        directory = self.journal.directory
        content = self.resuming.read(paths, directory)
        self.restore(content)
        self.left_out.take_over(directory)
        self.resuming.restore_best(content, directory)

    def restore(self, content: Checkpoint) -> None:
        """Take over the state of a checkpoint. Stateful objects take theirs over in `start`."""
        self.resuming.restore(content)
        self.progress = content.progress
        self.saving.go_on_from(self.progress)
        self.left_out.restore(self.progress)
        self.row_means.restore(self.progress)
        self.schedule = self._build_schedule()
        if self.progress.step:  # the row of an epoch that ended there shows its rate
            factor = self.schedule.factor(self.progress.step - 1)
            set_learning_rate(self.optimizer, factor)
        self._freeze(epoch_to_go_on_in(self.progress, self.plan))
        self.run.forget_features()
        self.resuming.describe_rate(content, self.schedule)

    def _stateful_objects(self) -> dict[str, Stateful]:
        """What `stateful` holds, a subclass's own attributes, and observers with a state, by name."""
        attributes = dict(vars(self))
        for name in self._attributes_of_trainer:
            attributes.pop(name, None)
        objects = StatefulObjects()
        if self._average.is_on:
            objects.add_named({"ema": self._average})
        if self._ending.early_stop is not None:
            objects.add_named({"early_stop": self._ending.early_stop})
        objects.add_named(self.stateful)
        objects.add_attributes(attributes, model=self.module)
        objects.add_observers(self.observers)
        return objects.by_name

    def _stop(self, signal_number: int) -> None:
        if self.saving.saved_step != self.progress.step:
            self.save()
        self.saving.wait()
        raise Stopped(
            f"stopped by signal {signal_number} after step {self.progress.step}; a checkpoint is kept, "
            f"go on with run.resume=auto",
            signal_number,
        )

    def _finish(self) -> dict[str, Any]:
        """Write and return the summary, and draw figures. A run that ends inside an epoch is evaluated before that.

        All this comes after the last checkpoint, so a run that goes on from it shows no trace of having ended here.
        """
        activity.mark(ENDING)
        last = self.plan.step(self.progress.step - 1)
        self.reduction.gather()
        is_changed = self.evaluations.recalibrate_at_end(self.progress.step)
        if not self._is_logged(last):
            self.log(last)
        if is_changed or not self.timetable.is_evaluated(last):
            self._log_epoch(last, {}, evaluate=True)
        self.saving.wait()  # the best model is read next
        activity.mark(ENDING)
        self.stopwatch.stop(self.progress)
        self.finite.check_end(self.progress)
        summary = conclude(
            self.run,
            self.journal,
            self.optimizer,
            self.progress,
            self.schedule,
            last=last,
            proof=self.proof,
            average=self._average.tensors(),
        )
        self.observers.end(summary)
        return summary

    def _build_schedule(self) -> Schedule:
        return build_schedule(
            self.config.schedule,
            total_steps=self.plan.total_steps,
            steps_per_epoch=self.plan.steps_per_epoch,
            history=self.progress.history,
            mode=self.config.best.mode or "min",  # `build_run` has resolved it
        )
