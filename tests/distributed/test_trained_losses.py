"""A loss with weights of its own, against a plain loop that gives them to the optimizer, too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    CLASSES,
    IGNORED,
    Images,
    Points,
    config,
    conv_net,
    largest_difference,
    mlp,
    tensors_of,
)
from trainer import Observer, Task, Trainer, WeightedSum
from trainer.core.run import Run
from trainer.exact.plan import Plan

SAMPLES = 86  # 3 × 28 + 2: two ranks of three have nothing to do in a last step
MICRO = 7


class CenterLoss(Task):
    """Cross-entropy of scaled scores, and the distance to a trained centre; ignored targets weigh nothing.

    Only what a micro-batch's labels name gets a gradient of its own; `margin` only where a label is 3.
    """

    ignore_index = IGNORED
    metrics = ("training",)

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        if seed is not None:
            torch.manual_seed(seed)
        self.centers = nn.Parameter(torch.randn(CLASSES, CLASSES))
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.margin = nn.Parameter(torch.tensor(0.1))
        self.norm = nn.BatchNorm1d(CLASSES, momentum=0.3)
        # As a perceptual loss has it: in eval mode, and nobody said that it is not to be trained.
        self.fixed = nn.Sequential(nn.Linear(CLASSES, 2), nn.BatchNorm1d(2)).eval()
        self.fixed[1].running_mean.fill_(0.3)

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        scores = self.norm(output) * self.temperature
        total = F.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="sum")
        counted = targets != IGNORED
        distances = (output - self.centers[targets.clamp(min=0)]).square().sum(1)
        total = total + 0.05 * (distances * counted).sum()
        total = total + 0.1 * self.fixed(output).square().sum(1)[counted].sum()
        if (targets == 3).any():
            total = total + self.margin * (targets == 3).sum()
        return WeightedSum(total, counted.sum())

    def metric_sums(self, output: Tensor, targets: Tensor) -> dict[str, WeightedSum]:
        return {"training": WeightedSum(output.new_tensor(float(self.training)), 1)}


def plain(steps: int = 8) -> dict[str, Tensor]:
    data, model, loss = Points(SAMPLES), mlp().double(), CenterLoss(9).double()
    trained = [*model.parameters(), loss.centers, loss.temperature, loss.margin]
    trained += [loss.norm.weight, loss.norm.bias]
    optimizer = torch.optim.Adam(trained, lr=0.05, weight_decay=0.01)
    plan = Plan(
        samples=SAMPLES, batch_size=28, micro_size=MICRO, ranks=1, epochs=2, seed=0
    )
    for number, step in enumerate(plan.steps()):
        if number == steps:
            break
        order = torch.from_numpy(plan.permutation(step.epoch))[step.start :]
        step_weight = 0.0
        for first, end in step.micro_batches:
            ids = order[first:end]
            total, weight = loss.loss_sum(model(data.points[ids]), data.labels[ids])
            total.backward()
            step_weight += float(weight)
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad /= step_weight
        clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return tensors_of(model, loss)


class Start(Observer):
    """Notes the loss's weights that training begins with."""

    def begin(self, run: Run) -> None:
        self.centers = run.task.centers.detach().clone()


def run(
    directory: Path, given: bool = True, **changes: Any
) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    changes = {
        "optimizer__name": "adam",
        "optimizer__momentum": None,
        "optimizer__lr": 0.05,
        "optimizer__weight_decay": 0.01,
        "train__max_grad_norm": 0.5,
        "train__find_unused_parameters": True,
    } | changes
    if not given:
        changes["loss__name"] = f"{__name__}.CenterLoss"
    settings = config(directory, batch__micro_size=MICRO, run__resume="auto", **changes)
    data, start = Points(SAMPLES), Start()
    trainer = Trainer(
        settings,
        model=mlp(),
        train_data=data,
        val_data=Points(20),
        observers=[start],
        # Given from Python, ranks may have drawn different weights: rank 0's count.
        task=CenterLoss(9 + int(os.environ.get("RANK", "0"))) if given else None,
    )
    summary = trainer.fit()
    return tensors_of(trainer.module, trainer.run.task), summary, start.centers


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_equals_the_plain_loop(tmp_path: Path, ranks: int) -> None:
    """Clipped with the rest, decayed by the same rule, with unused parameters and ignored targets."""
    reference = plain()
    for result, summary, _ in on_ranks(ranks, run, tmp_path):
        assert largest_difference(result, reference) < 1e-11
        assert summary["loss_sha256"]
    fixed = CenterLoss(9).double().fixed.state_dict()
    for name, tensor in fixed.items():
        assert torch.equal(result[f"loss/fixed.{name}"], tensor), (
            "in eval mode: not trained"
        )


