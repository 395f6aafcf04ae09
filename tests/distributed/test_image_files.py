"""Image files that are decoded in the course of a run: the same run on any number of processes, with any workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.distributed.ranks import on_ranks
from tests.distributed.small import HASHES, config, header_of
from trainer import Config, Predictor, Trainer
from trainer.data.batches import MicroBatch
from trainer.errors import ConfigError

IMAGES = 12  # of each class
TRANSFORMS = [
    {"name": "RandomResizedCrop", "size": 12},
    {"name": "RandomHorizontalFlip"},
]


def make_images(root: Path) -> None:
    draws = np.random.default_rng(0)
    for part, count in (("train", IMAGES), ("val", 4)):
        for level, name in enumerate(("dark", "light")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = draws.integers(0, 128, (50 + index, 64, 3)) + 100 * level
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(folder / f"{index:02}.jpg", quality=80)


def settings(root: Path, name: str, **changes: Any) -> Config:
    keys = {
        "run__name": name,
        "run__reproducibility": "bitwise",
        "run__resume": "auto",
        "run__proof": "off",
        "data__name": "folder",
        "data__root": str(root / "images"),
        "data__decode_short_side": 16,
        "data__train_transforms": TRANSFORMS,
        "data__val_transforms": [{"name": "Resize", "size": [12, 12]}],
        "batch__size": 8,
        "batch__micro_size": 3,
        "train__epochs": 2,
    }
    return config(root / "runs", **(keys | changes))


def fit(root: Path, name: str, **changes: Any) -> dict[str, Any]:
    Trainer(settings(root, name, **changes)).fit()
    summary = json.loads((root / "runs" / name / "summary.json").read_text())
    return {key: summary[key] for key in HASHES}


def test_files_decoded_smaller_give_one_run_on_any_processes_and_workers(
    tmp_path: Path,
) -> None:
    make_images(tmp_path / "images")
    [alone] = on_ranks(1, fit, tmp_path, "alone")
    on_ranks(2, fit, tmp_path, "cut", data__workers=1, train__stop_after=2)
    resumed = on_ranks(2, fit, tmp_path, "cut", data__workers=1)
    assert resumed == [alone, alone]
    [in_full] = on_ranks(1, fit, tmp_path, "full", data__decode_short_side=None)
    assert in_full["weights_sha256"] != alone["weights_sha256"]

    # The header says so, and what predicts reads files as the run did.
    trainer = Trainer(settings(tmp_path, "another"))
    line = header_of(trainer, tmp_path)["decoding"]
    assert "no shorter side below 16 pixels" in line
    loader = trainer.run.evaluation_sets[0].loader
    file = tmp_path / "images/val/light/03.jpg"
    [[item]] = Predictor(tmp_path / "runs/alone")._load_files([file])
    assert isinstance(item, MicroBatch)
    assert torch.equal(item.inputs, loader.fetch([7]).inputs)


@pytest.mark.parametrize(
    ("transforms", "place"),
    [
        (
            [{"name": "ToDtype"}, {"name": "CenterCrop", "size": [8, 17]}],
            "[1]",
        ),
        (
            [{"name": "RandomApply", "transforms": [{"name": "Resize", "size": 17}]}],
            "[0].transforms[0]",
        ),
    ],
)
def test_images_are_not_made_smaller_than_the_transforms_give_them_on(
    tmp_path: Path, transforms: list[dict[str, Any]], place: str
) -> None:
    make_images(tmp_path / "images")
    with pytest.raises(ConfigError) as caught:
        Trainer(settings(tmp_path, "a", data__train_transforms=transforms))
    assert str(caught.value).startswith(
        f"data.decode_short_side: 16 is less than the 17 pixels of data.train_transforms{place}.size"
    )
