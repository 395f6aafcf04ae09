"""What is measured depends neither on how many processes measure nor on how micro-batches share a forward."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    CLASSES,
    Points,
    config,
    conv_net,
    fitted,
    largest_difference,
    mlp,
    state,
)
from tests.distributed.small import Images as SmallImages
from trainer import Task, Trainer, WeightedSum
from trainer.components.task import CrossEntropy, metrics_add_up
from trainer.core.evaluation import Decision
from trainer.errors import ConfigError
from trainer.exact.plan import Plan
from trainer.reporting.figures.saliency_maps import compute_saliency

SAMPLES = 84


# ---------------------------------------------------------------- evaluation


class Drawing(nn.Module):
    """A model that draws in evaluation, from every generator there is, and normalises over its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.norm = nn.BatchNorm1d(CLASSES, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x) + F.dropout(torch.ones_like(x), 0.5)
        noise = noise + np.random.standard_normal() + random.random()
        result: Tensor = self.norm(self.net(x + noise))
        return result


def evaluations(
    directory: Path, workers: int
) -> tuple[list[dict[str, float]], list[Decision], bool]:
    settings = config(
        directory, batch__micro_size=7, batch__eval_size=10, data__workers=workers
    )
    data = Points(SAMPLES, ignored=False)
    trainer = Trainer(settings, model=Drawing(), train_data=data, val_data=data)
    evaluator = trainer.run.evaluator
    assert evaluator is not None
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    results = [trainer.evaluate()]
    decisions = evaluator.decisions()
    np.random.rand(3)
    results.append(trainer.evaluate())
    return results, decisions, random.random() == random.Random(5).random()


def test_draws_of_an_evaluation_are_the_same_on_any_number_of_processes_each_time(
    tmp_path: Path,
) -> None:
    (((first, again), decisions, restored),) = on_ranks(1, evaluations, tmp_path, 0)
    assert first == again
    assert restored  # what is drawn after an evaluation does not depend on it
    accuracy = sum(d.predicted == d.true for d in decisions) / SAMPLES
    assert first["accuracy"] == pytest.approx(accuracy, rel=1e-12)
    for ranks, workers in ((2, 0), (3, 1)):
        results = on_ranks(ranks, evaluations, tmp_path, workers)
        for evaluated, their_decisions, _ in results:
            assert [d.predicted for d in their_decisions] == [
                d.predicted for d in decisions
            ]
            for metrics in evaluated:
                assert metrics == pytest.approx(first, rel=1e-12)


class DrawingLinear(nn.Linear):
    """With Monte Carlo dropout: in evaluation as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.2, training=True))


class DrawingBackbone(nn.Module):
    """A frozen backbone and a head that both draw."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = DrawingLinear(6, 8)
        self.head = DrawingLinear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.backbone(x))
        return result


def with_frozen_backbone(directory: Path) -> list[dict[str, float]]:
    settings = config(directory, model__freeze="backbone", model__head="head")
    data = Points(SAMPLES, ignored=False)
    trainer = Trainer(settings, model=DrawingBackbone(), train_data=data, val_data=data)
    return [trainer.evaluate() for _ in range(3)]


def test_a_frozen_backbone_that_draws_is_evaluated_alike_each_time(
    tmp_path: Path,
) -> None:
    ((first, *others),) = on_ranks(1, with_frozen_backbone, tmp_path)
    assert others == [first, first]


def test_saliency_of_a_model_that_draws_is_the_same_each_time() -> None:
    net = nn.Sequential(conv_net(), nn.Module())
    net[1].forward = lambda x: x + torch.randn_like(x)  # type: ignore[method-assign]
    images = SmallImages(4).points.double()
    maps = [compute_saliency(CrossEntropy(), net.double(), images) for _ in range(2)]
    assert maps[0] is not None and maps[1] is not None
    assert torch.equal(*maps)


# ---------------------------------------------------------------- metrics that compare samples


class Retrieval(Task):
    """Is the nearest other sample of the (micro-)batch of the same class?"""

    metrics = ("nearest",)

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        return WeightedSum(
            F.cross_entropy(output, targets, reduction="sum"), len(targets)
        )

    def metric_sums(self, output: Tensor, targets: Tensor) -> dict[str, WeightedSum]:
        distances = torch.cdist(output, output).fill_diagonal_(torch.inf)
        hits = targets[distances.argmin(1)] == targets
        return {"nearest": WeightedSum(hits.sum(), len(targets))}