def test_bitwise_and_resumed_on_other_processes(tmp_path: Path) -> None:
    changes = {"run__reproducibility": "bitwise"}
    (reference,) = on_ranks(1, run, tmp_path / "1", **changes)
    for stop, ranks in ((3, 2), (5, 3)):
        on_ranks(ranks, run, tmp_path / "cut", train__max_steps=stop, **changes)
    for result, summary, _ in on_ranks(2, run, tmp_path / "cut", **changes):
        assert summary["loss_sha256"] == reference[1]["loss_sha256"]
        assert all(
            torch.equal(result[name], reference[0][name]) for name in reference[0]
        )
    assert largest_difference(reference[0], plain()) < 1e-11


def test_by_import_path_its_first_weights_are_the_seeds(tmp_path: Path) -> None:
    starts = []
    for ranks in (1, 2):
        for _, _, start in on_ranks(
            ranks, run, tmp_path / str(ranks), given=False, train__max_steps=1
        ):
            starts.append(start)
    assert all(torch.equal(start, starts[0]) for start in starts)
    (other,) = on_ranks(1, run, tmp_path / "other", given=False, run__seed=1)
    assert not torch.equal(other[2], starts[0])


def test_the_best_model_comes_with_its_loss_and_evaluation_is_no_training(
    tmp_path: Path,
) -> None:
    settings = config(
        tmp_path,
        batch__micro_size=MICRO,
        train__find_unused_parameters=True,
    )

    def trainer() -> Trainer:
        data = Points(SAMPLES)
        return Trainer(
            settings, model=mlp(), train_data=data, val_data=data, task=CenterLoss(9)
        )

    trained = trainer()
    trained.fit()
    row = json.loads((tmp_path / "run" / "best" / "metrics.json").read_text())
    assert row["val/training"] == 0
    assert row["train/epoch_training"] == 1
    other = trainer()
    other.run.load_best(tmp_path / "run")
    assert other.run.evaluate()["loss"] == row["val/loss"]
    assert other.run.task.training


class Teacher(Task):
    """A teacher within the loss, which sees the inputs itself; nobody froze its parameters."""

    def __init__(self, in_eval: bool) -> None:
        super().__init__()
        self.teacher = conv_net()
        self.teacher[1].running_mean.fill_(0.4)
        if in_eval:
            self.teacher.eval()

    def predict(self, model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            soft = self.teacher(inputs)
        return model(inputs), soft

    def loss_sum(self, output: tuple[Tensor, Tensor], targets: Tensor) -> WeightedSum:
        student, soft = output
        losses = F.cross_entropy(student, soft.softmax(1), reduction="sum")
        return WeightedSum(losses, len(targets))


@pytest.mark.parametrize("in_eval", [True, False])
def test_a_teacher_in_the_loss(tmp_path: Path, in_eval: bool) -> None:
    def fit(directory: Path) -> tuple[dict[str, Tensor], bool]:
        settings = config(directory, batch__micro_size=MICRO)
        data = Images(SAMPLES)
        trainer = Trainer(
            settings,
            model=conv_net(),
            train_data=data,
            val_data=data,
            task=Teacher(in_eval),
        )
        trainer.fit()
        is_training = trainer.run.task.teacher.training  # type: ignore[union-attr]
        return tensors_of(trainer.module, trainer.run.task), is_training  # type: ignore[return-value]

    data, model, loss = Images(SAMPLES), conv_net().double(), Teacher(in_eval).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plan = Plan(
        samples=SAMPLES, batch_size=28, micro_size=MICRO, ranks=1, epochs=2, seed=0
    )
    for step in plan.steps():
        order = torch.from_numpy(plan.permutation(step.epoch))[step.start :]
        for first, end in step.micro_batches:
            ids = order[first:end]
            output = loss.predict(model, data.points[ids])
            (loss.loss_sum(output, data.labels[ids])[0] / step.size).backward()
        optimizer.step()
        optimizer.zero_grad()
    reference = tensors_of(model, loss)
    for ranks in (1, 2):
        for result, is_training in on_ranks(ranks, fit, tmp_path / str(ranks)):
            assert is_training != in_eval
            assert largest_difference(result, reference) < 1e-12
