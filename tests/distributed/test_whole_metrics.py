"""`metrics`: computed once over all validation samples, the same on any number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from torch import Tensor, nn
from torchmetrics import classification, detection, regression, retrieval

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    CLASSES,
    IGNORED,
    Points,
    config,
    fitted,
    mlp,
    rows_of,
)
from trainer import Config, Task, Trainer, WeightedSum

SAMPLES = 103
Row = dict[str, float]

CLASSIFIED: list[dict[str, Any]] = [
    {"name": "torchmetrics.F1Score", "average": "macro"},
    {"name": "torchmetrics.classification.MulticlassAUROC"},
    {"name": "torchmetrics.classification.MulticlassAveragePrecision"},
    {"name": "torchmetrics.classification.MulticlassCalibrationError", "log_as": "ece"},
    {"name": "torchmetrics.AUROC", "thresholds": 20, "log_as": "auroc_binned"},
    {"name": "tests.distributed.test_whole_metrics.Surprise"},
    {"name": "tests.distributed.test_whole_metrics.LastFirst"},
]


class Surprise(torchmetrics.Metric):
    """A user's own: a sum of fractions, with its count."""

    higher_is_better = False
    full_state_update = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        assert num_classes == CLASSES
        self.add_state("total", torch.tensor(0.0), "sum")
        self.add_state("count", torch.tensor(0), "sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.total -= preds.gather(1, target[:, None]).log().sum()
        self.count += len(target)

    def compute(self) -> Tensor:
        return self.total / self.count


class LastFirst(torchmetrics.Metric):
    """A user's own whose update needs what came before, and that draws."""

    higher_is_better = True
    full_state_update = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("value", torch.tensor(0.0), None)

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.value = self.value / 2 + (preds[-1, 0] - preds[0, 1]) * torch.rand(())

    def compute(self) -> Tensor:
        return self.value


class Values(Points):
    """One number to predict, and the query that a sample belongs to."""

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        value = self.points[i].square().sum()
        return self.points[i], {"value": value, "query": i % 7}


class Ranking(Task):
    """Regression whose metrics also get the queries."""

    def loss_sum(self, output: Tensor, targets: Any) -> WeightedSum:
        errors = (output[:, 0] - targets["value"]).square()
        return WeightedSum(errors.sum(), len(errors))

    def metric_inputs(self, output: Tensor, targets: Any) -> dict[str, Tensor]:
        target = targets["value"]
        if torch.is_tensor(output) and output.shape[1] == 1:
            output = output[:, 0]
        return {"preds": output, "target": target, "indexes": targets["query"]}


class Ranked(Ranking):
    """The same for metrics of retrieval, whose targets say what is relevant."""

    def metric_inputs(self, output: Tensor, targets: Any) -> dict[str, Tensor]:
        inputs = super().metric_inputs(output, targets)
        return {**inputs, "target": inputs["target"] > 6}


def scorer() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def small(directory: Path, **changes: Any) -> Config:
    metrics = changes.pop("metrics", [])
    settings = config(directory, batch__micro_size=7, **changes)
    return Config.from_dict(settings.to_dict() | {"metrics": metrics})


def classified(directory: Path, mode: str, eval_size: int) -> Row:
    settings = small(
        directory,
        metrics=CLASSIFIED,
        run__reproducibility=mode,
        batch__eval_size=eval_size,
        loss__ignore_index=IGNORED,
    )
    data = Points(28), Points(SAMPLES)
    trainer = Trainer(settings, model=mlp(), train_data=data[0], val_data=data[1])
    first = trainer.evaluate()
    assert trainer.evaluate() == first
    return first


def ranked(directory: Path, eval_size: int) -> Row:
    row: Row = {}
    metrics = {
        "r2": regression.R2Score(),
        "mse": regression.MeanSquaredError(),
        "pearson": regression.PearsonCorrCoef(),
        "interval": torchmetrics.BootStrapper(
            regression.MeanSquaredError(), num_bootstraps=3
        ),
    }
    found = {
        "map": retrieval.RetrievalMAP(),
        "ndcg": retrieval.RetrievalNormalizedDCG(),
    }
    tasks: list[tuple[Task, Any]] = [(Ranking(), metrics), (Ranked(), found)]
    for task, own in tasks:
        trainer = Trainer(
            small(directory, batch__eval_size=eval_size),
            model=scorer(),
            train_data=Values(28),
            val_data=Values(SAMPLES),
            task=task,
            metrics=own,
        )
        row |= trainer.evaluate()
    return row


class Masks(Points):
    """A class for each of 15 pixels, some of them ignored."""

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        draw = torch.Generator().manual_seed(i)
        mask = torch.randint(CLASSES, (3, 5), generator=draw)
        mask[0, : i % 4] = IGNORED
        return self.points[i], mask


def segmenter() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, CLASSES * 15), nn.Unflatten(1, (CLASSES, 3, 5)))


