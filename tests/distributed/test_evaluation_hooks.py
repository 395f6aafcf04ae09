"""What observers see of an evaluation, what they draw, and the predictions that one of them saves."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import CLASSES, Points, config, mlp
from trainer import ConfigError, Observer, Run, Step, Task, Trainer
from trainer.components.answers import Answer
from trainer.config.schema import Config
from trainer.core.metrics import Row
from trainer.core.save_predictions import SavePredictions
from trainer.reporting.figures import drawing
from trainer.reporting.journal import Journal
from trainer.reporting.jsonl import read_rows

SAMPLES = 53


def trainer_of(directory: Path, **more: Any) -> Trainer:
    data = Points(SAMPLES, ignored=False)
    parts = {"observers": more.pop("observers", ()), "task": more.pop("task", None)}
    settings = config(
        directory, **{"batch__micro_size": 7, "batch__eval_size": 8} | more
    )
    return Trainer(settings, model=mlp(), train_data=data, val_data=data, **parts)


class Watcher(Observer):
    """Keeps the losses of samples by id, and what is called; adds their mean to the row, and draws."""

    def begin(self, run: Run) -> None:
        self.run = run
        self.losses: dict[int, float] = {}
        self.calls: list[str] = []

    def evaluation_batch(
        self, evaluation: str, ids: Any, output: Tensor, targets: Tensor
    ) -> None:
        if evaluation == "val":
            losses = nn.functional.cross_entropy(output, targets, reduction="none")
            self.losses |= dict(zip(ids.tolist(), losses.tolist(), strict=True))

    def evaluation(self, evaluation: str, step: Step, metrics: Row) -> None:
        self.calls.append(f"{evaluation} {step.number} {sorted(metrics)}")

    def row(self, row: Row) -> None:
        if "val/loss" in row:
            losses = self.run.ranks.gather(list(self.losses.values()))
            row["mine/samples"] = float(len(losses))
            row["mine/loss"] = float(np.mean(losses))

    def figures(self, step: Step, directory: Path) -> Mapping[str, Path]:
        path = directory / f"mine_{step.number}.csv"
        path.write_text("a,b\n")
        return {"mine": path}


def watched(directory: Path) -> tuple[list[int], list[str]]:
    watcher = Watcher()
    trainer_of(directory, ema__decay=0.5, run__figures=True, observers=[watcher]).fit()
    (row, last) = [
        row
        for row in read_rows(directory / "run" / "metrics.jsonl")
        if "val/loss" in row
    ]
    for each in (row, last):
        assert each["mine/samples"] == SAMPLES
        assert each["mine/loss"] == pytest.approx(each["val/loss"], rel=1e-12)
    assert (directory / "run" / "figures" / "mine_2.csv").is_file()
    return sorted(watcher.losses), watcher.calls


def test_observers_see_each_sample_of_an_evaluation_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []

    def send(_: Journal, figures: Mapping[str, Path], step: int = 0) -> None:
        sent.append((step, {name: path.name for name, path in figures.items()}))

    monkeypatch.setattr(Journal, "figures", send)
    # Those of the run itself take longer than all else here.
    monkeypatch.setattr(drawing, "draw", lambda *_, **__: {})
    ids, calls = watched(tmp_path / "1")
    assert ids == list(range(SAMPLES))
    assert calls == [
        f"{evaluation} {step} ['accuracy', 'loss']"
        for step in (2, 4)
        for evaluation in ("val", "val_ema")
    ]
    assert [each for each in sent if each[0]] == [
        (2, {"mine": "mine_2.csv"}),
        (4, {"mine": "mine_4.csv"}),
    ]
    results = on_ranks(2, watched, tmp_path / "2")
    assert sorted(results[0][0] + results[1][0]) == ids
    assert results[0][1] == results[1][1] == calls


class NoFile(Watcher):
    def figures(self, step: Step, directory: Path) -> Mapping[str, Path]:
        return {"mine": directory / "nowhere.png"}


def test_a_figure_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"NoFile\.figures returns .*nowhere\.png"):
        trainer_of(tmp_path, run__figures=True, observers=[NoFile()]).fit()


# ---------------------------------------------------------------- save_predictions


def predictions(directory: Path, **changes: Any) -> dict[str, bytes]:
    tree = config(
        directory,
        batch__micro_size=7,
        batch__eval_size=8,
        run__reproducibility="bitwise",
        ema__decay=0.5,
        **changes,
    ).to_dict()
    tree["observers"] = [
        {"name": "save_predictions"},
        {"name": "save_predictions", "every": 2, "format": "safetensors"},
    ]
    data = Points(SAMPLES, ignored=False)
    Trainer(Config.from_dict(tree), model=mlp(), train_data=data, val_data=data).fit()
    folder = directory / "run" / "predictions"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_predictions_are_the_same_files_on_any_number_of_processes(
    tmp_path: Path,
) -> None:
    (one,) = on_ranks(1, predictions, tmp_path / "1")
    assert list(one) == [
        f"{evaluation}/step_{name}"
        for evaluation in ("val", "val_ema")
        for name in ("00000002.csv", "00000004.csv", "00000004.safetensors")
    ]
    # Stopped at the first evaluation, which comes after the checkpoint.
    resumed: dict[str, Any] = {"run__resume": "auto", "run__proof": "off"}
    on_ranks(2, predictions, tmp_path / "3", **resumed, train__stop_after=2)
    for other in on_ranks(3, predictions, tmp_path / "3", **resumed):
        assert other == one

    # By hand, with the best model's weights, which are those of the last step.
    net = mlp().double()
    net.load_state_dict(
        load_file(tmp_path / "1" / "run" / "best" / "model.safetensors")
    )
    data = Points(SAMPLES, ignored=False)
    probabilities = net(data.points).softmax(1).detach()
    folder = tmp_path / "1" / "run" / "predictions" / "val"
    tensors = load_file(folder / "step_00000004.safetensors")
    assert tensors["ids"].tolist() == list(range(SAMPLES))
    assert torch.equal(tensors["targets"], data.labels)
    assert torch.allclose(tensors["probabilities"], probabilities, rtol=1e-12, atol=0)
    with (folder / "step_00000004.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["id"]) for row in rows] == list(range(SAMPLES))
    assert [int(row["target"]) for row in rows] == data.labels.tolist()
    assert [int(row["predicted"]) for row in rows] == probabilities.argmax(1).tolist()
    confidences = torch.tensor(
        [float(row["probability"]) for row in rows], dtype=torch.float64
    )
    assert torch.equal(confidences, tensors["probabilities"].max(1).values)


class Pixels(Task):
    """Answers with a class for each of two pixels, or not at all."""

    metrics = ()

    def loss_sum(self, output: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        return nn.functional.cross_entropy(output, targets, reduction="sum"), len(
            targets
        )

    def answer(self, output: Tensor) -> Any:
        return Answer("class_map", output.reshape(-1, 2, 1, CLASSES // 2))


class Boxes(Pixels):
    """Finds as many objects in a sample as its label says."""

    def answer(self, output: Tensor) -> Any:
        tables = [row.new_ones(int(row.argmax()), 6) for row in output]
        return Answer("boxes", tables)


class Nested(Pixels):
    def predict(self, model: nn.Module, inputs: Any) -> Any:
        return {"out": model(inputs)}

    def loss_sum(self, output: Any, targets: Tensor) -> tuple[Tensor, int]:
        return super().loss_sum(output["out"], targets)

    def answer(self, output: Any) -> Any:
        return None


def test_what_has_no_place_in_a_file_is_refused(tmp_path: Path) -> None:
    def fit(observer: SavePredictions, task: Task) -> str:
        try:
            trainer_of(
                tmp_path, task=task, train__max_steps=1, observers=[observer]
            ).fit()
        except ConfigError as error:
            return str(error)
        return ""

    assert "no room for the classes of its pixels; set format: safetensors" in fit(
        SavePredictions(), Pixels()
    )
    assert fit(SavePredictions(format="safetensors"), Pixels()) == ""
    path = tmp_path / "run" / "predictions" / "val" / "step_00000001.safetensors"
    assert load_file(path)["classes"].shape == (SAMPLES, 1, 2)
    assert fit(SavePredictions(), Boxes()) == ""
    lines = path.with_suffix(".csv").read_text().splitlines()
    assert lines[0] == "id,x1,y1,x2,y2,score,class"
    net = mlp().double()
    best = tmp_path / "run" / "best" / "model.safetensors"
    net.load_state_dict(load_file(best))
    found = net(Points(SAMPLES, ignored=False).points).argmax(1).tolist()
    ids = [int(line.partition(",")[0]) for line in lines[1:]]
    assert ids == [i for i, count in enumerate(found) for _ in range(count)]
    assert "is not known" in fit(SavePredictions(), Nested())
    wrong: list[dict[str, Any]] = [
        {"every": 0},
        {"every": 1.5},
        {"every": "2"},
        {"format": "parquet"},
    ]
    for arguments in wrong:
        with pytest.raises(ConfigError, match="save_predictions"):
            SavePredictions(**arguments)
