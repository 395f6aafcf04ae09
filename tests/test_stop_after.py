"""A metric's direction, a stop that leaves the schedule alone, and what a resume does to the rate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from tests.distributed.small import Points, config, mlp
from trainer import ConfigError, Trainer
from trainer.components.directions import direction_of
from trainer.components.schedule import build_schedule
from trainer.components.task import CrossEntropy
from trainer.config.model_sections import ScheduleConfig
from trainer.storage.run_directory import read_config
from trainer.sweep.check import check
from trainer.sweep.description import read_sweep
from trainer.sweep.goal import goal_note, with_goal

HASHES = ("weights_sha256", "buffers_sha256", "optimizer_sha256")
ACCURACY = {"loss__name": "cross_entropy", "best__metric": "val/accuracy"}


def fit(directory: Path, name: str, **changes: Any) -> dict[str, Any]:
    """The summary of a run of 3 epochs of 4 steps, evaluated after the second and the third."""
    changes = {
        **{"train__epochs": 3, "train__evaluate_every": 2, "train__log_every": 2},
        **{"schedule__name": "cosine", "loss__ignore_index": -1, **changes},
    }
    settings = config(directory, run__name=name, **changes)
    trainer = Trainer(settings, model=mlp(), train_data=Points(), val_data=Points(40))
    return trainer.fit()


def rows(run: Path) -> list[dict[str, Any]]:
    """The logged rows without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    timings = ("samples_per_second", "data_wait")
    return [
        {name: value for name, value in json.loads(line).items() if name not in timings}
        for line in lines
    ]


# ---------------------------------------------------------------- a run that stops


@pytest.mark.parametrize("stop_after", [4, 6, 8])
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(
    stop_after: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Plateau reads every evaluation: one too many would show in its rate.
    plateau = {"schedule__name": "plateau", "schedule__patience": 0}
    for schedule in ({}, plateau):
        name = f"{schedule}"[:9].strip("{'")
        whole = fit(tmp_path, f"whole{name}", **schedule)
        stopped = fit(tmp_path, name, train__stop_after=stop_after, **schedule)
        assert (stopped["steps"], stopped["planned_steps"]) == (stop_after, 12)
        assert f"{stop_after} of 12 steps, stopped by train.stop_after" in (
            capsys.readouterr().out
        )
        resumed = fit(tmp_path, name, run__resume="auto", **schedule)
        assert "planned_steps" not in resumed
        assert [resumed[key] for key in HASHES] == [whole[key] for key in HASHES]
        assert rows(tmp_path / name) == rows(tmp_path / f"whole{name}")


def test_a_stop_that_lies_behind_trains_nothing_more(tmp_path: Path) -> None:
    before = fit(tmp_path, "run", train__stop_after=6)
    again = fit(tmp_path, "run", train__stop_after=5, run__resume="auto")
    assert again["steps"] == 6
    assert again["weights_sha256"] == before["weights_sha256"]


# ---------------------------------------------------------------- the rate on a resume


@pytest.mark.parametrize(
    ("before", "after", "note"),
    [
        # The rate at the end of a cosine over 3 epochs, and a third of the way into one over 9.
        (
            {"schedule__per": "step"},
            {"schedule__per": "step", "train__epochs": 9},
            "the learning rate goes from 0.0017 to 0.075 at step 13 (train.epochs was 3 and is 9)",
        ),
        (
            {"schedule__per": "step", "train__max_steps": 6},
            {"schedule__per": "step"},
            "the learning rate goes from 0.0067 to 0.05 at step 7 (train.max_steps was 6 and is null)",
        ),
        ({"schedule__name": "constant"}, {"schedule__name": "constant"}, ""),
        (
            {"schedule__name": "step", "schedule__step_size": 1},
            {
                "schedule__name": "step",
                "schedule__step_size": 1,
                "train__epochs": 9,
            },
            "",
        ),
        ({"train__stop_after": 6}, {}, ""),
    ],
)
def test_a_resume_says_what_the_rate_will_do(
    before: dict[str, Any],
    after: dict[str, Any],
    note: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit(tmp_path, "run", **before)
    assert "goes from" not in capsys.readouterr().out
    fit(tmp_path, "run", **{**after, "train__stop_after": 13, "run__resume": "auto"})
    output = capsys.readouterr().out
    assert (note in output) if note else ("goes from" not in output)


def test_step_wants_a_length_in_steps() -> None:
    with pytest.raises(ConfigError, match=r"schedule.step_size: is 7 epochs"):
        build_schedule(
            ScheduleConfig(name="step", per="step"),
            total_steps=9,
            steps_per_epoch=3,
            history=[],
            mode="min",
        )


# ---------------------------------------------------------------- directions


class Retrieval(CrossEntropy):
    """A task with metrics of its own."""

    directions: Mapping[str, str] = {"median_rank": "min", "hits": "max"}

    def __init__(self) -> None:
        super().__init__(ignore_index=-1)
        self.metrics = ("hits", "median_rank", "spread")

    def metric_sums(self, output: Any, targets: Any) -> Any:
        count = torch.tensor(len(output))
        return {name: (torch.tensor(1.0), count) for name in self.metrics}


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("val/loss", "min"),
        ("train/epoch_loss", "min"),
        ("best/val/top5_accuracy", "max"),
        ("val/mean_iou", "max"),
        ("val/median_rank", "min"),
        ("val/hits", "max"),
        ("val/spread", None),
        ("lr", None),
    ],
)
def test_directions_of_metrics(metric: str, direction: str | None) -> None:
    assert direction_of(metric, Retrieval()) == direction


