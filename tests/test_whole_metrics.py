"""`metrics` of a config: what they are called and given, what is refused, and where their values go."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor, nn
from torchmetrics import (
    BootStrapper,
    Metric,
    MetricCollection,
    classification,
    regression,
    retrieval,
)

from tests.distributed.small import Points, config, fitted, mlp
from tests.programs import run_program
from trainer import Config, ConfigError, Trainer
from trainer.components.metric_sections import section_of
from trainer.components.metrics import (
    MetricFacts,
    NamedMetric,
    build_metrics,
    column_name,
)
from trainer.core.trust import read_trusted_config
from trainer.sweep.description import read_sweep
from trainer.sweep.goal import with_goal

QUIET = ["run.figures=false", "wandb.mode=disabled", "run.proof=off"]
F1 = "torchmetrics.classification.MulticlassF1Score"


class Samples:
    """Inputs and targets as they are given."""

    def __init__(self, inputs: Tensor, targets: Tensor, classes: int = 0) -> None:
        self.inputs, self.targets = inputs, targets
        if classes:
            self.classes = [f"c/{i}" for i in range(classes)]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.inputs[i], self.targets[i]


class Scale(nn.Module):
    """Gives its inputs as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.factor


class Undefined(Metric):
    """NaN until its third evaluation, in which it is -1."""

    higher_is_better = True
    computed = 0

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.tensor(0), "sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.count += len(target)

    def compute(self) -> float:
        Undefined.computed += 1  # by the rehearsal, too
        return -1.0 if Undefined.computed > 3 else math.nan


