"""The time of one training step: Lockstep's `Trainer.fit` against a loop written by hand, and against others.

python -m benchmarks.step_time                          two workloads, about two minutes
python -m benchmarks.step_time --save docs/results/step_time.md
torchrun --standalone --nproc_per_node 2 -m benchmarks.step_time        against plain DDP, on two processes

Lockstep runs whole, with all that is on by default: metrics, logged rows in metrics.jsonl, console, learning rate
schedule, BatchNorm's bookkeeping, the seeding of each micro-batch, a watch for signals. W&B has a row of its own.
The loops take turns in one process, a round each, and what counts is the ratio to the loop by hand, round by
round: a machine that others use as well changes the times, and much less their ratio.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import loops
from benchmarks.timing import (
    LOCKSTEP,
    InterleavedTrainer,
    Loop,
    Rounds,
    Seconds,
    quartiles,
)
from trainer import Config, load
from trainer.components.models import small_cnn
from trainer.data.datasets import ImageArrays, digits
from trainer.process import launcher
from trainer.process.exit import report_error

# Name, loop, the package it needs.
PEERS: list[tuple[str, Callable[[loops.Work], Loop], str]] = [
    ("raw + tqdm and .item()", loops.raw_with_tqdm, "tqdm"),
    ("Accelerate's guide", loops.accelerate, "accelerate"),
    ("Lightning Fabric's guide", loops.fabric, "lightning"),
]
VARIANTS: dict[str, dict[str, Any]] = {  # Lockstep in other company
    f"{LOCKSTEP}, bar in a terminal": {"terminal": True},
    f"{LOCKSTEP}, W&B offline": {"wandb": "offline"},
}
Loops = Mapping[str, Callable[[loops.Work], Loop]]


@dataclass(frozen=True)
class Workload:
    """`steps` are those of a round: each round has as many logged rows where `log_every` divides them."""

    name: str
    config: Config
    make_model: Callable[[], nn.Module]
    steps: int

    @property
    def cuts(self) -> int:
        return self.config.batch.size // (
            self.config.batch.micro_size or self.config.batch.size
        )


@dataclass(frozen=True)
class Line:
    """A line of the table: µs a step, and quartiles of the ratio on both clocks; None where a package is absent."""

    name: str
    microseconds: float | None = None
    ratio: Any = None


def mlp() -> nn.Module:
    """A net so small that a loop's own work shows."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128, bias=False),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def workloads() -> list[Workload]:
    sgd = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    small = Config.from_dict({"batch": {"size": 64}, "optimizer": sgd})
    default = load(Path(__file__).parents[1] / "configs" / "digits.yaml", [])
    return [
        Workload("MLP with BatchNorm, 64 samples a step", small, mlp, steps=100),
        Workload(
            "configs/digits.yaml, 64 = 8 × 8 samples a step",
            default,
            lambda: small_cnn(10),
            steps=20,
        ),
    ]


def measure(
    workload: Workload,
    rounds: Rounds,
    others: Loops,
    *,
    threads: int,
    wandb: str = "disabled",
    terminal: bool = False,
) -> Seconds:
    """Seconds of a step of Lockstep and of `others`, one epoch of digits, repeated until they are enough."""
    data = digits().train
    assert isinstance(data, ImageArrays)
    ids = torch.arange(rounds.total_steps * workload.config.batch.size) % len(data)
    train, val = ImageArrays(*data.batch(ids)), ImageArrays(*data.batch(ids[:64]))
    tree = workload.config.to_dict()
    tree["train"] |= {"epochs": 1}
    tree["wandb"] |= {"mode": wandb}
    with TemporaryDirectory() as directory, redirect_stdout(Sink(terminal)):
        tree["run"] |= {"dir": directory, "figures": False}
        config = Config.from_dict(tree)
        trainer = InterleavedTrainer(
            config, model=workload.make_model(), train_data=train, val_data=val
        )
        # Accelerate sets them where there are several processes.
        torch.set_num_threads(threads)
        work = loops.Work(
            make_model=workload.make_model,
            data=train,
            batch_size=config.batch.size,
            micro_size=config.batch.micro_size or config.batch.size,
            sgd={"lr": config.optimizer.lr, **config.optimizer.args},
            ranks=trainer.ranks,
        )
        return trainer.fit_with(
            {name: loop(work) for name, loop in others.items()}, rounds
        )


