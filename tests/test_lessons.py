"""What the lessons' headers and pages say, measured; what a loss sum is, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples.lessons.batch_norm import net
from examples.lessons.gradient_descent import GradientDescent
from tests.distributed.ranks import on_ranks
from tests.distributed.small import IGNORED, Points, config, fitted, mlp, state
from trainer import Config, ConfigError, Trainer
from trainer.config.load import load
from trainer.core.metrics import TIMINGS
from trainer.exact.plan import Step
from trainer.reporting.jsonl import read_rows

LESSONS = Path(__file__).parents[1] / "configs" / "lessons"
OFFLINE = ["wandb.mode=disabled", "run.figures=false"]


def load_lesson(lesson: str, directory: Path, *overrides: str) -> Config:
    return load(
        LESSONS / f"{lesson}.yaml", [*OFFLINE, f"run.dir={directory}", *overrides]
    )


def accuracies(lesson: str, directory: Path) -> list[tuple[float, float]]:
    """Before and after training, for each of 20 seeds."""
    results = []
    quick = ["train.log_every=80", "run.proof=off"]
    for seed in range(20):
        trainer = Trainer(load_lesson(lesson, directory, f"run.seed={seed}", *quick))
        before = trainer.evaluate()["accuracy"]
        trainer.fit()
        results.append((before, trainer.evaluate()["accuracy"]))
    return results


@pytest.mark.parametrize("lesson", ["patterns", "own_optimizer"])
def test_both_patterns_are_right_at_a_glaring_intensity_on_each_of_20_seeds(
    tmp_path: Path, lesson: str
) -> None:
    (results,) = on_ranks(1, accuracies, lesson, tmp_path)
    before, after = zip(*results, strict=True)
    assert after == (1.0,) * 20
    assert sum(before) / 20 < 0.3  # of four outputs, so a guess is right in one of four


def test_gradient_descent_is_sgd_without_momentum() -> None:
    torch.manual_seed(0)
    ours, theirs = mlp().double(), mlp().double()
    theirs.load_state_dict(ours.state_dict())
    unused = nn.Parameter(torch.ones(2))
    optimizers = (
        GradientDescent([*ours.parameters(), unused], lr=0.3),
        torch.optim.SGD(theirs.parameters(), lr=0.3),
    )
    for _ in range(3):
        inputs = torch.randn(4, 6, dtype=torch.float64)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-14, atol=0)
    assert unused.tolist() == [1, 1]


def descend(directory: Path) -> list[dict[str, Any]]:
    Trainer(load_lesson("parabola", directory, "train.precision=fp64")).fit()
    return read_rows(directory / "parabola" / "metrics.jsonl")


def test_each_step_down_the_parabola_multiplies_x_by_one_minus_twice_the_rate(
    tmp_path: Path,
) -> None:
    (rows,) = on_ranks(1, descend, tmp_path)
    steps = [row for row in rows if "train/x" in row]
    assert [row["train/x"] for row in steps] == pytest.approx(
        [0.8**k for k in range(30)], rel=1e-12
    )
    assert [row["train/loss"] for row in steps] == pytest.approx(
        [0.64**k for k in range(30)], rel=1e-12
    )


def draw_descent(directory: Path, *arguments: str) -> int:
    from examples.lessons.descent import main

    return main([*OFFLINE, f"run.dir={directory}", *arguments])


@pytest.mark.parametrize(
    ("name", "steps", "arguments"),
    [
        ("parabola", 8, ["data.steps=8"]),
        (
            "own_optimizer",
            5,
            [str(LESSONS / "own_optimizer.yaml"), "train.max_steps=5"],
        ),
    ],
)
def test_the_descent_is_an_animation_of_each_step(
    tmp_path: Path, name: str, steps: int, arguments: list[str]
) -> None:
    from PIL import Image

    assert on_ranks(1, draw_descent, tmp_path, *arguments) == [0]
    with Image.open(tmp_path / name / "figures" / "descent.gif") as image:
        assert image.n_frames == steps + 1  # the start, and a frame a step


def fit_regression(directory: Path) -> float:
    return float(
        Trainer(load_lesson("regression", directory, "train.epochs=4")).fit()["best"]
    )


def test_the_regression_learns_where_the_spot_is(tmp_path: Path) -> None:
    # The middle would be 0.5 away.
    assert on_ranks(1, fit_regression, tmp_path)[0] < 0.1


def fit_switches(directory: Path) -> list[dict[str, Any]]:
    switches = [
        "model.affine=true",
        "model.affine=false",
        "model.track_running_stats=false",
    ]
    return [
        Trainer(load_lesson("batch_norm", directory, "train.epochs=1", switch)).fit()
        for switch in switches
    ]


def test_switches_of_batch_norm(tmp_path: Path) -> None:
    ((both_on, without_affine, untracked),) = on_ranks(1, fit_switches, tmp_path)
    # Training never reads running statistics.
    assert untracked["weights_sha256"] == both_on["weights_sha256"]
    assert untracked["best"] != both_on["best"]  # validation does
    assert without_affine["weights_sha256"] != both_on["weights_sha256"]
    assert without_affine["best"] > 0.85
    frozen_without_statistics = [
        "batch_norm.mode=frozen",
        "model.track_running_stats=false",
    ]
    with pytest.raises(
        AssertionError, match=r'batch_norm\.mode: layer "1" keeps no running statistics'
    ):
        on_ranks(
            1,
            lambda: Trainer(
                load_lesson("batch_norm", tmp_path, *frozen_without_statistics)
            ),
        )
    assert (
        sum(p.numel() for p in net(10, 1, affine=False).parameters())
        == 16 * 9 + 32 * 16 * 9 + 5130
    )


class Epoch(Trainer):
    """Notes each sample's loss by hand, at the weights that its step is taken from."""

    by_hand: list[float]

    def train_step(self, step: Step) -> None:
        ids = self.plan.permutation(step.epoch)[step.start : step.start + step.size]
        samples = [self.run.data.train[int(i)] for i in ids]
        with torch.no_grad():
            output = self.module(torch.stack([point for point, _ in samples]))
        target = torch.tensor([label for _, label in samples])
        self.by_hand += F.cross_entropy(
            output, target, ignore_index=IGNORED, reduction="none"
        )[target != IGNORED].tolist()
        super().train_step(step)


