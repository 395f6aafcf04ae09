"""One run of digits under `run.reproducibility=bitwise`, cut off in every way and gone on with elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.processes import on_processes
from trainer import Config, Observer, Run, Step, Stopped, Trainer
from trainer.components.models import small_cnn
from trainer.core.metrics import TIMINGS
from trainer.reporting.jsonl import read_rows
from trainer.storage import checkpoint

HASHED = ("weights", "buffers", "optimizer")
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}


@dataclass(frozen=True)
class Part:
    """A stretch of a run on some processes. It ends after step `until` by `train.max_steps`, or by a signal there."""

    processes: int
    workers: int = 0
    until: int | None = None
    signal: str | None = None

    def describe(self) -> str:
        end = (
            ""
            if self.until is None
            else f", {self.signal or 'stopped'} after step {self.until}"
        )
        workers = (
            f" + {self.workers} worker{'s' * (self.workers > 1)} each"
            if self.workers
            else ""
        )
        return f"{self.processes} {'process' if self.processes == 1 else 'processes'}{workers}{end}"


@dataclass(frozen=True)
class Outcome:
    """What a whole run, in one part or several, left behind: digests by name."""

    parts: Sequence[Part]
    digests: dict[str, str]


def cnn_with_dropout(
    num_classes: int, in_channels: int = 1, width: int = 32
) -> nn.Sequential:
    """`small_cnn` that drops a fifth of what its last layer sees."""
    model = small_cnn(num_classes, in_channels, width)
    model.insert(len(model) - 1, nn.Dropout(0.2))
    return model


def subject(directory: Path, part: Part, quick: bool) -> Config:
    """Steps of 100 samples in 13 micro-batches, which no count above 1 divides; 39 samples in an epoch's last."""
    return Config.from_dict(
        {
            "run": {
                "dir": str(directory),
                "reproducibility": "bitwise",
                "resume": "auto",
                "figures": False,
            },
            "data": {
                "name": "digits",
                "workers": part.workers,
                "train_transforms": [{"name": "RandomCrop", "size": 8, "padding": 1}],
            },
            "batch": {"size": 100, "micro_size": 8, "eval_size": 50},
            "model": {
                "name": "benchmarks.scale_runs.cnn_with_dropout",
                "width": 8 if quick else 32,
            },
            "optimizer": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
            "schedule": {"name": "step", "step_size": 1, "gamma": 0.5},
            "train": {
                "epochs": 1 if quick else 2,
                "max_steps": None if part.signal else part.until,
                "max_grad_norm": 1.0,
                "log_every": 7,
                "checkpoint_every": 10,
            },
            "wandb": {"mode": "disabled"},
        }
    )


def cases(quick: bool) -> list[list[Part]]:
    """The runs of the table: every count with and without workers, never stopped and stopped; then two signals."""
    if quick:
        return [
            [Part(1)],
            [Part(3, 1)],
            [Part(2, until=4), Part(1)],
            [Part(2, until=13, signal="SIGKILL"), Part(3)],
        ]
    counts, stops = (1, 2, 3, 4, 8), (1, 9, 15, 20, 29)  # 15: an epoch's end
    runs = [[Part(count, workers)] for count, workers in product(counts, (0, 2))]
    for index, count in enumerate(counts):
        elsewhere = counts[(index + 2) % len(counts)]
        for workers in (0, 2):
            runs.append(
                [Part(count, workers, until=stops[index]), Part(elsewhere, 2 - workers)]
            )
    runs.append([Part(3, until=12, signal="SIGTERM"), Part(8)])
    runs.append([Part(4, 2, until=24, signal="SIGKILL"), Part(1)])
    runs.append(
        [
            Part(8, until=3),
            Part(2, 2, until=11, signal="SIGTERM"),
            Part(1, until=22),
            Part(3),
        ]
    )
    return runs


def outcome(parts: Sequence[Part], directory: Path, quick: bool) -> Outcome:
    """Run the parts one after the other, each going on from where the one before it ended."""
    for part in parts:
        summaries = on_processes(part.processes, train_part, directory, part, quick)
    summary = summaries[0]
    digests = {name: summary[f"{name}_sha256"] for name in HASHED}
    rows = [
        {k: v for k, v in row.items() if k not in TIMINGS}
        for row in read_rows(directory / "run" / "metrics.jsonl")
    ]
    return Outcome(
        parts, digests | {"rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
    )


class Interruption(Observer):
    """Sends a signal in the middle of a run: SIGTERM to the last rank alone, SIGKILL to all."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def begin(self, run: Run) -> None:
        self.is_last_rank = run.ranks.rank == run.ranks.count - 1

    def step(self, step: Step) -> None:
        if not self.part.signal or step.number != self.part.until:
            return
        if self.is_last_rank or self.part.signal == "SIGKILL":
            os.kill(os.getpid(), SIGNALS[self.part.signal])


def train_part(directory: Path, part: Part, quick: bool) -> dict[str, Any] | None:
    trainer = Trainer(subject(directory, part, quick), observers=[Interruption(part)])
    try:
        return trainer.fit()
    except Stopped:
        return None


# ---------------------------------------------------------------- how soon a resumed run is in its place


class FirstStep(Observer):
    """Records when the first step has ended."""

    end_time: float | None = None

    def step(self, step: Step) -> None:
        if self.end_time is None:
            self.end_time = time.perf_counter()


def resume_seconds(directory: Path, samples: int) -> dict[int, float]:
    """Seconds from an empty process to the end of the first step after a resume, by the step gone on from.

    An epoch of `samples` made-up images, 100 a step; gone on from after its first step and before its last.
    """
    last = samples // 100 - 1
    on_processes(1, _resumed, directory, samples, 1)
    seconds = {1: on_processes(1, _resumed, directory, samples, 2)[0]}
    kept = directory / "run" / "checkpoints"
    held = checkpoint.load(checkpoint.latest(kept) or kept)
    # A position is a step number, and no more.
    held.progress.step, held.progress.samples_seen = last, 100 * last
    checkpoint.write(kept, checkpoint.take(held), keep=1)
    seconds[last] = on_processes(1, _resumed, directory, samples, last + 1)[0]
    return seconds


def _resumed(directory: Path, samples: int, until: int) -> float:
    began = time.perf_counter()
    tree = {
        "run": {"dir": str(directory), "resume": "auto", "figures": False},
        "data": {"name": "fake", "size": samples, "val_size": 10, "image_size": 8},
        "batch": {"size": 100},
        "train": {"epochs": 1, "max_steps": until},
        "wandb": {"mode": "disabled"},
    }
    first_step = FirstStep()
    Trainer(Config.from_dict(tree), observers=[first_step]).fit()
    assert first_step.end_time is not None
    return first_step.end_time - began
