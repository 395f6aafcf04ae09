"""Runs of one case: started, disturbed, waited for, and started again until they end."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.program import Fault, become_command
from benchmarks.processes import CLEAN
from trainer.process.local_ranks import rank_environments

PATIENCE = 120.0  # seconds for a run to end, before it counts as a hang
STARTS = 4  # of one run; a fault befalls the first alone
# After a rank was killed a launcher ends the others, which have this long to say so.
KILL_DELAY = 8.0
HASHED = ("weights_sha256", "buffers_sha256", "optimizer_sha256")
DIGITS = (
    "run.reproducibility=bitwise",
    "run.resume=auto",
    "run.figures=false",
    "run.timeout=60",
    "batch.size=200",
    "batch.micro_size=25",
    "model.width=8",
    "train.epochs=3",
    "train.checkpoint_every=3",
    "train.log_every=2",
    "wandb.mode=disabled",
)


class Failed(Exception):
    """An outcome that should not be: `traceback`, `hang` or `wrong`, and what was said."""

    def __init__(self, outcome: str, text: str) -> None:
        super().__init__(outcome, text)
        self.outcome = outcome
        self.text = text


@dataclass
class End:
    """How the processes of one start ended: the status of the first that failed, or 0, and what they printed."""

    status: int
    output: str
    errors: str

    def sentence(self) -> str:
        """The one message of a refusal. Raises `Failed` for none or several."""
        message = self.errors.strip()
        if not message.startswith("error: ") or _messages(message) != 1:
            raise Failed("traceback", f"not one message: {message}")
        return message


@dataclass
class Running:
    """The processes of one start."""

    ranks: list[Any]
    files: Path

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self.ranks]

    def is_alive(self) -> bool:
        return any(rank.is_alive() for rank in self.ranks)

    def send(self, number: int, ranks: Sequence[int] | None = None) -> None:
        for rank, process in enumerate(self.ranks):
            if (ranks is None or rank in ranks) and process.is_alive():
                os.kill(process.pid, number)

    def loader_processes(self) -> list[int]:
        """The processes that load data, of all ranks."""
        found = []
        for pid in self.pids:
            try:
                found += [child.pid for child in psutil.Process(pid).children()]
            except psutil.NoSuchProcess:
                continue
        return found


@dataclass
class Scene:
    """A directory, a run's settings in it, and the hashes with which it is to end."""

    directory: Path
    expected: dict[str, str]
    draw: random.Random
    settings: Sequence[str] = DIGITS
    starts: int = field(default=0, init=False)

    @property
    def run(self) -> Path:
        return self.directory / "digits"

    def start(
        self, *changes: str, ranks: int = 0, fault: Fault | None = None
    ) -> Running:
        """Start or go on with the run, on 1 or 2 processes unless `ranks` says how many."""
        arguments = ["train", f"run.dir={self.directory}", *self.settings, *changes]
        return self.command(*arguments, ranks=ranks or self.ranks(), fault=fault)

    def ranks(self) -> int:
        return self.draw.choice([1, 2])

    def command(
        self, *arguments: str, ranks: int = 1, fault: Fault | None = None
    ) -> Running:
        self.starts += 1
        output = self.directory / f"start{self.starts}"
        output.touch()
        output.with_suffix(".err").touch()
        processes = []
        common = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        for environment in rank_environments(common, ranks):
            work = (arguments, environment, output, fault)
            processes.append(CLEAN.Process(target=become_command, args=work))
        for process in processes:
            process.start()
        return Running(processes, output)

    def wait_for_checkpoint(self, running: Running, after: float = 0.0) -> None:
        """Until the first checkpoint and some seconds, or the run's end."""
        self.wait_for(running, (self.run / "checkpoints" / "last").exists)
        time.sleep(after)

    def wait_for(self, running: Running, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition() and running.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)

    def end(self, running: Running, patience: float = PATIENCE) -> End:
        """Wait for the processes. Raises `Failed` for a hang, a traceback, or more than one message."""
        is_over = _wait(running, patience)
        statuses = [process.exitcode for process in running.ranks]
        for process in running.ranks:
            process.kill()
            process.join()
        output = running.files.read_text()
        errors = running.files.with_suffix(".err").read_text()
        if not is_over:
            raise Failed("hang", errors or output[-500:])
        if "Traceback" in errors or _messages(errors) > 1:
            raise Failed("traceback", errors)
        return End(next((s for s in statuses if s), 0), output, errors)

    def go_on(self) -> str:
        """Start the run again until it ends: `survived`, or `refused` where it says each time why not."""
        for _ in range(STARTS - 1):
            end = self.end(self.start())
            if end.status == 0:
                return self.check_hashes(end)
        end.sentence()
        return "refused"

    def check_hashes(self, end: End) -> str:
        """`survived`. Raises `Failed` if the hashes are not those of the undisturbed run."""
        if self.hashes() != self.expected:
            raise Failed("wrong", end.errors or "other bits, and no word")
        return "survived"

    def hashes(self, name: str = "digits") -> dict[str, str]:
        summary = json.loads((self.directory / name / "summary.json").read_text())
        return {name: summary[name] for name in HASHED}


def _messages(errors: str) -> int:
    return sum(line.startswith("error: ") for line in errors.splitlines())


def _wait(running: Running, patience: float) -> bool:
    """Wait for all ranks. As a launcher does, end the others some time after one was killed. False for a hang."""
    deadline = time.monotonic() + patience
    kill_at = None
    while running.is_alive():
        now = time.monotonic()
        if now > deadline:
            return False
        was_killed = any(rank.exitcode == -signal.SIGKILL for rank in running.ranks)
        if was_killed and kill_at is None:
            kill_at = now + KILL_DELAY
        if kill_at is not None and now > kill_at:
            running.send(signal.SIGKILL)
        time.sleep(0.02)
    return True
