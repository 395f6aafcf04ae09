"""A sweep on this machine, without a server: trials as processes, several at a time, continued after a kill."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from trainer.errors import ConfigError, LockstepError, Stopped
from trainer.storage.files import is_locked
from trainer.sweep.description import Sweep
from trainer.sweep.process import KILL_AFTER, TrialProcess, read_curve
from trainer.sweep.study import SweepStudy, Trial, best_value, explained_storage

# Seconds; short beside a trial, and as often as a table need be drawn.
POLL_INTERVAL = 0.25
STOPPED_EARLY = "early: not among the best at its rung"
# A shell's and env's: the command is not executable, or there is none of that name.
NOT_STARTED = (126, 127)


class LocalSweep:
    """Runs a sweep's trials in `directory`, each in `<directory>/<name>-<number>`. `trials` is what became of them.

    `shared` are overrides of every trial's config. `parallel` trials run at once, each on its share of the GPUs.
    """

    def __init__(
        self,
        sweep: Sweep,
        directory: Path,
        *,
        seed: int,
        parallel: int,
        shared: list[str],
    ) -> None:
        self._sweep = sweep
        self._directory = directory
        self._shared = shared
        self._slots = _share_devices(parallel)
        self.study = SweepStudy(
            sweep,
            directory,
            seed=seed,
            identity=_describe_identity(sweep, seed, shared),
        )
        self.trials = self.study.trials
        for trial in self.trials:
            trial.curve = read_curve(self._run_directory(trial), sweep.metric)
        self._processes: dict[int, TrialProcess] = {}  # by slot
        self._signal = 0

    def run(self, show: Callable[[list[Trial]], None]) -> None:
        """Run what is left of the sweep. A signal stops the trials, at a checkpoint each, and raises `Stopped`."""
        handlers = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            with explained_storage(self.study.path):
                self._loop(show)
        finally:
            self._stop_all()  # trials that still run if the sweep itself fails
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.study.close()
        # After the study is closed, so that the same command may run at once.
        if self._signal:
            raise Stopped(
                "the sweep stopped, its trials at a checkpoint; the same command goes on",
                self._signal,
            )

    def _loop(self, show: Callable[[list[Trial]], None]) -> None:
        while self._start_trials() or self._processes:
            if self._signal:
                self._stop_all()
            self._follow_all()
            show(self.trials)
            time.sleep(POLL_INTERVAL)
        show(self.trials)

    def _handle(self, number: int, _: FrameType | None) -> None:
        # The loop acts on it: a handler may interrupt a write to the study.
        self._signal = number

    def _stop_all(self) -> None:
        for process in self._processes.values():
            process.stop()

    def _run_directory(self, trial: Trial) -> Path:
        return self._directory / f"{self._sweep.name}-{trial.number:03d}"

    def _start_trials(self) -> bool:
        """Start trials on free slots; returns whether there may be more to start."""
        for slot, devices in enumerate(self._slots):
            if self._signal:
                return False
            if slot in self._processes:
                continue
            # Interrupted trials first, because bayes and early stopping learn from those that have ended.
            trial = self._resume_trial() or self.study.add_trial()
            if trial is None:
                return False
            directory = self._run_directory(trial)
            self._processes[slot] = TrialProcess(
                self._sweep, trial, directory, self._shared, devices
            )
        return True

    def _resume_trial(self) -> Trial | None:
        """The first trial that was interrupted."""
        for trial in self.trials:
            if trial.state == "interrupted":
                _wait_until_unlocked(self._run_directory(trial))
                trial.state = "running"
                return trial
        return None

    def _follow_all(self) -> None:
        for slot, process in list(self._processes.items()):
            # Before its file is read, which is then complete if the trial has ended.
            status = process.poll()
            process.follow()
            if self.study.falls_behind(process.trial) and status is None:
                process.trial.reason = STOPPED_EARLY
                process.stop()
            if status is not None:
                del self._processes[slot]
                self._end_trial(process, status)

    def _end_trial(self, process: TrialProcess, status: int) -> None:
        trial = process.trial
        trial.value = best_value(self._sweep, trial.curve)
        if status == 0:
            trial.state = "done"
            trial.reason = (
                "" if trial.value is not None else f"logged no {self._sweep.metric}"
            )
        elif process.is_stopping and trial.reason == STOPPED_EARLY:
            trial.state = "stopped"
        elif process.is_stopping or status in NOT_STARTED:
            trial.state = "interrupted"
        else:
            trial.state = "failed"
            trial.reason = process.describe_failure(status)
        self.study.save(trial)
        if status in NOT_STARTED:
            # No trial would start, and this one is open for the same command, once it is mended.
            raise ConfigError(
                "command",
                f"a trial could not start: {process.last_line() or f'status {status}'} ({self._sweep.file})",
            )


def _describe_identity(sweep: Sweep, seed: int, shared: list[str]) -> dict[str, Any]:
    """What a continued sweep must have in common with its earlier part. The number of trials is free."""
    return {
        "seed": seed,
        "method": sweep.method,
        "metric": [sweep.metric, sweep.goal],
        # As text, in which 1 and True differ.
        "parameters": repr(sweep.parameters),
        "early_terminate": repr(sweep.hyperband),
        "arguments": [*sweep.arguments, *shared],
    }


def _share_devices(parallel: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each of `parallel` trials; None without a GPU. Trials share a GPU if there are few."""
    if parallel == 1:
        return [None]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        devices = [str(index) for index in range(torch.cuda.device_count())]
    else:
        devices = visible.split(",") if visible else []
    if not devices:
        return [None] * parallel
    share = len(devices) // parallel
    # Fewer GPUs than trials: two or more trials use the same one.
    if share == 0:
        return [devices[slot % len(devices)] for slot in range(parallel)]
    return [
        ",".join(devices[slot * share : (slot + 1) * share]) for slot in range(parallel)
    ]


def _wait_until_unlocked(run: Path) -> None:
    """Wait for the processes of an interrupted trial, which end soon after their sweep, to release its directory."""
    deadline = time.monotonic() + KILL_AFTER
    while is_locked(run):
        if time.monotonic() > deadline:
            raise LockstepError(
                f"a trial of an earlier sweep still runs in {run}; end it first"
            )
        time.sleep(POLL_INTERVAL)