class InDict(Retrieval):
    """The same of a model that returns a dict, with a tensor that is none of the samples'."""

    def predict(self, model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        return {"scores": model(inputs), "classes": torch.eye(CLASSES)}

    def loss_sum(self, output: Any, targets: Tensor) -> WeightedSum:
        return super().loss_sum(output["scores"], targets)

    def metric_sums(self, output: Any, targets: Tensor) -> dict[str, WeightedSum]:
        assert output["classes"].shape == (CLASSES, CLASSES)
        return super().metric_sums(output["scores"], targets)


def epoch_of_retrieval(
    directory: Path, task: type[Task], fuse: int
) -> tuple[float, float]:
    settings = config(
        directory,
        batch__micro_size=7,
        batch__fuse=fuse,
        batch__eval_size=12,
        train__epochs=1,
        train__log_every=2,
        optimizer__lr=1e-12,  # so that the weights of every step are those of the start
    )
    data = Points(SAMPLES, ignored=False)
    trainer = fitted(settings, mlp(), train_data=data, val_data=data, task=task())
    assert trainer.fuse == fuse
    trainer.ranks.barrier()  # rank 0 has written the rows
    lines = (trainer.journal.directory / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[-1])
    return row["train/epoch_nearest"], row["val/nearest"]


def by_hand() -> tuple[float, float]:
    data, net, task = Points(SAMPLES, ignored=False), mlp().double(), Retrieval()
    plan = Plan(samples=SAMPLES, batch_size=28, micro_size=7, ranks=1, epochs=1, seed=0)
    hits = 0
    for step in plan.steps():
        for index in range(len(step.micro_batches)):
            ids = torch.from_numpy(plan.sample_ids(step, index))
            sums = task.metric_sums(net(data.points[ids]).detach(), data.labels[ids])
            hits += int(sums["nearest"].total)
    val_hits = 0
    for ids in torch.arange(SAMPLES).split(12):
        sums = task.metric_sums(net(data.points[ids]).detach(), data.labels[ids])
        val_hits += int(sums["nearest"].total)
    return hits / SAMPLES, val_hits / SAMPLES


@pytest.mark.parametrize(
    ("task", "ranks", "fuse"),
    [(Retrieval, 1, 1), (Retrieval, 3, 1), (Retrieval, 2, 2), (InDict, 1, 4)],
)
def test_a_metric_sees_what_the_loss_sees(
    tmp_path: Path, task: type[Task], ranks: int, fuse: int
) -> None:
    for result in on_ranks(ranks, epoch_of_retrieval, tmp_path, task, fuse):
        assert result == pytest.approx(by_hand(), rel=1e-12)


def test_whose_word_counts_for_a_metric() -> None:
    class OwnMetric(CrossEntropy):
        def metric_sums(
            self, output: Tensor, targets: Tensor
        ) -> dict[str, WeightedSum]:
            return super().metric_sums(output, targets)

    class Said(OwnMetric):
        metrics_add_up = True

    class OwnLoss(CrossEntropy):
        def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
            return super().loss_sum(output, targets)

    tasks = [CrossEntropy(), OwnLoss(), OwnMetric(), Said(), Task(), Retrieval()]
    assert [metrics_add_up(task) for task in tasks] == [
        True,
        True,
        False,
        True,
        False,
        False,
    ]


# ---------------------------------------------------------------- losses that micro-batches cannot add up


class WithContrast(Retrieval):
    """Mostly a loss by sample; a small part compares the samples of what it sees."""

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        total, weight = super().loss_sum(output, targets)
        spread = (output - output.mean(0)).square().sum()
        return WeightedSum(total + 0.05 * spread, weight)


class CountsInInts(Retrieval):
    """Counts the targets of class 0, and says so by an int."""

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        counted = targets == 0
        total = F.cross_entropy(output[counted], targets[counted], reduction="sum")
        return WeightedSum(total, int(counted.sum()))


class MeanAsSum(Retrieval):
    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        return WeightedSum(F.cross_entropy(output, targets), 1)


class WithoutGradient(Retrieval):
    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        return WeightedSum((output.argmax(1) != targets).sum().double(), len(targets))


class BadMetric(Retrieval):
    def metric_sums(self, output: Tensor, targets: Tensor) -> dict[str, Any]:
        return {"nearest": (output.argmax(1) == targets).double().mean()}


def refusal(directory: Path, task: type[Task], **changes: Any) -> str:
    settings = config(directory, batch__micro_size=7, **changes)
    data = Points(SAMPLES, ignored=False)
    trainer = Trainer(
        settings, model=mlp(), train_data=data, val_data=data, task=task()
    )
    with pytest.raises(ConfigError) as caught:
        trainer.fit()
    assert trainer.progress.step == 0
    return str(caught.value)


def test_a_mean_with_weight_1_trains_where_all_micro_batches_have_one_size(
    tmp_path: Path,
) -> None:
    """Each counts alike then, so a mean of means is the mean."""

    def run(task: type[Task]) -> dict[str, Tensor]:
        data = Points(SAMPLES, ignored=False)
        settings = config(tmp_path / task.__name__, batch__micro_size=7)
        return state(
            fitted(settings, mlp(), train_data=data, val_data=data, task=task())
        )

    ((means,), (sums,)) = (on_ranks(1, run, task) for task in (MeanAsSum, Retrieval))
    assert largest_difference(means, sums) < 1e-12


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (
            WithContrast,
            {"batch__fuse": 2, "train__precision": "fp32"},
            "batch.fuse: two micro-batches in one forward do not give",
        ),
        (CountsInInts, {}, "loss.name: loss_sum returned the int"),
        (
            MeanAsSum,
            {"batch__size": 33},
            "loss.name: loss_sum returned the int 1 as the weight of 6",
        ),
        (WithoutGradient, {}, "loss.name: the loss has no gradient"),
        (BadMetric, {}, "loss.name: BadMetric.metric_sums failed on the model's"),
    ],
)
def test_what_would_be_a_wrong_number_is_refused_before_the_first_step(
    tmp_path: Path, task: type[Task], changes: dict[str, Any], message: str
) -> None:
    assert on_ranks(1, refusal, tmp_path, task, **changes)[0].startswith(message)


