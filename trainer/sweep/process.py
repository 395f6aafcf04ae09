"""One trial as processes of their own: how it starts, stops and is followed by its files, and why it failed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from trainer.config.fields import show
from trainer.config.secrets import redacted_output
from trainer.process.parent import end_with_parent, signal_name
from trainer.reporting.jsonl import read_rows
from trainer.sweep.description import Sweep
from trainer.sweep.study import Trial

KILL_AFTER = 60.0  # seconds from a SIGTERM to a SIGKILL
EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b.*")
# Launchers raise these because a rank has failed, and print them after the rank's own error.
LAUNCHER_ERRORS = ("torch.distributed.elastic", "subprocess.CalledProcessError")


class TrialProcess:
    """A running trial. `directory` is its run's; the output goes to a log beside it.

    `devices` is the trial's CUDA_VISIBLE_DEVICES; None leaves it as it is.
    """

    def __init__(
        self,
        sweep: Sweep,
        trial: Trial,
        directory: Path,
        shared: list[str],
        devices: str | None,
    ) -> None:
        self.trial = trial
        self.directory = directory
        self.is_stopping = False
        self._log = directory.with_name(f"{directory.name}.log")
        self._metric = sweep.metric
        self._start = time.monotonic()
        self._earlier_seconds = trial.seconds
        self._file_size = 0
        self._kill_time: float | None = None
        run = [
            f"run.dir={show(str(directory.parent))}",
            f"run.name={show(directory.name)}",
            "run.resume=auto",
        ]
        # By LOCKSTEP_SWEEP a run knows that it must end with its parent.
        environment = {
            **os.environ,
            "PATH": search_path(),
            "LOCKSTEP_SWEEP": sweep.name,
        }
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        # Appended to, because an interrupted trial resumes with the same log.
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                sweep.trial_command(shared, trial.values, run),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                # So that a Ctrl-C reaches the sweep alone, which passes it on.
                start_new_session=True,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - safe: a sweep has no threads
            )

    def follow(self) -> None:
        """Read what the trial has logged."""
        self.trial.seconds = self._earlier_seconds + time.monotonic() - self._start
        rows = self.directory / "metrics.jsonl"
        # A file of the same size has no new row, and reading a long one four times a second would cost too much.
        size = rows.stat().st_size if rows.exists() else 0
        if size != self._file_size:
            self._file_size = size
            self.trial.curve = read_curve(self.directory, self._metric)

    def stop(self) -> None:
        """Ask the trial to end at its next step. `poll` kills it if it does not."""
        if not self.is_stopping:
            self.is_stopping = True
            self._kill_time = time.monotonic() + KILL_AFTER
            self._process.terminate()

    def poll(self) -> int | None:
        """The exit status; None while any process of the trial runs, since a launcher may end before its ranks."""
        status = self._process.poll()
        if status is not None and not _group_runs(self._process.pid):
            return status
        if status is not None and self._kill_time is None:
            self._kill_time = time.monotonic() + KILL_AFTER
        if self._kill_time is not None and time.monotonic() > self._kill_time:
            os.killpg(self._process.pid, signal.SIGKILL)
        return None

    def last_line(self) -> str:
        """The last line of the trial's output."""
        lines = self._log.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def describe_failure(self, status: int) -> str:
        """Why the trial failed: its last error message, else its exit status."""
        message = redacted_output(last_error(self._log))
        if message:
            return message
        if status < 0:
            return f"killed by signal {signal_name(-status)}"
        return f"ended with status {status}"


def search_path() -> str:
    """Where a trial's programs are looked for: beside this Python first, whether its environment is activated or not.

    So a sweep that `.venv/bin/python` started finds that environment's `accelerate`.
    """
    beside_python = str(Path(sys.executable).parent)
    return os.pathsep.join([beside_python, os.environ.get("PATH", os.defpath)])


def read_curve(directory: Path, metric: str) -> list[float]:
    """All values of the metric that a run has logged."""
    path = directory / "metrics.jsonl"
    if not path.exists():
        return []
    return [row[metric] for row in read_rows(path) if metric in row]


def last_error(log: Path) -> str:
    """The run's own error message in its output, else the last exception that is not a launcher's, else nothing."""
    message = exception = ""
    for text in log.read_text(errors="replace").splitlines():
        line = text.strip()
        if line.startswith("error: "):
            message = line.removeprefix("error: ")
        elif EXCEPTION.match(line) and not line.startswith(LAUNCHER_ERRORS):
            exception = line
    return message or exception


def _group_runs(group: int) -> bool:
    """True if a process of the group runs. A zombie, which has ended but was not waited for, does not."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # it has ended meanwhile
            if (
                os.getpgid(process.pid) == group
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                return True
    return False
