"""What a checkpoint costs: how long training stops for one, and how long it takes to read one.

python -m benchmarks.checkpoint                     25 million parameters with Adam, some minutes on the CPU
python -m benchmarks.checkpoint --quick             5 million, and fewer rounds
python -m benchmarks.checkpoint --save docs/results/checkpoint.md

One run saves in each of several ways, in turn: `Trainer.save`, which writes in the background; the same, with training
waiting until the files are complete; and `torch.save` of the two `state_dict()`s, as scripts do, which does not wait
for the disk, or does. All files go to the same disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time

import torch
from torch import nn

from benchmarks.page import page_parser, write_page
from benchmarks.step_time import Sink
from benchmarks.subjects import patterns, settings
from trainer import Trainer
from trainer.exact.plan import Step
from trainer.storage import checkpoint
from trainer.storage.files import sync

WIDTH, LAYERS, FEW_LAYERS = 1000, 25, 5
STEPS = 16  # from one save to the next
STEPS_AFTER = 10  # of these, the ones that a writer in the background may slow down
READS = 3


def net(layers: int = LAYERS) -> nn.Module:
    """`layers` linear ones of a million parameters each, `(N, 1, 8, 8)` → `(N, 10)`."""
    inner = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, WIDTH), *inner, nn.Linear(WIDTH, 10)
    )


@dataclass
class Figures:
    """Of one way of saving, in milliseconds: one of each a round."""

    stops: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # of all threads, in a stop
    steps_after: list[float] = field(default_factory=list)  # all of them together


class Saves(Trainer):
    """A `Trainer` that saves in another way each time. The first round warms up and does not count."""

    def measure_saves(self, file: Path) -> tuple[dict[str, Figures], float]:
        """Train; the figures of each way, and the milliseconds of a step while nothing is written."""
        self._file = file
        self._ways: dict[str, Callable[[], None]] = {
            "`Trainer.save`": super().save,
            "the same, waiting for the files": self._save_and_wait,
            "`torch.save`": self._torch_save,
            "`torch.save`, waiting for the disk": self._torch_save_and_sync,
        }
        self._figures = {name: Figures() for name in self._ways}
        self._saves = 0
        self._step_times: list[float] = []
        self._quiet: list[float] = []
        self._began = perf_counter()
        self.fit()
        for figures in self._figures.values():
            for values in (figures.stops, figures.cpu, figures.steps_after):
                del values[0]
        return self._figures, statistics.median(self._quiet)

    def train_step(self, step: Step) -> None:
        self._note_time()
        super().train_step(step)

    def _note_time(self) -> None:
        now = perf_counter()
        self._step_times.append(1e3 * (now - self._began))
        self._began = now

    def save(self) -> None:
        names = list(self._ways)
        if self._saves:
            before = self._figures[names[(self._saves - 1) % len(names)]]
            before.steps_after.append(sum(self._step_times[1 : 1 + STEPS_AFTER]))
            self._quiet += self._step_times[1 + STEPS_AFTER :]
        self.finish_saving()
        name = names[self._saves % len(names)]
        began, cpu = perf_counter(), process_time()
        self._ways[name]()
        self._figures[name].stops.append(1e3 * (perf_counter() - began))
        self._figures[name].cpu.append(1e3 * (process_time() - cpu))
        self._saves += 1
        self._step_times = []
        self._began = perf_counter()

    def _save_and_wait(self) -> None:
        super().save()
        self.finish_saving()

    def _torch_save(self) -> None:
        state = {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, self._file)

    def _torch_save_and_sync(self) -> None:
        self._torch_save()
        sync(self._file)


def read_times(directory: Path, file: Path) -> dict[str, list[float]]:
    """Milliseconds to read what was written, in turn."""
    newest = checkpoint.latest(directory)
    assert newest is not None
    ways: dict[str, Callable[[], object]] = {
        "a checkpoint, its SHA-256 compared": lambda: checkpoint.load(newest),
        "`torch.load`": lambda: torch.load(file),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(READS + 1):
        for name, read in ways.items():
            began = perf_counter()
            read()
            seconds[name].append(1e3 * (perf_counter() - began))
    return {name: times[1:] for name, times in seconds.items()}


def measure(rounds: int, threads: int, layers: int = LAYERS) -> str:
    """The tables, as Markdown."""
    saves = 4 * (rounds + 1) + 1  # the last one is not counted
    with TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        directory = Path(name)
        config = settings(
            directory,
            run__name="run",
            run__proof="off",
            batch__size=8,
            batch__fuse=1,
            optimizer={},
            train__checkpoint_every=STEPS,
            train__keep_checkpoints=1,
            train__log_every=10**6,
        )
        tree = config.to_dict()
        tree["optimizer"] = {"name": "adam", "lr": 1e-6}
        with redirect_stdout(Sink(False)):
            trainer = Saves(
                type(config).from_dict(tree),
                model=net(layers),
                train_data=patterns(8 * saves * STEPS),
            )
            torch.set_num_threads(threads)
            file = directory / "state.pt"
            figures, quiet = trainer.measure_saves(file)
        reads = read_times(directory / "run" / "checkpoints", file)
        size = sum(
            path.stat().st_size for path in (directory / "run").rglob("step_*/*")
        )
    return _tables(figures, quiet, reads, size)


def _tables(
    figures: dict[str, Figures],
    quiet: float,
    reads: dict[str, list[float]],
    size: int,
) -> str:
    lines = [
        f"A checkpoint of {size / 1e6:.0f} MB; a step takes {quiet:.0f} ms.",
        "",
        "| a save by | training stops, ms | CPU time in the stop, ms | "
        f"the {STEPS_AFTER} steps after it take longer by, ms |",
        "| --- | --: | --: | --: |",
    ]
    for name, of_way in figures.items():
        slower = [total - STEPS_AFTER * quiet for total in of_way.steps_after]
        cells = (_range(of_way.stops), _range(of_way.cpu), _range(slower))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| reading | ms |", "| --- | --: |"]
    for name, times in reads.items():
        lines.append(f"| {name} | {_range(times)} |")
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    """The median, and the smallest and the largest."""
    middle = statistics.median(values)
    return f"{middle:.0f} ({min(values):.0f} to {max(values):.0f})"


def sections(options: argparse.Namespace) -> Iterator[str]:
    rounds = 2 if options.quick else options.rounds
    yield f"{rounds} rounds, in turn: medians, smallest and largest."
    layers = FEW_LAYERS if options.quick else LAYERS
    yield measure(rounds, options.threads, layers)


def main(arguments: Sequence[str]) -> int:
    parser = page_parser(
        "checkpoint", __doc__, rounds=7, quick="2 rounds, and a smaller net"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of the process (default: 1)"
    )
    options = parser.parse_args(arguments)
    found = sections(options)
    return write_page("Checkpoints", found, options.save, threads=options.threads)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