def epoch_loss(directory: Path, micro_size: int) -> tuple[float, float]:
    settings = config(
        directory,
        batch__micro_size=micro_size,
        train__epochs=1,
        loss__ignore_index=IGNORED,
        best__metric="train/loss",
    )
    trainer = Epoch(settings, model=mlp(), train_data=Points())
    trainer.by_hand = []
    trainer.fit()
    row = read_rows(directory / "run" / "metrics.jsonl")[-1]
    return row["train/epoch_loss"], sum(trainer.by_hand) / len(trainer.by_hand)


@pytest.mark.parametrize("micro_size", [28, 5])
def test_an_epochs_loss_is_the_mean_over_its_samples(
    tmp_path: Path, micro_size: int
) -> None:
    """103 samples in steps of 28, 28, 28 and 19, of which a fifth is ignored."""
    ((logged, by_hand),) = on_ranks(1, epoch_loss, tmp_path, micro_size)
    assert logged == pytest.approx(by_hand, rel=1e-12)


class Values(Points):
    """The same points, with a value for each, as a column."""

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        return self.points[i], self.points[i][:1].sin()


def reductions(
    directory: Path, name: str
) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    runs = []
    ignored = name == "cross_entropy"
    for reduction in (None, "mean", "sum"):
        more: dict[str, Any] = (
            {"loss__ignore_index": IGNORED if ignored else None} if ignored else {}
        )
        settings = config(
            directory,
            batch__micro_size=1 if ignored else 2,
            batch__size=2 if ignored else 3,
            loss__name=name,
            optimizer__lr=0.01,
            best__metric="train/loss",
            **more,
        )
        if reduction is not None:
            settings.loss.args["reduction"] = reduction
        model = mlp() if ignored else nn.Sequential(mlp(), nn.Linear(4, 1))
        trainer = fitted(settings, model, train_data=Points() if ignored else Values())
        rows = read_rows(directory / "run" / "metrics.jsonl")
        columns = [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]
        runs.append((columns, state(trainer)))
    return runs


@pytest.mark.parametrize("name", ["cross_entropy", "mse", "torch.nn.SmoothL1Loss"])
def test_reduction_mean_and_sum_are_one_run_without_nan(
    tmp_path: Path, name: str
) -> None:
    """Micro-batches of one sample, steps of two: of some every target is ignored, whose mean would be 0 ÷ 0."""
    (runs,) = on_ranks(1, reductions, tmp_path, name)
    (rows, weights), *others = runs
    assert "NaN" not in json.dumps(rows)
    for theirs, their_weights in others:
        assert theirs == rows
        assert all(torch.equal(weights[key], their_weights[key]) for key in weights)
    if name == "cross_entropy":
        # A step that counted nothing.
        assert any("train/loss" not in row for row in rows if "grad_norm" in row)


def test_another_reduction_is_refused() -> None:
    from trainer.components.task import build_task
    from trainer.config.model_sections import LossConfig

    with pytest.raises(
        ConfigError, match=r'loss\.reduction: "none" is not one of mean, sum'
    ):
        build_task(LossConfig(name="mse", args={"reduction": "none"}), None)