def points_trainer(
    directory: Path, metrics: Any = (), names: Sequence[Any] = (), **changes: Any
) -> Trainer:
    settings = config(directory, **changes)
    tree = settings.to_dict() | {"metrics": list(names)}
    data = Points(28, ignored=False), Points(40, ignored=False)
    return Trainer(
        Config.from_dict(tree),
        model=mlp(),
        train_data=data[0],
        val_data=data[1],
        metrics=metrics,
    )


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (classification.MulticlassF1Score, "f1_score"),
        (classification.BinaryAUROC, "auroc"),
        (classification.MultilabelAveragePrecision, "average_precision"),
        (classification.MulticlassJaccardIndex, "jaccard_index"),
        (regression.R2Score, "r2_score"),
        (retrieval.RetrievalNormalizedDCG, "retrieval_normalized_dcg"),
        (Undefined, "undefined"),
    ],
)
def test_a_column_is_called_after_the_class(cls: type, name: str) -> None:
    assert column_name(cls) == name


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        ([{"name": F1, "averag": "macro"}], {}, r"metrics\[0\]\.averag.*\"average\""),
        ([{"name": F1, "average": "wild"}], {}, r"metrics\[0\].*average"),
        ([{"name": "torchmetrics.F2"}], {}, r"metrics\[0\]\.name.*\"F2\""),
        ([{"name": "torch.nn.Linear"}], {}, r"metrics\[0\]\.name.*Metric"),
        ([{"name": F1}] * 2, {}, r"metrics\[1\].*twice.*log_as"),
        ([{"name": "torchmetrics.Accuracy"}], {}, r"val/accuracy.*twice.*log_as"),
        ([{"name": F1, "log_as": "a b"}], {}, r"metrics\[0\]\.log_as"),
        ([{"name": F1}], {"best__metric": "val/f1"}, r"best\.metric.*val/f1_score"),
        (
            [{"name": "torchmetrics.regression.PearsonCorrCoef"}],
            {"best__metric": "val/pearson_corr_coef"},
            r"best\.mode",
        ),
    ],
)
def test_mistakes_are_refused_by_key(
    tmp_path: Path, names: list[Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        points_trainer(tmp_path, names=names, **changes)
    assert re.search(message, str(error.value)), str(error.value)


@pytest.mark.parametrize(
    ("metrics", "changes", "message"),
    [
        ([retrieval.RetrievalMAP()], {}, r"metrics\[0\]: RetrievalMAP.*indexes"),
        ([regression.PearsonCorrCoef()], {}, r"metrics\[0\]: PearsonCorrCoef"),
        (
            {"f1": classification.MulticlassF1Score(4, average=None)},
            {"best__metric": "val/f1_z"},
            r"best\.metric: \"val/f1_z\".*val/f1_a, val/f1_b",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_training(
    tmp_path: Path, metrics: Any, changes: dict[str, Any], message: str
) -> None:
    trainer = points_trainer(tmp_path, metrics, **changes)
    with pytest.raises(ConfigError, match=message):
        trainer.try_out()


@pytest.mark.parametrize("metrics", [classification.MulticlassF1Score, [3], 3])
def test_what_is_no_metric(tmp_path: Path, metrics: Any) -> None:
    with pytest.raises(ConfigError, match=r"metrics"):
        points_trainer(tmp_path, metrics)


def test_several_values_and_collections(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts: Any = [
        classification.MulticlassF1Score(4, average=None),
        classification.MulticlassConfusionMatrix(4),
    ]
    trainer = points_trainer(
        tmp_path, MetricCollection(parts), best__metric="val/f1_score_b"
    )
    trainer.fit()
    shown = capsys.readouterr().out
    assert shown.count("confusion_matrix is not logged: it has the shape (4, 4)") == 1
    assert "metrics    val/f1_score (MulticlassF1Score)" in shown
    # So that commands that build the run again find it.
    kept = yaml.safe_load((trainer.journal.directory / "config.yaml").read_text())
    assert [section["log_as"] for section in kept["metrics"]] == [
        "f1_score",
        "confusion_matrix",
    ]
    names = [f"f1_score_{label}" for label in "abcd"]
    assert list(trainer.evaluate()) == ["loss", "accuracy", *names]
    assert trainer.config.best.mode == "max"


def test_each_of_several_sets_has_its_own(tmp_path: Path) -> None:
    sets = {"clean": Points(40, ignored=False), "small": Points(15, ignored=False)}
    trainer = Trainer(
        config(tmp_path, best__metric="val/small/f1_score", train__epochs=1),
        model=mlp(),
        train_data=Points(28, ignored=False),
        val_data=sets,
        test_data=Points(9, ignored=False),
        metrics=[classification.MulticlassF1Score(4)],
    )
    trainer.fit()
    assert trainer.config.best.mode == "max"
    row = trainer.evaluate()
    for name, data in sets.items():
        with torch.no_grad():
            predicted = trainer.module(data.points).argmax(1)
        expected = f1_score(data.labels, predicted, average="macro")
        assert row[f"{name}/f1_score"] == pytest.approx(expected, rel=1e-6)
    assert (
        '"test/f1_score"' in (trainer.journal.directory / "metrics.jsonl").read_text()
    )


def test_nan_is_shown_and_never_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Undefined.computed = 0
    trainer = points_trainer(
        tmp_path, [Undefined()], best__metric="val/undefined", train__epochs=3
    )
    summary = trainer.fit()
    assert (summary["best"], summary["best_epoch"]) == (-1.0, 3)
    assert "nan" in capsys.readouterr().out
    lines = (trainer.journal.directory / "metrics.jsonl").read_text().splitlines()
    values = [json.loads(line).get("val/undefined") for line in lines]
    assert [value for value in values if value is not None] == [
        pytest.approx(math.nan, nan_ok=True),
        pytest.approx(math.nan, nan_ok=True),
        -1.0,
    ]


@pytest.mark.parametrize(
    "metric",
    [
        classification.MulticlassF1Score(4, average="weighted", ignore_index=2),
        classification.MulticlassAUROC(4, thresholds=[0.2, 0.7]),
        classification.BinaryFBetaScore(beta=2.0, threshold=0.3),
        regression.MeanSquaredError(squared=False),
    ],
)
def test_an_object_is_kept_as_a_section_that_builds_it_again(metric: Metric) -> None:
    section = section_of(NamedMetric("metrics[0]", "it", metric))
    assert section is not None
    facts = MetricFacts(None, None, None, None)
    (again,) = build_metrics([section], facts)
    assert again.name == "it"
    for one in (metric, again.metric):
        preds = torch.tensor([0.9, 0.6, 0.2, 0.1])
        target = torch.tensor([1, 0, 1, 1])
        if hasattr(metric, "num_classes") and metric.num_classes is not None:
            preds = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
            target = torch.arange(30) % 4
        one.update(preds, target)
    assert torch.equal(metric.compute(), again.metric.compute())


def test_an_object_whose_arguments_are_unknown_is_not_kept() -> None:
    wrapped = BootStrapper(regression.MeanSquaredError(), num_bootstraps=3)
    assert section_of(NamedMetric("metrics[0]", "it", wrapped)) is None


def evaluated(
    directory: Path, data: Samples, model: nn.Module, names: Any, **changes: Any
) -> dict[str, float]:
    tree = config(directory, batch__eval_size=9, **changes).to_dict()
    trainer = Trainer(
        Config.from_dict(tree | {"metrics": names}),
        model=model,
        train_data=data,
        val_data=data,
    )
    return trainer.evaluate()


def test_labels_and_two_classes(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(50, 3, generator=draw)
    noisy = inputs + torch.randn(50, 3, generator=draw)
    labels = (noisy > 0).float()
    names = [
        {"name": "torchmetrics.AveragePrecision", "log_as": "ap"},
        {"name": "torchmetrics.F1Score", "average": "macro"},
    ]
    data = Samples(inputs, labels)
    row = evaluated(tmp_path, data, Scale(), names, loss__name="bce_with_logits")
    assert row["ap"] == pytest.approx(average_precision_score(labels, inputs))
    f1 = f1_score(labels, inputs > 0, average="macro")
    assert row["f1_score"] == pytest.approx(f1, rel=1e-6)

    one = Samples(inputs[:, :1], labels[:, :1])
    row = evaluated(tmp_path, one, Scale(), names, loss__name="bce_with_logits")
    expected = average_precision_score(labels[:, 0], inputs[:, 0])
    assert row["ap"] == pytest.approx(expected)

    names = [{"name": "torchmetrics.classification.BinaryAveragePrecision"}]
    two = Samples(torch.stack([-inputs[:, 0], inputs[:, 0]], 1), labels[:, 0].long(), 2)
    row = evaluated(tmp_path, two, Scale(), names)
    assert row["average_precision"] == pytest.approx(expected)


@pytest.mark.parametrize("ignored", [None, 255])
def test_a_segmentation_has_its_mean_iou_unasked(
    tmp_path: Path, ignored: int | None
) -> None:
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(20, 4, 6, 5, generator=draw)
    scores[:, 3] = -9  # a class that is nowhere
    masks = torch.randint(3, (20, 6, 5), generator=draw)
    if ignored is not None:
        masks[:, ::2] = ignored
    reference = classification.MulticlassJaccardIndex(4, ignore_index=ignored)
    expected = float(reference(scores, masks))
    by_class = {
        "name": "torchmetrics.JaccardIndex",
        "average": "none",
        "log_as": "iou",
    }
    data = Samples(scores, masks, 4)
    changes = {"loss__ignore_index": ignored} if ignored is not None else {}
    row = evaluated(tmp_path, data, Scale(), [by_class], **changes)
    assert row["mean_iou"] == pytest.approx(expected, rel=1e-6)
    assert [row[f"iou_c_{i}"] for i in range(3)] == pytest.approx(
        classification.MulticlassJaccardIndex(4, average=None, ignore_index=ignored)(
            scores, masks
        ).tolist()[:3]
    )
    unnamed = evaluated(tmp_path, Samples(scores, masks), Scale(), [], **changes)
    assert unnamed["mean_iou"] == row["mean_iou"]
    by_image = {"name": "torchmetrics.segmentation.MeanIoU", "log_as": "by_image"}
    if ignored is None:
        assert "by_image" in evaluated(tmp_path, data, Scale(), [by_image])
    else:
        with pytest.raises(ConfigError, match="would count the targets"):
            evaluated(tmp_path, data, Scale(), [by_image], **changes)


def test_a_segmentation_has_its_confusion_drawn(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(20, 3, 6, 5, generator=draw)
    masks = torch.randint(3, (20, 6, 5), generator=draw)
    masks[:, ::2] = 255
    data = Samples(scores, masks, 4)
    trainer = Trainer(
        config(tmp_path, run__figures=True, loss__ignore_index=255),
        model=Scale(),
        train_data=data,
        val_data=data,
    )
    trainer.fit()
    figures = trainer.journal.directory / "figures"
    assert (figures / "confusion_matrix.png").stat().st_size > 1000
    lines = (figures / "per_class.csv").read_text().splitlines()
    table = [line.split(",") for line in lines[1:]]
    reference = classification.MulticlassJaccardIndex(3, average=None, ignore_index=255)
    ious = [float(row[1]) for row in table]
    assert ious == pytest.approx(reference(scores, masks).tolist(), abs=1e-6)
    assert sum(int(row[-1]) for row in table) == 20 * 3 * 5


def test_ignored_tokens_are_left_out(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(30, 4, 7, generator=draw)
    tokens = torch.randint(4, (30, 7), generator=draw)
    tokens[::3, 2:] = -1
    data = Samples(scores, tokens, 4)
    names = [{"name": F1}]
    row = evaluated(tmp_path, data, Scale(), names, loss__ignore_index=-1)
    counted = tokens != -1
    expected = f1_score(tokens[counted], scores.argmax(1)[counted], average="macro")
    assert row["f1_score"] == pytest.approx(expected, rel=1e-6)


def test_from_the_command_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [
        f"run.dir={tmp_path}",
        "run.name=run",
        "train.max_steps=20",
        "best.metric=val/f1_score",
    ]
    names = f"metrics=[{{name: {F1}}}]"
    done = run_program(["train.py", *settings, *QUIET, names])
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((run / "summary.json").read_text())["best_metric"] == "val/f1_score"
    )
    shown = run_program(["-m", "trainer", "evaluate", run])
    line = re.search(r"val/f1_score +(\S+) +\(logged as (\S+)\)", shown.stdout)
    assert line is not None, shown.stdout + shown.stderr
    assert line[1] == line[2]

    changed = f"metrics=[{{name: {F1}, average: micro}}]"
    arguments = ["train.py", *settings, *QUIET, changed, "run.resume=auto"]
    refused = run_program(arguments)
    assert refused.returncode == 2
    assert "metrics" in refused.stderr

    best = run / "best" / "config.yaml"
    for file in (run / "config.yaml", best):
        tree = yaml.safe_load(file.read_text())
        tree["metrics"] = [{"name": "os.system", "command": "touch marker"}]
        file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"metrics\[0\]\.name=os\.system"):
        read_trusted_config(run)


def test_a_sweep_knows_the_goal(tmp_path: Path) -> None:
    settings = Config.from_dict(
        {
            "metrics": [
                {
                    "name": "torchmetrics.F1Score",
                    "log_as": "quality",
                    "task": "multiclass",
                }
            ]
        }
    )
    file = tmp_path / "sweep.yaml"
    sweep = {
        "program": "train.py",
        "method": "random",
        "run_cap": 3,
        "metric": {"name": "val/quality"},
        "parameters": {"optimizer.lr": {"min": 0.1, "max": 1.0}},
        "command": ["${env}", "python", "${program}", "${args_no_hyphens}"],
    }
    file.write_text(yaml.safe_dump(sweep))
    assert with_goal(read_sweep(file), settings).goal == "maximize"


def test_a_run_without_metrics_imports_no_torchmetrics(tmp_path: Path) -> None:
    code = (
        "import sys, train\n"
        f"train.main(['run.dir={tmp_path}', 'train.max_steps=2', *{QUIET}])\n"
        "assert 'torchmetrics' not in sys.modules"
    )
    done = run_program(["-c", code])
    assert done.returncode == 0, done.stderr


def test_what_can_do_nothing_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = config(tmp_path, train__epochs=1).to_dict() | {"metrics": [{"name": F1}]}
    fitted(Config.from_dict(tree), mlp(), train_data=Points(28, ignored=False))
    assert "metrics have no effect: there are no validation data" in (
        capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match="give val_data"):
        Trainer(
            config(tmp_path),
            model=mlp(),
            train_data=Points(28, ignored=False),
            metrics=[classification.MulticlassF1Score(4)],
        )
