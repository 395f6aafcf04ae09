"""Batches from `data.cache=decoded`: images a second of one core, beside the tutorials' loader and decoding anew.

python -m benchmarks.input_cache                        500- and 2000-pixel files, about a minute
python -m benchmarks.input_cache --save docs/results/input_cache.md
python -m benchmarks.input_cache --photos ROOT          the photographs of a folder, ROOT/train/<class>/*.jpg
python -m benchmarks.input_cache --quick                fewer files and rounds, half a minute

Files, turns and clock are those of `benchmarks.input`. The cache lies in the page cache, as it does from the second
epoch on if the machine has the memory; making it is measured by itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision import transforms as v1

from benchmarks.input import (
    CROP,
    MEAN,
    SHORT_SIDE,
    SIZES,
    STD,
    TRANSFORMS,
    TUTORIAL,
    Way,
    make_files,
    table,
    take_turns,
    tutorial,
)
from benchmarks.page import page_parser, write_page
from trainer.config.data_section import DataConfig
from trainer.core.decoded_images import with_decoded_images
from trainer.data.batches import Request
from trainer.data.datasets import build_datasets
from trainer.data.loading import build_loader
from trainer.process.memory import keep_freed_memory
from trainer.process.ranks import Ranks

BATCH = 8
VALIDATION: list[dict[str, Any]] = [
    {"name": "Resize", "size": SHORT_SIDE},
    {"name": "CenterCrop", "size": CROP},
]


def tutorial_validation(root: Path) -> Way:
    transform = v1.Compose(
        [
            v1.Resize(SHORT_SIDE),
            v1.CenterCrop(CROP),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
        ]
    )
    folder = datasets.ImageFolder(str(root / "train"), transform)
    loader = DataLoader(folder, batch_size=BATCH)

    def run() -> None:
        for _ in loader:
            pass

    return run


def lockstep(
    root: Path,
    transforms: list[dict[str, Any]],
    ranks: Ranks,
    *,
    is_for_gpu: bool = False,
    **keys: Any,
) -> Way:
    """Every image once in each call, in another epoch. A cache is made, if there is to be one, before it returns."""
    section = DataConfig(
        name="folder", root=str(root), mean=MEAN, std=STD, val_fraction=0.01, **keys
    )
    data = with_decoded_images(
        section, ranks, build_datasets(section, ranks.main_first)
    )
    place: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    loader = build_loader(section, data.train, "train", transforms, seed=0, **place)
    epoch = 0

    def run() -> None:
        nonlocal epoch
        epoch += 1
        ids = np.arange(len(data.train))
        firsts = range(0, len(ids), BATCH)
        batches = [ids[first : first + BATCH] for first in firsts]
        requests = [Request(index, epoch, own) for index, own in enumerate(batches)]
        for _ in loader.load(requests) if is_for_gpu else loader.run(requests):
            pass

    return run


def ways(
    root: Path,
    cache_dir: Path,
    transforms: list[dict[str, Any]],
    ranks: Ranks,
    first: Way,
) -> dict[str, Way]:
    """The ways from files to batches, by name; the tutorials' is the first."""
    cache: dict[str, Any] = {"cache": "decoded", "cache_dir": str(cache_dir)}

    def way(**keys: Any) -> Way:
        return lockstep(root, transforms, ranks, **keys)

    return {
        TUTORIAL: first,
        "Lockstep, every image decoded": way(),
        f"the same, data.short_side={SHORT_SIDE}": way(short_side=SHORT_SIDE),
        f"data.cache=decoded, data.short_side={SHORT_SIDE}": way(
            short_side=SHORT_SIDE, **cache
        ),
        "the same, as bytes for a GPU, which normalises them": way(
            short_side=SHORT_SIDE, is_for_gpu=True, **cache
        ),
        "data.cache=decoded, data.short_side=full": way(short_side="full", **cache),
    }


def measure(root: Path, cache_dir: Path, title: str, rounds: int, ranks: Ranks) -> str:
    """The tables of the JPEG files in `root/train`."""
    count = len(list((root / "train").rglob("*.jpg")))
    keys: dict[str, Any] = {"cache": "decoded", "short_side": SHORT_SIDE}
    began = process_time()
    lockstep(root, [], ranks, cache_dir=str(cache_dir), **keys)
    seconds = (process_time() - began) / count
    size = sum(path.stat().st_size for path in cache_dir.rglob("*.bin")) / count
    lines = [
        f"## {count} {title}",
        f"Making the cache takes {1e3 * seconds:.1f} ms of one core an image; it holds {size / 1000:,.0f} kB of each.",
    ]
    for kind, transforms, first in (
        ("Training: random resized crop, flip", TRANSFORMS, tutorial(root)),
        ("Validation: resize, centre crop", VALIDATION, tutorial_validation(root)),
    ):
        of_kind = ways(root, cache_dir, transforms, ranks, first)
        lines.append(f"**{kind}, normalised, in batches of {BATCH}**")
        lines.append(table(take_turns(of_kind, count, rounds)))
    return "\n\n".join(lines)


def sections(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The tables of each kind of files."""
    ranks = Ranks("fp32")
    rounds = 3 if options.quick else options.rounds
    if options.photos:
        yield measure(options.photos, folder / "cache", "photographs", rounds, ranks)
        return
    for side, count in SIZES.items():
        root = folder / f"{side}"
        make_files(root, side, count // 4 if options.quick else count)
        title = f"JPEG files of {side} × {side * 3 // 4} pixels"
        yield measure(root, folder / f"cache_{side}", title, rounds, ranks)


def main(arguments: Sequence[str]) -> int:
    parser = page_parser(
        "input_cache", __doc__, rounds=9, quick="fewer files and rounds"
    )
    parser.add_argument(
        "--photos", type=Path, help="a folder with train/<class>/*.jpg, instead"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory("cpu")  # as `train.py` does
    with TemporaryDirectory() as folder:
        found = sections(options, Path(folder))
        return write_page("From decoded images to batches", found, options.save)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