def segmented(directory: Path, eval_size: int) -> Row:
    trainer = Trainer(
        small(directory, batch__eval_size=eval_size, loss__ignore_index=IGNORED),
        model=segmenter(),
        train_data=Masks(28),
        val_data=Masks(SAMPLES),
    )
    row = trainer.evaluate()
    run = trainer.run
    assert run.evaluator is not None
    counts = run.evaluator.pixel_counts()
    row["right"] = run.ranks.on_main(lambda: int(counts.trace()))
    row["pixels"] = run.ranks.on_main(lambda: int(counts.sum()))
    assert row["accuracy"] == row["right"] / row["pixels"]
    return row


def everything(directory: Path) -> dict[str, Row]:
    rows = {}
    for eval_size in (7, 40, 500):  # 500: one batch, and ranks without a sample
        rows[f"bitwise {eval_size}"] = classified(directory, "bitwise", eval_size)
        rows[f"ranked {eval_size}"] = ranked(directory, eval_size)
        rows[f"segmented {eval_size}"] = segmented(directory, eval_size)
    rows["standard"] = classified(directory, "standard", 40)
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Row]]]:
    """By the number of ranks, what each rank has."""
    directory = tmp_path_factory.mktemp("rows")
    return {count: on_ranks(count, everything, directory) for count in (1, 2, 3)}


def test_the_same_bits_on_any_number_of_ranks(
    rows: dict[int, list[dict[str, Row]]],
) -> None:
    expected = rows[1][0]
    of_all_ranks = [of_rank for of_ranks in rows.values() for of_rank in of_ranks]
    for of_rank in of_all_ranks:
        for name, row in of_rank.items():
            # The loss is a sum over ranks.
            assert row["loss"] == pytest.approx(expected[name]["loss"], rel=1e-13)
            is_bitwise = name.startswith("bitwise")
            assert not is_bitwise or row["loss"] == expected[name]["loss"]
            assert {**row, "loss": 0} == {**expected[name], "loss": 0}, name


@torch.no_grad()
def test_what_other_libraries_say(rows: dict[int, list[dict[str, Row]]]) -> None:
    data = Points(SAMPLES)
    counted = data.labels != IGNORED
    outputs = mlp().double()(data.points)[counted]
    labels = data.labels[counted]
    shares = outputs.softmax(1)
    one_hot = nn.functional.one_hot(labels, CLASSES)
    expected = {
        "f1_score": f1_score(labels, shares.argmax(1), average="macro"),
        "auroc": roc_auc_score(labels, shares, multi_class="ovr"),
        "average_precision": average_precision_score(one_hot, shares),
        "surprise": float(nn.functional.cross_entropy(outputs, labels)),
    }
    binned = classification.MulticlassAUROC(CLASSES, thresholds=20)
    expected["auroc_binned"] = float(binned(shares, labels))
    ece = classification.MulticlassCalibrationError(CLASSES)
    expected["ece"] = float(ece(shares, labels))
    for eval_size in (7, 40, 500):
        row = rows[1][0][f"bitwise {eval_size}"]
        for name, value in expected.items():
            # torchmetrics computes from its counts in fp32.
            assert row[name] == pytest.approx(value, rel=1e-6), name
        assert row["surprise"] == pytest.approx(row["loss"], rel=1e-13)


@torch.no_grad()
def test_regression_and_retrieval_are_as_in_one_update(
    rows: dict[int, list[dict[str, Row]]],
) -> None:
    data = Values(SAMPLES)
    predicted = scorer().double()(data.points)[:, 0]
    true = data.points.square().sum(1)
    queries = torch.arange(SAMPLES) % 7
    relevant = true > 6
    r2 = regression.R2Score().set_dtype(torch.float64)
    pearson = regression.PearsonCorrCoef().set_dtype(torch.float64)
    expected = {
        "r2": float(r2(predicted, true)),
        "pearson": float(pearson(predicted, true)),
        "mse": float((predicted - true).square().mean()),
        "map": float(retrieval.RetrievalMAP()(predicted, relevant, queries)),
        "ndcg": float(retrieval.RetrievalNormalizedDCG()(predicted, relevant, queries)),
    }
    for eval_size in (7, 40, 500):
        row = rows[1][0][f"ranked {eval_size}"]
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-12), name
        assert {"interval_mean", "interval_std"} < set(row)


@torch.no_grad()
def test_the_mean_iou_of_a_segmentation(
    rows: dict[int, list[dict[str, Row]]],
) -> None:
    data = Masks(SAMPLES)
    masks = torch.stack([data[i][1] for i in range(SAMPLES)])
    reference = classification.MulticlassJaccardIndex(CLASSES, ignore_index=IGNORED)
    expected = float(reference(segmenter().double()(data.points), masks))
    for eval_size in (7, 40, 500):
        row = rows[1][0][f"segmented {eval_size}"]
        assert row["mean_iou"] == pytest.approx(expected, rel=1e-6)
        assert row["mean_iou"] == rows[1][0]["segmented 7"]["mean_iou"]


