"""One trial as processes of their own: started, followed by its files, stopped; why it failed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from trainer.config.fields import show
from trainer.process.parent import end_with_parent, process_status
from trainer.reporting.jsonl import read_rows
from trainer.sweep.description import Sweep
from trainer.sweep.store import Trial

PATIENCE = 60.0  # seconds from a SIGTERM to a SIGKILL
EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b.*")
LAUNCHERS_OWN = ("torch.distributed.elastic", "subprocess.CalledProcessError")  # said after what a rank has said


class Process:
    """A running trial. `directory` is its run's."""

    def __init__(self, sweep: Sweep, trial: Trial, directory: Path, shared: list[str], devices: str | None) -> None:
        self.trial = trial
        self.directory = directory
        self.stopping = False
        self._log = log_path(directory)
        self._metric = sweep.metric
        self._began = time.monotonic()
        self._before = trial.seconds
        self._size = -1
        self._kill_at = 0.0
        own = [f"run.dir={show(str(directory.parent))}", f"run.name={show(directory.name)}", "run.resume=auto"]
        environment = {**os.environ, "LOCKSTEP_SWEEP": sweep.name}
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                sweep.trial_command(shared, trial.values, own),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the sweep to pass on
                preexec_fn=end_with_parent,  # noqa: PLW1509 - a sweep has no threads
            )

    def follow(self) -> None:
        """Read what the trial has logged."""
        self.trial.seconds = self._before + time.monotonic() - self._began
        rows = self.directory / "metrics.jsonl"
        size = rows.stat().st_size if rows.exists() else -1
        if size != self._size:
            self._size = size
            self.trial.curve = read_curve(self.directory, self._metric)

    def stop(self) -> None:
        """Ask the trial to end at its next step; `status` sees to it that it does."""
        if not self.stopping:
            self.stopping, self._kill_at = True, time.monotonic() + PATIENCE
            self._process.terminate()

    def status(self) -> int | None:
        """The exit status; None while anything of the trial runs: a launcher may end before what it started."""
        status, now = self._process.poll(), time.monotonic()
        if status is not None:
            if not _group_lives(self._process.pid):
                return status
            self._kill_at = self._kill_at or now + PATIENCE
        if self._kill_at and now > self._kill_at:
            os.killpg(self._process.pid, signal.SIGKILL)
        return None

    def failure(self, status: int) -> str:
        """Why the trial failed, from what it said last."""
        return said_last(self._log) or (
            f"killed by signal {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        )


def log_path(directory: Path) -> Path:
    """Where a trial's output goes: beside its run's directory, which is the run's own."""
    return directory.with_name(f"{directory.name}.log")


def read_curve(directory: Path, metric: str) -> list[float]:
    """All values of the metric that a run has logged."""
    path = directory / "metrics.jsonl"
    return [row[metric] for row in read_rows(path) if metric in row] if path.exists() else []


def said_last(log: Path) -> str:
    """The run's own error message in its output, else the last exception that is not a launcher's."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    raised = [line for line in lines if EXCEPTION.match(line) and not line.startswith(LAUNCHERS_OWN)]
    return (told or raised or [""])[-1]


def _group_lives(group: int) -> bool:
    """Whether a process of the group runs. One that has ended, and nobody waited for, does not."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return sys.platform != "linux" or any(_group_of(int(entry.name)) == group for entry in Path("/proc").glob("[0-9]*"))


def _group_of(process: int) -> int:
    """The group of a process; 0 where it has ended."""
    try:
        state, _, group = process_status(process)
    except OSError:
        return 0
    return 0 if state in "ZX" else group
