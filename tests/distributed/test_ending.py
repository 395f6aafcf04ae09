"""Runs that end before their last step: by `early_stop`, or because an observer asks for it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Points, config, mlp, rows_of
from trainer import ConfigError, Observer, Run, Step, Trainer
from trainer.config.run_sections import EarlyStopConfig
from trainer.core.early_stop import EarlyStop
from trainer.core.metrics import Row
from trainer.reporting.jsonl import read_rows

SAMPLES = 56  # two steps of 28 an epoch


def trainer_of(directory: Path, **more: Any) -> Trainer:
    data = Points(SAMPLES, ignored=False)
    observers = more.pop("observers", ())
    settings = config(directory, **{"batch__micro_size": 7} | more)
    return Trainer(
        settings, model=mlp(), train_data=data, val_data=data, observers=observers
    )


# ---------------------------------------------------------------- the decision


@pytest.mark.parametrize(
    ("patience", "min_delta", "mode", "values", "ends_at"),
    [
        (1, 0.0, "min", [3, 2, 2], 3),
        (2, 0.0, "min", [3, 2, 2.5, 1.9, 2, 2], 6),
        (2, 0.0, "max", [0.1, 0.2, 0.2, 0.3, 0.1, 0.2], 6),
        (2, 0.5, "min", [3, 2.6, 2.4, 2.1, 1.95], 5),
        # A worse step up to which a slow gain adds up is no gain: it is measured from the best value.
        (3, 0.5, "max", [1, 1.3, 1.6, 1.9, 2.0], None),
        (2, 0.0, "min", [math.nan, math.inf, 1], 2),
        (2, 0.0, "min", [math.nan, 2, math.nan, 1], None),
        (None, 0.0, "min", [1, 1, 1], None),
    ],
)
def test_when_it_ends(
    patience: int | None,
    min_delta: float,
    mode: Any,
    values: list[float],
    ends_at: int | None,
) -> None:
    section = EarlyStopConfig(
        metric="val/x", patience=patience, min_delta=min_delta, mode=mode
    )
    early_stop = EarlyStop(section)
    ended = None
    for number, value in enumerate(values, start=1):
        assert early_stop.update({"step": 1.0}) == ""  # no evaluation
        # A resume between any two evaluations.
        state = json.loads(json.dumps(early_stop.state_dict()))
        early_stop = EarlyStop(section)
        early_stop.load_state_dict(state)
        if early_stop.update({"val/x": value}) and ended is None:
            ended = number
    assert ended == ends_at


# ---------------------------------------------------------------- whole runs


def ended(directory: Path, **changes: Any) -> dict[str, Any]:
    """A run of up to ten epochs whose loss would have to fall by 0.02 in an epoch: what it leaves."""
    settings = {
        "run__reproducibility": "bitwise",
        "run__resume": "auto",
        "run__proof": "off",
        "train__epochs": 10,
        "schedule__name": "cosine",
        "early_stop__patience": 2,
        "early_stop__min_delta": 0.02,
    }
    summary = trainer_of(directory, **settings | changes).fit()
    kept = ("weights_sha256", "steps", "best", "stopped_by")
    return {
        "summary": {name: summary.get(name) for name in kept},
        "rows": rows_of(directory / "run"),
    }


def test_a_run_ends_early_alike_on_any_number_of_processes_stopped_or_not(
    tmp_path: Path,
) -> None:
    (one,) = on_ranks(1, ended, tmp_path / "1")
    steps = one["summary"]["steps"]
    assert 4 < steps < 20
    assert (
        "early_stop: val/loss has not got better than" in one["summary"]["stopped_by"]
    )
    # In the middle of an epoch, and at the end of the last one that counts.
    on_ranks(2, ended, tmp_path / "cut", train__stop_after=3)
    on_ranks(1, ended, tmp_path / "cut", train__stop_after=steps - 2)
    for other in on_ranks(3, ended, tmp_path / "cut"):
        assert other == one

    # By hand, and with the schedule of the whole run.
    losses = [row["val/loss"] for row in one["rows"] if "val/loss" in row]
    best, waited = math.inf, 0
    for number, loss in enumerate(losses, start=1):
        better = best - loss > 0.02
        best, waited = (loss, 0) if better else (best, waited + 1)
        assert (waited == 2) == (number == len(losses))
    (whole,) = on_ranks(
        1, ended, tmp_path / "whole", early_stop__patience=None, early_stop__min_delta=0
    )
    assert whole["summary"]["steps"] == 20 and not whole["summary"]["stopped_by"]
    for row, of_whole in zip(one["rows"], whole["rows"], strict=False):
        assert row["lr"] == of_whole["lr"] and row.get("digest") == of_whole.get(
            "digest"
        )


def test_a_run_that_has_ended_goes_on_when_it_is_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ended(tmp_path)
    assert "ended by early_stop: val/loss" in " ".join(capsys.readouterr().out.split())
    again = ended(tmp_path)
    text = " ".join(capsys.readouterr().out.split())
    assert (
        f"this run has ended, after step {first['summary']['steps']} (early_stop"
        in text
    )
    assert again == first
    longer = ended(tmp_path, run__resume="continue")
    # Two more evaluations without a better value.
    assert longer["summary"]["steps"] == first["summary"]["steps"] + 4
    assert longer["rows"][: len(first["rows"])] == first["rows"]
    # Another metric is counted anew, and more patience takes the run to its end.
    patient = {"early_stop__metric": "val/accuracy", "early_stop__patience": 99}
    assert ended(tmp_path, run__resume="continue", **patient)["summary"]["steps"] == 20


class Stopper(Observer):
    """Asks for the end in one of its methods, on some ranks."""

    def __init__(self, method: str, ranks: tuple[int, ...] = (0, 1)) -> None:
        self.method = method
        self.ranks = ranks
        self.ended = False

    def begin(self, run: Run) -> None:
        self.run = run

    def _ask(self, method: str, number: float) -> None:
        if method == self.method and number == 3 and self.run.ranks.rank in self.ranks:
            self.run.stop("enough")

    def step(self, step: Step) -> None:
        self._ask("step", step.number)

    def row(self, row: Row) -> None:
        self._ask("row", row["step"])

    def end(self, summary: Mapping[str, Any]) -> None:
        self.ended = True


def stopped(
    directory: Path, method: str, ranks: tuple[int, ...], log_every: int
) -> Any:
    observer = Stopper(method, ranks)
    trainer = trainer_of(
        directory,
        train__epochs=4,
        train__log_every=log_every,
        observers=[observer],
    )
    summary = trainer.fit()
    assert observer.ended
    rows = read_rows(directory / "run" / "metrics.jsonl")
    last = (directory / "run" / "checkpoints" / "last").read_text().strip()
    return summary["steps"], summary.get("stopped_by"), "val/loss" in rows[-1], last


def test_an_observer_may_end_the_run(tmp_path: Path) -> None:
    """After the next logged row, wherever it asked; with a checkpoint and an evaluation; as rank 0 says."""
    cases = [
        ("step", (0, 1), 1, 3, "enough"),
        ("step", (0, 1), 50, 4, "enough"),
        ("row", (0,), 1, 3, "enough"),
        ("row", (1,), 1, 8, None),
    ]

    def all_cases(directory: Path) -> list[Any]:
        return [
            stopped(directory / str(index), method, ranks, log_every)
            for index, (method, ranks, log_every, _, _) in enumerate(cases)
        ]

    for results in on_ranks(2, all_cases, tmp_path):
        for result, (_, _, _, steps, reason) in zip(results, cases, strict=True):
            assert result == (steps, reason, True, f"step_{steps:08d}")


class StoppingTrainer(Trainer):
    def train_step(self, step: Step) -> None:
        super().train_step(step)
        if step.number == 3:
            self.run.stop("enough")


def test_a_subclass_may_end_the_run(tmp_path: Path) -> None:
    data = Points(SAMPLES, ignored=False)
    parts: dict[str, Any] = {"train_data": data, "val_data": data}
    summary = StoppingTrainer(config(tmp_path), model=mlp(), **parts).fit()
    assert (summary["steps"], summary["stopped_by"]) == (3, "enough")


def test_it_is_said_before_training_what_is_watched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = {"early_stop__patience": 3, "early_stop__metric": "val/accuracy"}
    trainer_of(tmp_path, **watched, early_stop__min_delta=0.01).fit()
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "early stop after 3 evaluations in a row without a higher val/accuracy by more than 0.01"
        in text
    )
    for changes, message in (
        (
            {"early_stop__metric": "val/acuracy"},
            r'"val/acuracy" is not logged .*accuracy',
        ),
        ({"early_stop__patience": 0}, r"early_stop\.patience"),
        ({"early_stop__min_delta": -1}, r"early_stop\.min_delta"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer_of(tmp_path, **watched | changes)
    with pytest.raises(ConfigError, match="give the reason"):
        trainer_of(tmp_path).run.stop("")
