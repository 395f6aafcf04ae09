"""The time of a training step in bitwise mode against standard mode, the same micro-batches in both.

python -m benchmarks.bitwise_time                                           one process
torchrun --standalone --nproc_per_node 4 -m benchmarks.bitwise_time         four

Two trainers take turns in the same processes, a round of steps each. Deterministic kernels and one thread a process
hold for both on a CPU, so there the ratio is what the fixed tree and its exchange cost; on CUDA each has its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from benchmarks.resnet import resnet18
from benchmarks.step_time import machine
from benchmarks.subjects import noise, settings
from benchmarks.timing import LOCKSTEP, InterleavedTrainer, Loop, Rounds, quartiles
from trainer import Trainer
from trainer.components.models import small_cnn
from trainer.data.datasets import ImageArrays
from trainer.process import launcher
from trainer.process.exit import exit_process, report_error


@dataclass(frozen=True)
class Subject:
    """`cuts` micro-batches of `micro` images a step."""

    name: str
    make_model: Callable[[], nn.Module]
    cuts: int
    micro: int
    side: int
    steps: int


SUBJECTS = (
    Subject(
        "small_cnn, 64 = 8 × 8 images of 32 × 32",
        lambda: small_cnn(10, 3),
        8,
        8,
        32,
        10,
    ),
    Subject(
        "ResNet-18, 64 = 8 × 8 images of 64 × 64", lambda: resnet18(10), 8, 8, 64, 2
    ),
)


def measure(
    subject: Subject, rounds: Rounds
) -> tuple[float, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """Milliseconds of a standard step, and the quartiles of bitwise over standard, on both clocks."""
    size = subject.cuts * subject.micro
    data = noise(rounds.total_steps * size, subject.side)
    with TemporaryDirectory() as directory, redirect_stdout(StringIO()):
        common = {
            "batch__size": size,
            "batch__micro_size": subject.micro,
            "train__log_every": 50,
        }
        bitwise = settings(
            Path(directory),
            run__name="bitwise",
            run__reproducibility="bitwise",
            **common,
        )
        standard = settings(Path(directory), run__name="standard", **common)
        other = Trainer(standard, model=subject.make_model(), train_data=data)
        trainer = InterleavedTrainer(
            bitwise, model=subject.make_model(), train_data=_same(data)
        )
        seconds = trainer.fit_with({"standard": _steps(other)}, rounds)
    return 1e3 * float(np.median(seconds["standard"], axis=0)[0]), quartiles(
        seconds, LOCKSTEP, "standard"
    )


def _same(data: ImageArrays) -> ImageArrays:
    return ImageArrays(data.images, data.targets)


def _steps(trainer: Trainer) -> Loop:
    """The steps of a second trainer; settings that are of the whole process are standard mode's meanwhile, on CUDA."""
    trainer.start()
    on_gpu = trainer.ranks.device.type == "cuda"
    for step in trainer.plan.steps():
        if on_gpu:
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.deterministic = False
        trainer.train_step(step)
        if on_gpu:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.deterministic = True
        yield


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bitwise_time", description=__doc__
    )
    parser.add_argument(
        "--rounds", type=int, default=20, help="rounds of each (default: 20)"
    )
    parser.add_argument(
        "--steps", type=int, help="steps of a round (default: 10, then 2)"
    )
    options = parser.parse_args(arguments)
    speaks = launcher.rank() == 0
    try:
        if speaks:
            print(f"{machine(1)}\n")
        for subject in SUBJECTS:
            standard, (low, median, high) = measure(
                subject, Rounds(options.rounds, options.steps or subject.steps)
            )
            if speaks:
                print(
                    f"{subject.name}: standard {standard:.1f} ms a step, bitwise {median[0]:.3f} × that "
                    f"({low[0]:.3f} to {high[0]:.3f} in half of the rounds; {median[1]:.3f} × in CPU time)",
                    flush=True,
                )
    except Exception as error:
        return report_error(error)
    return 0


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
