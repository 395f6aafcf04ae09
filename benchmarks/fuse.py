"""What `batch.fuse` gains: the time of one training step, several micro-batches in each forward, against one.

python -m benchmarks.fuse                           two workloads, about a minute on the CPU
python -m benchmarks.fuse --save docs/results/fuse.md

All runs take turns in one process, a round each; what counts is the ratio to the run that fuses nothing, round by
round. The second net is one of many small layers, where the host's own work is much of a step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from benchmarks.page import write_page
from benchmarks.step_time import Sink, Workload, line_of, table, workloads
from benchmarks.subjects import settings
from benchmarks.timing import LOCKSTEP, InterleavedTrainer, Loop, Rounds, Seconds
from trainer import Config, Trainer
from trainer.core.fuse_check import choose_fuse
from trainer.data.datasets import ImageArrays, digits

FUSED = (2, 4, 8)  # of the 8 micro-batches of a step
BASE = "fuse=1"


def deep() -> nn.Module:
    """20 convolutions of 16 channels, each with BatchNorm, `(N, 1, 8, 8)` → `(N, 10)`."""
    layers: list[nn.Module] = []
    for inputs in (1, *[16] * 19):
        layers += [
            nn.Conv2d(inputs, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 64, 10))


def subjects() -> list[tuple[Workload, ImageArrays]]:
    """What is trained, and on what data, 64 = 8 × 8 samples a step."""
    data = digits().train
    assert isinstance(data, ImageArrays)
    small = settings(Path(), batch__size=64, batch__micro_size=8)
    return [
        (workloads()[1], data),
        (
            Workload(
                "20 convolutions of 16 channels, 8 × 8 pixels", small, deep, steps=5
            ),
            data,
        ),
    ]


def measure(
    workload: Workload, data: ImageArrays, rounds: Rounds, threads: int
) -> Seconds:
    """Seconds of a step for each number of micro-batches in a forward."""
    ids = torch.arange(rounds.total_steps * workload.config.batch.size) % len(data)
    train = ImageArrays(*data.batch(ids))
    with TemporaryDirectory() as directory, redirect_stdout(Sink(False)):

        def config(fuse: int) -> Config:
            tree = workload.config.to_dict()
            tree["run"] |= {"dir": directory, "figures": False}
            tree["train"] |= {"epochs": 1}
            tree["best"] |= {"metric": "train/loss", "mode": "min"}
            tree["wandb"] |= {"mode": "disabled"}
            tree["batch"] |= {"fuse": fuse}
            return Config.from_dict(tree)

        trainer = InterleavedTrainer(
            config(1), model=workload.make_model(), train_data=train
        )
        fused = {
            f"fuse={fuse}": _steps(
                Trainer(config(fuse), model=workload.make_model(), train_data=train)
            )
            for fuse in FUSED
        }
        torch.set_num_threads(threads)
        seconds = trainer.fit_with(fused, rounds)
    return {BASE: seconds.pop(LOCKSTEP), **seconds}


def _steps(trainer: Trainer) -> Loop:
    """The steps of a run, as `Trainer.fit` makes them, with what it reads from the device."""
    trainer.fuse, trainer.fuse_note = choose_fuse(trainer.run)
    trainer.start()
    for step in trainer.plan.steps():
        trainer.train_step(step)
        if step.number % trainer.config.train.log_every == 0:
            trainer.meter.read()
        yield


def sections(options: argparse.Namespace) -> Iterator[str]:
    """The tables of each workload."""
    for workload, data in subjects():
        rounds = Rounds(options.rounds, options.steps or workload.steps)
        seconds = measure(workload, data, rounds, options.threads)
        lines = [line_of(seconds, name, BASE) for name in seconds]
        title = f"## {workload.name}\n\n{rounds.count} rounds of {rounds.steps} steps"
        yield f"{title}\n\n{table(lines, BASE)}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--steps", type=int, help="steps of a round (default: 20, then 5)"
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="rounds of each run (default: 15)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of the process (default: 1)"
    )
    parser.add_argument(
        "--save", type=Path, help="write the tables to this Markdown file too"
    )
    options = parser.parse_args(arguments)
    found = sections(options)
    title = "Micro-batches in one forward"
    return write_page(title, found, options.save, threads=options.threads)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
