"""Runs on `data.cache=decoded`: the bits of runs that decode each image again, whoever made the cache, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.distributed.ranks import on_ranks
from tests.distributed.small import HASHES
from tests.programs import run_program
from trainer import Config, Trainer
from trainer.inspection.replay import replay

RESULTS = (*HASHES, "best", "samples_seen")
IMAGES = 14  # of each class and part


def make_images(root: Path) -> None:
    draws = np.random.default_rng(0)
    for part in ("train", "val"):
        for index in range(2 * IMAGES):
            folder = root / part / ("daisy", "tulip")[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            height, width = draws.integers(10, 40, 2)
            pixels = draws.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:02}.jpg")


def config(root: Path, runs: Path, name: str, **data: Any) -> Config:
    crop = {"name": "RandomResizedCrop", "size": 14}
    resize = [{"name": "Resize", "size": 18}, {"name": "CenterCrop", "size": 14}]
    return Config.from_dict(
        {
            "run": {
                "dir": str(runs),
                "name": name,
                "reproducibility": "bitwise",
                "figures": False,
                "proof": "off",
                "resume": "auto",
            },
            "data": {
                "name": "folder",
                "root": str(root),
                "train_transforms": [crop, {"name": "RandomHorizontalFlip"}],
                "val_transforms": resize,
                **data,
            },
            "batch": {"size": 12, "micro_size": 4},
            "train": {"epochs": 2, "log_every": 1, "checkpoint_every": 3},
            "wandb": {"mode": "disabled"},
        }
    )


def fit(*args: Any, stop_after: int | None = None, **data: Any) -> None:
    tree = config(*args, **data).to_dict()
    tree["train"]["stop_after"] = stop_after
    Trainer(Config.from_dict(tree)).fit()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_images(tmp_path / "images")
    return tmp_path / "images"


def test_a_run_is_the_same_with_a_cache_and_without(root: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    cache: dict[str, Any] = {"cache": "decoded"}
    here, there = tmp_path / "cache", tmp_path / "another"
    # Of 16 images and two of 16 pixels short: what the transforms need, 16 and 18.
    on_ranks(1, fit, root, runs, "plain", short_side=18)
    on_ranks(3, fit, root, runs, "three", cache_dir=str(here), **cache)
    on_ranks(1, fit, root, runs, "alone", cache_dir=str(here), workers=1, **cache)
    # Begun with a cache that two ranks make, and resumed without one, on one.
    on_ranks(2, fit, root, runs, "part", stop_after=4, cache_dir=str(there), **cache)
    on_ranks(1, fit, root, runs, "part", short_side=18)
    summaries = {}
    for name in ("plain", "three", "alone", "part"):
        summary = json.loads((runs / name / "summary.json").read_text())
        summaries[name] = {key: summary[key] for key in RESULTS}
    for name, summary in summaries.items():
        assert summary == summaries["plain"], name
    # The files of a cache do not tell who made it.
    made, other = ({p.name: p for p in c.glob("*/*.bin")} for c in (here, there))
    assert made.keys() == other.keys() and len(made) == 4
    for name, path in made.items():
        assert path.read_bytes() == other[name].read_bytes()
    again = Trainer(config(root, runs, "again", cache_dir=str(here), **cache))
    result = replay(lambda: again, runs / "three", 4)
    assert result.digests and all(was == now for was, now in result.digests.values())


def test_commands_read_the_cache(root: Path, tmp_path: Path) -> None:
    """A run of a script, then what is asked of it: `evaluate` and `predict` see what the run has seen."""
    settings = config(
        root, tmp_path, "run", cache="decoded", cache_dir=str(tmp_path / "cache")
    )
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings.to_dict()))  # JSON is YAML
    fitted = run_program(["train.py", path, "run.resume=never"])
    assert fitted.returncode == 0, fitted.stderr
    assert "56 images are decoded into" in fitted.stderr
    assert "short side 18 (data.short_side) · decoded in" in fitted.stdout
    evaluated = run_program(["-m", "trainer", "evaluate", tmp_path / "run"])
    assert evaluated.returncode == 0, evaluated.stderr
    assert "decoded into" not in evaluated.stderr
    assert "differ" not in evaluated.stdout, evaluated.stdout
    predicted = run_program(
        ["-m", "trainer", "predict", tmp_path / "run", root / "val" / "daisy"]
    )
    assert predicted.returncode == 0, predicted.stderr
    with pytest.raises(AssertionError, match=r"data.short_side was 18 and is 20"):
        on_ranks(1, fit, root, tmp_path, "run", short_side=20)