class Sink(io.StringIO):
    """A stdout that nobody reads: a file's, or a terminal's, where the console draws its bar."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def compare(workload: Workload, rounds: Rounds, threads: int) -> list[Line]:
    """The table of a workload, Lockstep's lines and the loop by hand first."""
    if "WORLD_SIZE" in os.environ:
        seconds = measure(workload, rounds, {"raw DDP": loops.raw_ddp}, threads=threads)
        return [line_of(seconds, name, "raw DDP") for name in ("raw DDP", LOCKSTEP)]
    raw: Loops = {"raw": loops.raw}
    peers = {name: loop for name, loop, package in PEERS if find_spec(package)}
    seconds = measure(workload, rounds, {**raw, **peers}, threads=threads)
    lines = [line_of(seconds, name, "raw") for name in ("raw", LOCKSTEP)]
    for name, setting in VARIANTS.items():
        alone = measure(workload, rounds, raw, threads=threads, **setting)
        lines.append(line_of({name: alone[LOCKSTEP], "raw": alone["raw"]}, name, "raw"))
    return lines + [
        line_of(seconds, name, "raw") if name in peers else Line(name)
        for name, _, _ in PEERS
    ]


def line_of(seconds: Seconds, name: str, base: str) -> Line:
    return Line(
        name,
        1e6 * float(np.median(seconds[name], axis=0)[0]),
        quartiles(seconds, name, base),
    )


def table(lines: Sequence[Line], base: str = "raw") -> str:
    """Markdown that reads well as it is."""
    cells = [
        ("loop", "µs a step", f"× {base}", "half of the rounds", f"× {base}, CPU time"),
        ("---", *["--:"] * 4),
    ]
    for line in lines:
        if line.microseconds is None:
            cells.append((line.name, "not installed", "", "", ""))
        else:
            low, (wall, cpu), high = line.ratio
            ratios = f"{wall:.2f}", f"{low[0]:.2f} to {high[0]:.2f}", f"{cpu:.2f}"
            cells.append((line.name, f"{line.microseconds:.0f}", *ratios))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        f"| {first:<{widths[0]}} | {' | '.join(f'{c:>{w}}' for c, w in zip(rest, widths[1:], strict=True))} |"
        for first, *rest in cells
    )


def machine(threads: int) -> str:
    """What a reader must know of where the figures come from."""
    packages = [
        name for name in ("torch", "accelerate", "lightning") if find_spec(name)
    ]
    versions = ", ".join(
        [
            f"Python {platform.python_version()}",
            *(f"{name} {version(name)}" for name in packages),
        ]
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    processes = launcher.world_size()
    each = f"{processes} processes of {threads}" if processes > 1 else f"{threads}"
    return f"{date.today():%d %B %Y} · {device} · {each} thread{'s' * (threads > 1)} · {versions}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [
            line
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return (
        names[0].partition(":")[2].strip()
        if names
        else platform.processor() or platform.machine()
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="steps of a round, a multiple of log_every (default: 100, then 20)",
    )
    parser.add_argument(
        "--rounds", type=int, default=30, help="rounds of each loop (default: 30)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of the process (default: 1)"
    )
    parser.add_argument(
        "--save", type=Path, help="write the tables to this Markdown file too"
    )
    options = parser.parse_args(arguments)
    main_process = launcher.rank() == 0
    text = [f"# The time of a training step\n\n{machine(options.threads)}"]
    try:
        for workload in workloads():
            if workload.cuts < launcher.world_size():
                continue
            rounds = Rounds(options.rounds, options.steps or workload.steps)
            lines = compare(workload, rounds, options.threads)
            text.append(
                f"## {workload.name}\n\n{rounds.count} rounds of {rounds.steps} steps\n\n{table(lines)}"
            )
            if main_process:
                print(
                    "\n\n".join(text[-1:] if len(text) > 2 else text),
                    end="\n\n",
                    flush=True,
                )
    except Exception as error:
        return report_error(error)
    if options.save and main_process:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text("\n\n".join(text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
