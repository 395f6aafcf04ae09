"""Augmented images a second on one core: whole micro-batches, against sample by sample.

python -m benchmarks.batch_transforms                           about a minute
python -m benchmarks.batch_transforms --save docs/results/batch_transforms.md

Both ways are the run's own loaders, from a set in memory to the micro-batch before it is normalised, and take turns.
Seconds are those of the process's CPU time. Reported are medians, and the median of the rounds' ratios.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from time import process_time
from typing import Any

import numpy as np
import torch

from benchmarks.page import page_parser, write_page
from benchmarks.subjects import noise
from trainer.config.data_section import DataConfig
from trainer.data.batches import Request
from trainer.data.loading import Loader, build_loader
from trainer.process.memory import keep_freed_memory

SEED = 0
SAMPLES = 4096


@dataclass(frozen=True)
class Subject:
    """Transforms of images of a size, and how many micro-batches of `batch` samples a round has."""

    transforms: list[dict[str, Any]]
    side: int
    batch: int
    batches: int

    @property
    def name(self) -> str:
        return ", ".join(item["name"] for item in self.transforms)


CROP = {"name": "RandomCrop", "size": 32, "padding": 4}
FLIP = {"name": "RandomHorizontalFlip"}
COLOR = {"name": "ColorJitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
SUBJECTS = (
    Subject([CROP, FLIP], 32, 64, 8),
    Subject([CROP, FLIP], 32, 512, 1),
    Subject([{"name": "RandomResizedCrop", "size": 32}], 32, 64, 4),
    Subject([COLOR], 32, 64, 4),
    Subject([{"name": "RandomErasing"}], 32, 64, 4),
    Subject([{"name": "RandomResizedCrop", "size": 224}, FLIP], 256, 16, 1),
)


def loader(subject: Subject, *, whole: bool) -> Loader:
    """A loader of made-up images: its transforms see whole micro-batches, or each sample by itself."""
    data = noise(SAMPLES if subject.side < 100 else 64, subject.side)
    section = DataConfig(
        on_device=whole,
        batch_transforms=subject.transforms if whole else [],
        train_transforms=[] if whole else subject.transforms,
    )
    return build_loader(
        section,
        data,
        "train",
        section.train_transforms,
        seed=SEED,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def requests(subject: Subject, samples: int) -> Iterator[Request]:
    """Micro-batches without an end, as a run asks for them."""
    draws = np.random.default_rng(SEED)
    for epoch in count():
        order = draws.permutation(samples)
        for first in range(0, samples - subject.batch + 1, subject.batch):
            yield Request(0, epoch, order[first : first + subject.batch])


def measure(subject: Subject, rounds: int) -> np.ndarray[Any, Any]:
    """CPU seconds of a round: `(rounds, 2)`, sample by sample and whole."""
    ways: list[Iterator[Any]] = []
    for whole in (False, True):
        each = loader(subject, whole=whole)
        batches: Iterator[Any] = each.load(requests(subject, len(each.dataset.dataset)))
        ways.append(map(each.transform_batch, batches) if whole else batches)
    seconds = np.zeros((rounds + 1, len(ways)))
    for number in range(rounds + 1):
        for index, way in enumerate(ways):
            began = process_time()
            for _ in islice(way, subject.batches):
                pass
            seconds[number, index] = process_time() - began
    return seconds[1:]  # the first warms up


def row(subject: Subject, seconds: np.ndarray[Any, Any]) -> str:
    """A line of the table."""
    images = subject.batch * subject.batches
    single, whole = images / np.median(seconds, axis=0)
    low, ratio, high = np.percentile(seconds[:, 0] / seconds[:, 1], [25, 50, 75])
    size = f"{subject.batch} × {subject.side}²"
    figures = f"{single:,.0f} | {whole:,.0f} | {ratio:.1f} | {low:.1f} to {high:.1f}"
    return f"| {subject.name} | {size} | {figures} |"


def sections(rounds: int) -> Iterator[str]:
    """The table, a row of each subject."""
    rows = [
        "| transforms | micro-batch | sample by sample | whole | × | half of the rounds |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for subject in SUBJECTS:
        rows.append(row(subject, measure(subject, rounds)))
    yield "\n".join(rows)


def main(arguments: Sequence[str]) -> int:
    parser = page_parser("batch_transforms", __doc__, rounds=15, quick="three rounds")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory("cpu")  # as `train.py` does
    found = sections(3 if options.quick else options.rounds)
    return write_page("Augmented images a second on one core", found, options.save)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