class LateCounts(Retrieval):
    """An int that is a count by sample until class 3 is left out, after the first samples."""

    calls = 0

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        total, _ = super().loss_sum(output, targets)
        self.calls += 1
        return WeightedSum(total, len(targets) - (self.calls > 3))


def test_an_int_that_changes_later_ends_the_run(tmp_path: Path) -> None:
    def run() -> str:
        data = Points(SAMPLES, ignored=False)
        settings = config(tmp_path, batch__micro_size=7)
        with pytest.raises(ConfigError) as caught:
            fitted(settings, mlp(), train_data=data, val_data=data, task=LateCounts())
        return str(caught.value)

    assert on_ranks(1, run)[0].startswith(
        "loss.name: loss_sum returned the int 6 as the weight of 7 samples, and 7 for 7"
    )


class Mixed(Retrieval):
    """Leaves a class out, and gives an int as the weight where that changes nothing, if it is asked to."""

    def __init__(self, left_out: int, ints: bool) -> None:
        super().__init__()
        self.left_out = left_out
        self.ints = ints

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        counted = targets != self.left_out
        total = F.cross_entropy(output[counted], targets[counted], reduction="sum")
        is_int = self.ints and bool(counted.all())
        return WeightedSum(total, len(targets) if is_int else counted.sum())


def mixed(directory: Path, left_out: int, ints: bool) -> dict[str, Tensor]:
    data, task = Points(SAMPLES, ignored=False), Mixed(left_out, ints)
    settings = config(directory / str(ints), batch__micro_size=4)
    return state(fitted(settings, mlp(), train_data=data, val_data=data, task=task))


def test_an_int_among_tensors_is_one_of_them(tmp_path: Path) -> None:
    """The first micro-batch has samples of class 2, so its weight is a tensor; it has none of class 3."""
    (expected,) = on_ranks(1, mixed, tmp_path, 2, False)
    for ranks in (1, 2):
        for actual in on_ranks(ranks, mixed, tmp_path, 2, True):
            assert largest_difference(actual, expected) < 1e-12
    with pytest.raises(
        AssertionError, match=r"a tensor as the weight .* an int before"
    ):
        on_ranks(2, mixed, tmp_path, 3, True)
