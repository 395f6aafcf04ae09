"""A sweep on this machine, without a server: trials as processes, several at a time, gone on with after a kill."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from trainer.errors import LockstepError, Stopped
from trainer.sweep.description import Sweep
from trainer.sweep.process import PATIENCE, Process, read_curve
from trainer.sweep.search import next_values, rungs_reached, should_stop
from trainer.sweep.store import Store, Trial

POLL = 0.25  # seconds
EARLY = "early: not among the best at its rung"


class LocalSweep:
    """Runs a sweep's trials in `directory`, each in `<directory>/<name>-<number>`; `trials` is what became of them.

    `shared` are overrides of every trial's config. `parallel` trials run at once, each on its share of the GPUs.
    """

    def __init__(self, sweep: Sweep, directory: Path, *, seed: int, parallel: int, shared: list[str]) -> None:
        self._sweep, self._directory, self._seed, self._shared = sweep, directory, seed, shared
        self._slots = [*_shares(parallel)]
        self._store = Store(directory, _made_of(sweep, seed, shared))
        self.trials = self._store.trials()
        for trial in self.trials:
            trial.curve = read_curve(self.run_directory(trial), sweep.metric)
        self._running: dict[int, Process] = {}  # by slot
        self._signal = 0

    def run_directory(self, trial: Trial) -> Path:
        return self._directory / f"{self._sweep.name}-{trial.number:03d}"

    def run(self, show: Callable[[list[Trial]], None]) -> None:
        """Run what is left of the sweep. A signal stops the trials, at a checkpoint each, and raises `Stopped`."""
        previous = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self._start_due() or self._running:
                if self._signal:
                    self._stop_all()
                self._follow()
                show(self.trials)
                time.sleep(POLL)
            show(self.trials)
        finally:
            self._stop_all()  # those left where something here failed
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._store.close()
        if self._signal:
            raise Stopped("the sweep stopped, its trials at a checkpoint; the same command goes on", self._signal)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._signal = number

    def _stop_all(self) -> None:
        for process in self._running.values():
            process.stop()

    def _start_due(self) -> bool:
        """Start trials on free slots; whether there may be more to start."""
        for slot, devices in enumerate(self._slots):
            if self._signal:
                return False
            if slot not in self._running:
                trial = self._next()
                if trial is None:
                    return False
                self._store.save(trial)
                self._running[slot] = Process(self._sweep, trial, self.run_directory(trial), self._shared, devices)
        return True

    def _next(self) -> Trial | None:
        """A trial that was interrupted, else a new one."""
        for trial in self.trials:
            if trial.state == "interrupted":
                _wait_until_free(self.run_directory(trial))
                trial.state = "running"
                return trial
        values = next_values(self._sweep, self._seed, self.trials)
        if values is None:
            return None
        self.trials.append(Trial(len(self.trials), values))
        return self.trials[-1]

    def _follow(self) -> None:
        for slot, process in list(self._running.items()):
            status = process.status()  # asked first: what it logged before it ended is then all there
            if self._falls_behind(process) and status is None:
                process.trial.reason = EARLY
                process.stop()
            if status is not None:
                del self._running[slot]
                self._end(process, status)

    def _falls_behind(self, process: Process) -> bool:
        """Follow a trial; whether it has come to a rung and is not among the best there."""
        band, trial = self._sweep.hyperband, process.trial
        before = len(trial.curve)
        process.follow()
        if band is None or rungs_reached(band, len(trial.curve)) == rungs_reached(band, before):
            return False
        return should_stop(self._sweep, band, trial, self.trials)

    def _end(self, process: Process, status: int) -> None:
        """What became of a trial."""
        trial = process.trial
        sign = 1 if self._sweep.goal == "maximize" else -1
        finite = [value for value in trial.curve if value - value == 0]
        trial.value = sign * max(sign * value for value in finite) if finite else None
        if status == 0:
            trial.state, trial.reason = "done", "" if finite else f"logged no {self._sweep.metric}"
        elif trial.reason == EARLY and process.stopping:
            trial.state = "stopped"
        elif process.stopping:
            trial.state = "interrupted"
        else:
            trial.state, trial.reason = "failed", process.failure(status)
        self._store.save(trial)


def _made_of(sweep: Sweep, seed: int, shared: list[str]) -> dict[str, object]:
    """What a sweep that goes on must have in common with what was run. How many trials is free."""
    return {
        "seed": seed,
        "method": sweep.method,
        "metric": [sweep.metric, sweep.goal],
        "parameters": repr(sweep.parameters),
        "early_terminate": repr(sweep.hyperband),
        "arguments": [*sweep.arguments, *shared],
    }


def _shares(parallel: int) -> list[str | None]:
    """For each of `parallel` trials its part of CUDA_VISIBLE_DEVICES; None without a GPU. They share where few."""
    if parallel == 1:
        return [None]
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count() if given is None else 0)]
    each = len(devices) // parallel
    if not devices:
        return [None] * parallel
    if not each:
        return [devices[slot % len(devices)] for slot in range(parallel)]
    return [",".join(devices[slot * each : (slot + 1) * each]) for slot in range(parallel)]


def _wait_until_free(run: Path) -> None:
    """Until the processes of an interrupted trial, which end soon after their sweep, have let go of its directory."""
    lock, deadline = run / ".lock", time.monotonic() + PATIENCE
    while lock.exists() and _is_held(lock):
        if time.monotonic() > deadline:
            raise LockstepError(f"a trial of an earlier sweep still runs in {run}; end it first")
        time.sleep(POLL)


def _is_held(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
