"""Evaluations and checkpoints at other steps than the ends of epochs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    HASHES,
    Images,
    bitwise_config,
    conv_net,
    rows_of,
)
from trainer import Observer, Step, Trainer
from trainer.errors import Stopped

RESULTS = (*HASHES, "best", "best_step")
EVERY_3 = {"train__evaluate_every_steps": 3}


def fit(
    directory: Path, name: str, observers: Sequence[Observer] = (), **changes: Any
) -> dict[str, Any]:
    """The summary of a run of 3 epochs of 4 steps, whose rate and statistics follow its evaluations."""
    settings = bitwise_config(
        directory,
        name,
        **{
            "batch_norm__recalibrate": 2,
            "schedule__name": "plateau",
            "schedule__patience": 0,
            "train__epochs": 3,
            **changes,
        },
    )
    data = {"train_data": Images(103), "val_data": Images(50)}
    return Trainer(settings, model=conv_net(), observers=observers, **data).fit()


class Stops(Observer):
    """Asks for a stop, as a scheduler does, in the third step."""

    def step(self, step: Step) -> None:
        if step.number == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped(directory: Path, name: str, **changes: Any) -> int:
    """The signal that ended the run."""
    with pytest.raises(Stopped) as caught:
        fit(directory, name, observers=[Stops()], **changes)
    return caught.value.exit_status - 128


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [row for row in rows_of(run) if "val/loss" in row]


def test_a_run_evaluated_every_3_steps(tmp_path: Path, capfd: Any) -> None:
    """By hand, and cut at such a step and elsewhere, each part on another number of processes."""

    def alone() -> list[dict[str, Any]]:
        whole = fit(tmp_path, "whole", **EVERY_3)
        # Its only evaluation is the one at its end, and no step before depends on it.
        fit(tmp_path, "ended", train__max_steps=3)
        # Nothing is evaluated twice.
        fit(tmp_path, "at_end", train__max_steps=6, **EVERY_3)
        return [whole]

    ((whole,),) = on_ranks(1, alone)
    output = capfd.readouterr().out
    expected = evaluations(tmp_path / "whole")
    assert [row["step"] for row in expected] == [3, 4, 6, 8, 9, 12]
    assert [row["epoch"] for row in expected] == [1, 1, 2, 2, 3, 3]
    for row in expected:
        # An epoch's means only where it is over.
        assert ("train/epoch_loss" in row) is (row["step"] % 4 == 0)
        assert {"val/accuracy", "lr", "best/val/loss"} <= row.keys()
    assert evaluations(tmp_path / "ended")[0]["val/loss"] == expected[0]["val/loss"]
    at_end = [row["step"] for row in evaluations(tmp_path / "at_end")]
    assert at_end == [3, 4, 6]
    for text in ("every 3 steps, and after each epoch", "0.75/3", "2.25/3", " 3/3"):
        assert text in output

    # Stopped at such a step, with and without a checkpoint that was written before its evaluation.
    for name, every in (("stopped", 3), ("stopped_too", 2)):
        more = {**EVERY_3, "train__checkpoint_every": every}
        assert on_ranks(1, stopped, tmp_path, name, **more) == [signal.SIGTERM]
        assert evaluations(tmp_path / name) == expected[:1]
        on_ranks(2, fit, tmp_path, name, **more)
        assert rows_of(tmp_path / name) == rows_of(tmp_path / "whole")

    cut = {**EVERY_3, "train__checkpoint_every": 3, "train__checkpoint_every_epochs": 2}
    on_ranks(2, fit, tmp_path, "cut", train__stop_after=3, **cut)
    on_ranks(1, fit, tmp_path, "cut", train__stop_after=5, **cut)
    for summary in on_ranks(3, fit, tmp_path, "cut", **cut):
        assert [summary[key] for key in RESULTS] == [whole[key] for key in RESULTS]
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    best = [tmp_path / name / "best" / "metrics.json" for name in ("cut", "whole")]
    assert json.loads(best[0].read_text()) == json.loads(best[1].read_text())


def test_in_standard_mode(tmp_path: Path) -> None:
    """The same rows on two processes, stopped and resumed, as far as fp64 goes."""
    more = {**EVERY_3, "run__reproducibility": "standard"}
    on_ranks(1, fit, tmp_path, "whole", **more)
    on_ranks(1, fit, tmp_path, "cut", train__stop_after=7, **more)
    on_ranks(2, fit, tmp_path, "cut", **more)
    expected = evaluations(tmp_path / "whole")
    for row, row_of_whole in zip(evaluations(tmp_path / "cut"), expected, strict=True):
        assert row == pytest.approx(row_of_whole, rel=1e-10)


def steps_of_checkpoints(run: Path) -> list[int]:
    return sorted(
        int(path.name.removeprefix("step_"))
        for path in (run / "checkpoints").glob("step_*")
    )


def test_checkpoints_by_epochs_or_none(tmp_path: Path) -> None:
    def runs() -> None:
        keep = {"train__keep_checkpoints": 9}
        fit(tmp_path, "second", train__checkpoint_every_epochs=2, **keep)
        none = {"train__keep_checkpoints": 0}
        fit(tmp_path, "none", train__checkpoint_every=1, **none)
        fit(tmp_path, "stopped", train__stop_after=6, **none)

    on_ranks(1, runs)
    assert steps_of_checkpoints(tmp_path / "second") == [8, 12]
    assert steps_of_checkpoints(tmp_path / "none") == []
    assert (tmp_path / "none" / "best" / "model.safetensors").is_file()
    assert steps_of_checkpoints(tmp_path / "stopped") == [6]
