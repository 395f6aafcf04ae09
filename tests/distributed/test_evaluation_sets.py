"""Several named validation sets, and a test set evaluated at the end with the best weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    HASHES,
    Images,
    bitwise_config,
    config,
    conv_net,
    rows_of,
)
from tests.waiting import wait_until
from trainer import Observer, Step, Trainer


class Shifted(Images):
    """The same images, brighter."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.points = self.points + 0.5


def fit(directory: Path, name: str, **more: Any) -> dict[str, Any]:
    changes = {key: more.pop(key) for key in list(more) if "__" in key}
    settings = bitwise_config(
        directory,
        name,
        **{
            "batch__eval_size": 8,
            "optimizer__lr": 1.0,
            **changes,
        },
    )
    data = {"train_data": Images(103), "val_data": Images(50), **more}
    return Trainer(settings, model=conv_net(), **data).fit()


def with_sets(directory: Path, name: str, **more: Any) -> dict[str, Any]:
    sets = {"clean": Images(50), "shifted": Shifted(33)}
    return fit(directory, name, val_data=sets, test_data=Images(41), **more)


def by_hand(file: Path, data: Images) -> tuple[float, float]:
    """The loss and accuracy of the weights in a file, in plain PyTorch."""
    model = conv_net().double().eval()
    model.load_state_dict(load_file(file))
    with torch.no_grad():
        output = model(data.points)
    right = int((output.argmax(1) == data.labels).sum())
    loss = nn.functional.cross_entropy(output, data.labels)
    return float(loss), right / len(data)


def test_named_sets_and_a_test_set(tmp_path: Path, capfd: Any) -> None:
    (plain,) = on_ranks(1, fit, tmp_path, "plain")
    (named,) = on_ranks(1, with_sets, tmp_path, "named")
    output = capfd.readouterr().out
    run = tmp_path / "named"

    # What is evaluated beside changes nothing, and one of several sets is evaluated as if it were the only one.
    assert [plain[key] for key in HASHES] == [named[key] for key in HASHES]
    last = rows_of(run)[-1]
    for row, row_of_plain in zip(
        rows_of(run)[:-1], rows_of(tmp_path / "plain"), strict=True
    ):
        for name in ("val/loss", "val/accuracy"):
            assert row.get(name.replace("/", "/clean/")) == row_of_plain.get(name)
    assert named["best_metric"] == "val/clean/loss"
    assert named["best"] == plain["best"]

    # By hand, on the best weights, which are not the last ones here.
    best = json.loads((run / "best" / "metrics.json").read_text())
    assert best["step"] == named["test_step"] == 4 < named["steps"] == 8
    weights = run / "best" / "model.safetensors"
    loss, accuracy = by_hand(weights, Images(41))
    assert named["test/loss"] == pytest.approx(loss, rel=1e-12)
    assert named["test/accuracy"] == accuracy
    assert best["val/shifted/loss"] == pytest.approx(
        by_hand(weights, Shifted(33))[0], rel=1e-12
    )
    assert last == {
        "step": 8,
        "epoch": 2,
        "test/loss": named["test/loss"],
        "test/accuracy": accuracy,
    }
    assert json.loads((run / "summary.json").read_text())["test/accuracy"] == accuracy
    for text in ("50 val/clean · 33 val/shifted · 41 test", "clean   shifted"):
        assert text in output
    assert f"accuracy {accuracy:.4f} (weights of step 4)" in output

    # Cut off, on other numbers of processes; and once more, when all is done.
    on_ranks(2, with_sets, tmp_path, "cut", train__stop_after=4)
    assert "test/loss" not in rows_of(tmp_path / "cut")[-1]
    for _ in range(2):
        for summary in on_ranks(3, with_sets, tmp_path, "cut"):
            for key in (*HASHES, "best", "test/loss", "test/accuracy", "test_step"):
                assert summary[key] == named[key]
        assert rows_of(tmp_path / "cut") == rows_of(run)


class LosesBest(Observer):
    """Somebody deletes the best model."""

    def begin(self, run: Any) -> None:
        self.path = Path(run.config.run.dir, run.config.run.name, "best")
        self.is_main = run.ranks.is_main

    def epoch(self, step: Step, row: dict[str, float]) -> None:
        if not self.is_main:
            return
        wait_until(self.path.exists)  # it is written behind training's back
        shutil.rmtree(self.path)
        shutil.rmtree(self.path.with_name(".best.previous"), ignore_errors=True)


def test_without_best_weights_the_last_are_tested(tmp_path: Path, capfd: Any) -> None:
    def run() -> dict[str, Any]:
        settings = config(tmp_path, train__epochs=1, batch__micro_size=7)
        return Trainer(
            settings,
            model=conv_net(),
            train_data=Images(103),
            val_data=Images(50),
            test_data=Images(41),
            observers=[LosesBest()],
        ).fit()

    summary, other = on_ranks(2, run)
    assert other["test/accuracy"] == summary["test/accuracy"]
    assert "evaluated with the last weights, for there are no best ones" in (
        capfd.readouterr().out
    )
    last = tmp_path / "run" / "checkpoints" / "step_00000004" / "model.safetensors"
    assert summary["test/accuracy"] == by_hand(last, Images(41))[1]
