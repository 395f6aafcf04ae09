"""From image files to normalised batches: images a second of one core, Lockstep's ways beside the tutorials'.

python -m benchmarks.input                              500- and 2000-pixel files, about three minutes
python -m benchmarks.input --save docs/results/input.md
python -m benchmarks.input --quick                      fewer files and rounds, half a minute

The files are made by Pillow: noise of every scale, as in photographs, at quality 90. All ways take turns on one thread,
a round each, and what is counted is the processor's time, which other programs of the machine change little.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision import transforms as v1

from benchmarks.page import page_parser, write_page
from trainer.config.data_section import DataConfig
from trainer.data import decoders, decoding
from trainer.data.batches import Request
from trainer.data.datasets import build_datasets
from trainer.data.loading import build_loader

SIZES = {500: 24, 2000: 8}  # files by their longer side
KINDS = ("JPEG", "PNG", "WEBP", "AVIF")
CROP, SHORT_SIDE = 224, 256
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TRANSFORMS: list[dict[str, Any]] = [
    {"name": "RandomResizedCrop", "size": CROP},
    {"name": "RandomHorizontalFlip"},
]
TUTORIAL = "the tutorials' loader: PIL images, ImageFolder, DataLoader"
Way = Callable[[], None]  # handles each file once


@dataclass(frozen=True)
class Figure:
    """Seconds of the processor for an image: the median of the rounds, and of the quotients to the first way."""

    way: str
    seconds: float
    quotient: float

    @property
    def row(self) -> str:
        rate = 1 / self.seconds
        return f"| {self.way} | {1e3 * self.seconds:.2f} | {rate:,.0f} | {1 / self.quotient:.2f} |"


def make_files(root: Path, side: int, count: int, kind: str = "JPEG") -> None:
    """`count` images of `side` × 3/4 `side` pixels in two classes."""
    draws = np.random.default_rng(side)
    size = side, side * 3 // 4
    for index in range(count):
        folder = root / "train" / f"class_{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((size[1], size[0], 3), np.float32)
        scale = 4
        while scale < side:
            noise = draws.integers(0, 256, (scale * 3 // 4, scale, 3), dtype=np.uint8)
            octave = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
            pixels += (np.asarray(octave, np.float32) - 128) * 2 / scale**0.5
            scale *= 2
        image = Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))
        path = folder / f"{index:03}.{kind.lower().replace('jpeg', 'jpg')}"
        image.save(path, kind, quality=90)


def tutorial(root: Path) -> Way:
    transform = v1.Compose(
        [
            v1.RandomResizedCrop(CROP),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
        ]
    )
    folder = datasets.ImageFolder(str(root / "train"), transform)
    loader = DataLoader(folder, batch_size=8)

    def run() -> None:
        for _ in loader:
            pass

    return run


def lockstep(root: Path, **keys: Any) -> Way:
    """Every image once in each call, in another epoch, so that it is cropped anew."""
    section = DataConfig(
        name="folder",
        root=str(root),
        train_transforms=TRANSFORMS,
        mean=MEAN,
        std=STD,
        val_fraction=0.01,
        **keys,
    )
    images = build_datasets(section, _refuse_downloads).train
    loader = build_loader(
        section,
        images,
        "train",
        section.train_transforms,
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    epoch = 0

    def run() -> None:
        nonlocal epoch
        epoch += 1
        ids = np.arange(len(images))
        requests = [
            Request(index, epoch, ids[first : first + 8])
            for index, first in enumerate(range(0, len(ids), 8))
        ]
        for _ in loader.run(requests):
            pass

    return run


def _refuse_downloads() -> Any:
    raise AssertionError("a folder of images is not downloaded")


def loaders(root: Path) -> dict[str, Way]:
    """The ways from files to batches, by name. The first is what the others are compared with."""
    return {
        TUTORIAL: tutorial(root),
        "Lockstep": lockstep(root),
        f"Lockstep, data.decode_short_side={SHORT_SIDE}": lockstep(
            root, decode_short_side=SHORT_SIDE
        ),
        "Lockstep, data.cache=8 (all in memory)": lockstep(root, cache=8.0),
    }


def decoders_of(paths: Sequence[Path], kind: str) -> dict[str, Way]:
    """Decoding alone: by Pillow as a tutorial has it, and as Lockstep does by each library that is there."""

    def by_pillow() -> None:
        for path in paths:
            with Image.open(path) as image:
                image.convert("RGB")

    def by_lockstep() -> None:
        for path in paths:
            decoding.decode(path)

    def smaller() -> None:
        for path in paths:
            decoding.decode(path, short_side=SHORT_SIDE)

    ways: dict[str, Way] = {"Image.open(…).convert('RGB'), no tensor": by_pillow}
    for library in ("torchcodec", "torchvision", "pillow"):
        if is_there(library):
            ways[f"Lockstep, by {library}"] = with_library(library, by_lockstep)
    if kind == "JPEG":
        ways[f"Lockstep, data.decode_short_side={SHORT_SIDE}"] = smaller
    return ways


def is_there(library: str) -> bool:
    if library == "torchcodec":
        return decoders._torchcodec() is not None
    return library == "pillow" or decoders._torchvision() is not None


def with_library(library: str, way: Way) -> Way:
    """`way` with `library` as the best that is there."""

    def run() -> None:
        with ExitStack() as changes:
            if library != "torchcodec":
                changes.enter_context(
                    patch.object(decoders, "_torchcodec", lambda: None)
                )
            if library == "pillow":
                changes.enter_context(
                    patch.object(decoders, "_torchvision", lambda: None)
                )
            decoders.decoder.cache_clear()
            way()
        decoders.decoder.cache_clear()

    return run


def take_turns(ways: Mapping[str, Way], images: int, rounds: int) -> list[Figure]:
    """Each way's figures over `rounds` rounds, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        # Each comes before and after its neighbours.
        for name in list(ways)[:: -1 if number % 2 else 1]:
            began = process_time()
            ways[name]()
            if number:
                seconds[name].append((process_time() - began) / images)
    first = np.array(next(iter(seconds.values())))
    return [
        Figure(name, float(np.median(times)), float(np.median(np.array(times) / first)))
        for name, times in seconds.items()
    ]


