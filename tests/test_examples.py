"""The project of one's own, by its import paths, with a config and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from examples.bring_your_own.task import Segmentation
from tests.distributed.ranks import on_ranks
from tests.distributed.small import largest_difference, state
from tests.programs import run_program
from trainer import Task, Trainer
from trainer.components.task import build_task
from trainer.config.load import load
from trainer.config.schema import LossConfig

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples" / "bring_your_own" / "discs.yaml"


def discs(directory: Path, *more: str) -> tuple[float, Any]:
    overrides = ["wandb.mode=disabled", "run.figures=false", f"run.dir={directory}", *more]
    trainer = Trainer(load(CONFIG, overrides))
    return float(trainer.fit()["best"]), state(trainer)


def test_the_project_learns(tmp_path: Path) -> None:
    assert on_ranks(1, discs, tmp_path, "train.epochs=3", "data.samples=400", "model.width=8")[0][0] > 0.5


def test_the_project_is_the_same_run_on_two_processes(tmp_path: Path) -> None:
    """Its loss divides by a weight of its own and its metric by a union, each over all processes."""
    short = ["train.max_steps=4", "data.samples=80", "train.precision=fp64"]
    ((best, weights),) = on_ranks(1, discs, tmp_path / "one", *short)
    for other_best, other_weights in on_ranks(2, discs, tmp_path / "two", *short):
        assert other_best == pytest.approx(best, rel=1e-9)
        assert largest_difference(other_weights, weights) < 1e-9


def test_its_loss_and_metric_by_hand() -> None:
    output = torch.tensor([[2.0, -1.0, 0.5, -3.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    total, weight = Segmentation(disc_weight=3.0).loss_sum(output, targets)
    losses = nn.BCEWithLogitsLoss(reduction="none")(output, targets)[0]
    assert float(total / weight) == pytest.approx(float(3 * losses[:2].sum() + losses[2:].sum()) / 8, rel=1e-12)
    intersection, union = Segmentation().metric_sums(output, targets)["iou"]
    assert (int(intersection), int(union)) == (1, 3)


class Bare(Task):
    """A task without a constructor, which is what most need."""


def test_a_task_needs_no_constructor() -> None:
    assert isinstance(build_task(LossConfig(name=f"{__name__}.Bare"), 10), Bare)


def test_python_use_in_ten_lines(tmp_path: Path) -> None:
    """Run in another directory, as a project that installed the package would be."""
    path = ROOT / "examples" / "bring_your_own" / "python_use.py"
    body = [line for line in path.read_text().split('"""\n', 1)[1].splitlines() if line]
    assert len(body) <= 10
    short = path.read_text().replace('"epochs": 3', '"max_steps": 2')
    assert short != path.read_text()
    short = short.replace("from_dict({", 'from_dict({"wandb": {"mode": "disabled"}, ')
    environment = {
        "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    result = run_program(["-c", short], cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert "val/iou" in result.stdout
    assert (tmp_path / "runs" / "run" / "summary.json").is_file()