def trained(directory: Path, stop_after: int | None, resume: str) -> list[Row]:
    """The rows of a run whose schedule and best model follow a metric; with `stop_after`, of its first part."""
    settings = small(
        directory,
        metrics=[CLASSIFIED[0], CLASSIFIED[1]],
        run__reproducibility="bitwise",
        run__resume=resume,
        batch__eval_size=20,
        loss__ignore_index=IGNORED,
        best__metric="val/auroc",
        schedule__name="plateau",
        schedule__patience=0,
        optimizer__lr=2.0,
        train__epochs=7,
        train__stop_after=stop_after,
    )
    data = Points(56), Points(SAMPLES)
    trainer = fitted(settings, mlp(), train_data=data[0], val_data=data[1])
    assert trainer.config.best.mode == "max"
    kept = json.loads((trainer.journal.directory / "best/metrics.json").read_text())
    assert trainer.progress.best == kept["val/auroc"]
    return rows_of(trainer.journal.directory)


def test_a_metric_decides_alike_on_other_ranks_and_after_a_resume(
    tmp_path: Path,
) -> None:
    whole = on_ranks(1, trained, tmp_path / "whole", None, "never")[0]
    values = [row.get("val/auroc") for row in whole]
    assert len(set(filter(None, values))) > 2
    assert len({row["lr"] for row in whole}) > 1  # a plateau was seen
    on_ranks(2, trained, tmp_path / "parts", 4, "never")
    assert on_ranks(3, trained, tmp_path / "parts", None, "auto")[0] == whole


class Boxes:
    """Noisy boxes: `(4,)` of the input, and how many of two objects a sample has."""

    classes = ("disc", "square", "star")

    def __init__(self, samples: int) -> None:
        draw = torch.Generator().manual_seed(5)
        corners = torch.rand(samples, 2, 2, generator=draw, dtype=torch.float64) * 50
        sizes = 20 + torch.rand(samples, 2, 2, generator=draw, dtype=torch.float64) * 30
        self.boxes = torch.cat([corners, corners + sizes], 2)
        self.noise = torch.randn(samples, 2, 4, generator=draw, dtype=torch.float64) * 4
        self.labels = torch.randint(2, (samples, 2), generator=draw)  # no star
        self.counts = torch.randint(3, (samples,), generator=draw)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        target = {
            "boxes": self.boxes[i].clone(),
            "labels": self.labels[i],
            "count": self.counts[i],
        }
        return (self.boxes[i] + self.noise[i]).flatten(), target


class Detection(Task):
    """The model corrects boxes; a padded target says how many of its boxes are there."""

    def loss_sum(self, output: Tensor, targets: Any) -> WeightedSum:
        errors = (output - targets["boxes"].flatten(1)).abs()
        return WeightedSum(errors.sum(), errors.numel())

    def metric_inputs(self, output: Tensor, targets: Any) -> Any:
        predicted, true = [], []
        for i, count in enumerate(targets["count"].tolist()):
            boxes, labels = output[i].view(2, 4), targets["labels"][i]
            scores = boxes[:, 0].sigmoid()
            predicted.append({"boxes": boxes, "labels": labels, "scores": scores})
            true.append(
                {"boxes": targets["boxes"][i][:count], "labels": labels[:count]}
            )
        return predicted, true


def detected(directory: Path, *eval_sizes: int) -> list[Row]:
    return [detected_by(directory, eval_size) for eval_size in eval_sizes]


def detected_by(directory: Path, eval_size: int) -> Row:
    trainer = Trainer(
        small(directory, batch__eval_size=eval_size, best__metric="val/map_map_50"),
        model=nn.Sequential(nn.Linear(8, 8)),
        train_data=Boxes(28),
        val_data=Boxes(31),
        task=Detection(),
        metrics={"map": detection.MeanAveragePrecision(class_metrics=True)},
    )
    torch.nn.init.eye_(trainer.module[0].weight)  # type: ignore[index,arg-type]
    torch.nn.init.zeros_(trainer.module[0].bias)  # type: ignore[index,arg-type]
    trainer.try_out()
    assert trainer.config.best.mode == "max"
    return trainer.evaluate()


def test_detection_by_lists_of_boxes(tmp_path: Path) -> None:
    data = Boxes(31)
    metric = detection.MeanAveragePrecision(class_metrics=True)
    targets = {"boxes": data.boxes, "labels": data.labels, "count": data.counts}
    noisy = (data.boxes + data.noise).flatten(1)
    metric.update(*Detection().metric_inputs(noisy, targets))
    expected = metric.compute()
    alone = detected(tmp_path, 8)[0]
    assert 0.1 < alone["map_map"] == pytest.approx(float(expected["map"]), rel=1e-6)
    by_class = [alone[f"map_map_per_class_{name}"] for name in ("disc", "square")]
    assert by_class == pytest.approx(expected["map_per_class"].tolist(), rel=1e-6)
    assert "map_map_per_class_star" not in alone
    for of_rank in on_ranks(2, detected, tmp_path, 8, 100):
        for row in of_rank:
            assert {**row, "loss": 0} == {**alone, "loss": 0}