def test_the_most_accurate_model_is_best_without_a_mode(tmp_path: Path) -> None:
    summary = fit(tmp_path, "run", train__evaluate_every=1, **ACCURACY)
    values = [
        row["val/accuracy"] for row in rows(tmp_path / "run") if "val/loss" in row
    ]
    assert len(set(values)) > 1
    assert summary["best"] == max(values)
    # `config.yaml` says which direction it was.
    assert read_config(tmp_path / "run").best.mode == "max"


def test_plateau_follows_the_metrics_direction(tmp_path: Path) -> None:
    settings = config(
        tmp_path,
        **ACCURACY,
        loss__ignore_index=-1,
        schedule__name="plateau",
        schedule__patience=0,
    )
    trainer = Trainer(settings, model=mlp(), train_data=Points(), val_data=Points(40))
    trainer.progress.history[:] = [0.1, 0.2, 0.3]
    assert trainer.schedule.factor(4) == 1.0
    trainer.progress.history[:] = [0.3, 0.2]
    assert trainer.schedule.factor(4) == 0.1


def test_a_metric_of_unknown_direction_is_asked_for(tmp_path: Path) -> None:
    def trainer(**changes: Any) -> Trainer:
        settings = config(tmp_path, best__metric="val/spread", **changes)
        return Trainer(
            settings,
            model=nn.Linear(6, 4),
            train_data=Points(),
            val_data=Points(40),
            task=Retrieval(),
        )

    with pytest.raises(ConfigError, match=r"best.mode: is needed for val/spread"):
        trainer()
    assert trainer(best__mode="max").config.best.mode == "max"


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ({"name": "val/accuracy"}, "maximize"),
        ({"name": "val/loss"}, "minimize"),
        ({"name": "best/val/accuracy"}, "maximize"),
        ({"name": "val/accuracy", "goal": "minimize"}, "minimize"),
        ({"name": "lr"}, None),
    ],
)
def test_the_goal_of_a_sweep(
    metric: dict[str, str], expected: str | None, tmp_path: Path
) -> None:
    tree = {
        "program": "train.py",
        "method": "grid",
        "metric": metric,
        "parameters": {"optimizer.lr": {"values": [0.1, 0.2]}},
        "command": ["${program}", "configs/digits.yaml", "${args_no_hyphens}"],
    }
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(tree))
    sweep = read_sweep(file)
    if expected is None:
        with pytest.raises(ConfigError, match=r"metric.goal: is needed for lr"):
            check(sweep, [])
        return
    sweep = with_goal(sweep, check(sweep, []))
    assert sweep.goal == expected
    # W&B's server would take a missing goal for minimize.
    is_told = expected == "maximize"
    assert ("goal: maximize" in goal_note(sweep)) == is_told
