"""Every YAML in configs/ runs: with its own data where that comes along, else with data of the same kind."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torchvision.io import write_jpeg

from tests.distributed.ranks import on_ranks
from trainer import Trainer
from trainer.config.load import load

ROOT = Path(__file__).parents[1]
YAMLS = [
    *sorted((ROOT / "configs").rglob("*.yaml")),
    *sorted((ROOT / "examples").rglob("*.yaml")),
]
CONFIGS = [path for path in YAMLS if path.parent.name != "sweeps"]
# Those of other tasks than classification of images.
FIGURES = {
    "regression": {"batch.png", "curves.png", "predictions.png", "regression.png"},
    "discs": {"batch.png", "curves.png"},
    "parabola": {"curves.png"},
    "detection": {"batch.png", "curves.png", "predictions.png"},
    "segmentation": {
        "batch.png",
        "confusion_matrix.png",
        "curves.png",
        "per_class.csv",
        "predictions.png",
    },
    "multi_label": {"batch.png", "curves.png", "predictions.png"},
    "waves": {"confusion_matrix.png", "curves.png", "per_class.csv"},
}
# What digits.yaml has, as every classification of images.
CLASSIFICATION = {
    "batch.png",
    "confusion_matrix.png",
    "curves.png",
    "per_class.csv",
    "predictions.png",
    "saliency.png",
}
# Other runs of the folder's model at its full size, which is most of a short run's time.
FURTHER_RESNETS = {"finetune", "extract"}
# Packages that a config needs and an installation may lack.
NEEDS = {
    "detection": "pycocotools",
    "timm": "timm",
    "transformers": "transformers",
}
SHORT = ["train.max_steps=2", "wandb.mode=disabled", "data.workers=0"]


def image_folder(root: Path) -> list[str]:
    draw = torch.Generator().manual_seed(0)
    for part, count in (("train", 5), ("val", 2)):
        for label in ("ants", "bees"):
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                image = torch.randint(256, (3, 60, 50), generator=draw).to(torch.uint8)
                write_jpeg(image, str(root / part / label / f"{i}.jpg"))
    return [f"data.root={root}", "batch.size=4", "batch.micro_size=2"]


def substitutes(path: Path, directory: Path) -> list[str]:
    """Overrides that replace data a config needs and the repository does not hold by data of the same shape."""
    config = load(path)
    overrides = []
    if config.data.name == "folder":
        overrides = image_folder(directory / "images")
        if config.model.weights:
            overrides.append("model.weights=null")
    if config.data.name in ("cifar10", "mnist"):
        overrides = [
            "data.name=fake",
            "data.root=null",
            "data.size=600",
            "data.val_size=40",
        ]
    if config.data.name == "cifar10":
        overrides += ["data.image_size=32"]
    if path.stem in FURTHER_RESNETS:
        overrides += ["run.proof=off"]
    if config.model.name == "resnet9":
        overrides += ["model.width=4"]
    if config.train.compile:
        overrides += ["train.compile=false"]  # compiling takes minutes on a CPU
    if config.data.name == "mnist":
        overrides += ["data.image_size=28", "data.channels=1"]
    return overrides


def save_without_pixels(figure: Figure, path: Path, **_: Any) -> None:
    path.touch()


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_it_runs(tmp_path: Path, path: Path) -> None:
    if path.stem in NEEDS and find_spec(NEEDS[path.stem]) is None:
        pytest.skip(f"{NEEDS[path.stem]} is not installed")

    figures = FIGURES.get(path.stem, CLASSIFICATION)

    def run() -> str:
        if figures == CLASSIFICATION and path.stem != "digits":
            # Pixels take longer than the run, and digits.yaml's are drawn. This process is the test's own.
            Figure.savefig = save_without_pixels
        config = load(
            path, [f"run.dir={tmp_path}", *SHORT, *substitutes(path, tmp_path)]
        )
        Trainer(config).fit()
        return config.run.name

    directory = tmp_path / on_ranks(1, run)[0]
    assert json.loads((directory / "summary.json").read_text())["steps"] == 2
    assert {file.name for file in (directory / "figures").iterdir()} == figures


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_its_header_says_how_to_run_it_and_what_to_expect(path: Path) -> None:
    header = path.read_text().split("\nrun:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert "python train.py" in header
    assert re.search(r"accuracy of|val/|validation", header)
    assert "minute" in header or "second" in header


def test_the_default_config_learns(tmp_path: Path) -> None:
    """configs/digits.yaml to its end: the README's figure."""

    def run() -> float:
        overrides = [f"run.dir={tmp_path}", "wandb.mode=disabled", "run.figures=false"]
        config = load(Path("configs/digits.yaml"), overrides)
        return float(Trainer(config).fit()["best"])

    assert on_ranks(1, run)[0] >= 0.98


def test_mixing_an_average_and_an_early_end_together_are_the_same_bits(
    tmp_path: Path,
) -> None:
    """One process, against one that is stopped and two that go on to the same early end."""

    def run(directory: str, *more: str) -> dict[str, Any]:
        bitwise = ["run.reproducibility=bitwise", f"run.dir={tmp_path / directory}"]
        quiet = ["wandb.mode=disabled", "run.figures=false", "train.epochs=6"]
        path = ROOT / "configs" / "tasks" / "mix_ema.yaml"
        overrides = [*bitwise, *quiet, "early_stop.patience=1", *more]
        summary = dict(Trainer(load(path, overrides)).fit())
        hashes = [name for name in summary if name.endswith("_sha256")]
        kept = [*hashes, "steps", "best", "stopped_by"]
        return {name: summary.get(name) for name in kept}

    (whole,) = on_ranks(1, run, "one")
    assert "early_stop" in whole["stopped_by"] and whole["ema_sha256"]
    # Steps are 23 an epoch: it stops within the third.
    on_ranks(1, run, "other", "train.stop_after=60")
    assert on_ranks(2, run, "other", "run.resume=auto") == [whole, whole]