def table(figures: Sequence[Figure]) -> str:
    head = "| way | ms of one core | images/s of a core | × |\n|---|--:|--:|--:|"
    return "\n".join([head, *(figure.row for figure in figures)])


def measure(folder: Path, side: int, count: int, rounds: int) -> list[str]:
    """The tables of files whose longer side has `side` pixels."""
    root = folder / f"{side}"
    make_files(root, side, count)
    paths = sorted(root.rglob("*.jpg"))
    size = sum(path.stat().st_size for path in paths) // count // 1000
    title = f"{count} JPEG files of {side} × {side * 3 // 4} pixels, {size} kB each"
    sections = [
        f"## To batches of {CROP} pixels, cropped, flipped and normalised: {title}\n\n"
        f"{table(take_turns(loaders(root), count, rounds))}",
        f"## Decoding alone: {title}\n\n{table(take_turns(decoders_of(paths, 'JPEG'), count, rounds))}",
    ]
    if side == min(SIZES):
        for kind in KINDS[1:]:
            make_files(folder / kind, side, count, kind)
            paths = sorted((folder / kind).rglob("*.*"))
            figures = take_turns(decoders_of(paths, kind), count, rounds)
            sections.append(
                f"## Decoding {kind} files of {side} pixels\n\n{table(figures)}"
            )
    return sections


def sections(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Those of each size of files."""
    rounds = 3 if options.quick else options.rounds
    for side, count in SIZES.items():
        yield from measure(folder, side, count // 4 if options.quick else count, rounds)


def main(arguments: Sequence[str]) -> int:
    parser = page_parser("input", __doc__, rounds=9, quick="fewer files and rounds")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        found = sections(options, Path(folder))
        return write_page("From image files to batches", found, options.save)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
