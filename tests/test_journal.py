"""What a run reports of itself: times that add up."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Images, config, conv_net
from trainer import Trainer
from trainer.reporting.console import Console
from trainer.reporting.figures import drawing


def test_epoch_times_add_up_to_at_most_the_time_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow first picture belongs to no epoch: the epoch lines and "elapsed" both count from the first step."""
    epoch_seconds: list[float] = []

    def draw_slowly(*_: Any, **__: Any) -> dict[str, Path]:
        time.sleep(0.5)
        return {}

    def record(
        _: Console,
        epoch: int,
        epochs: int,
        row: dict[str, float],
        seconds: float,
        best: bool,
    ) -> None:
        epoch_seconds.append(seconds)

    monkeypatch.setattr(drawing, "draw_batch", draw_slowly)
    monkeypatch.setattr(drawing, "draw", draw_slowly)
    monkeypatch.setattr(Console, "epoch", record)

    def run() -> tuple[list[float], float]:
        settings = config(tmp_path, run__figures=True)
        trainer = Trainer(
            settings, model=conv_net(), train_data=Images(), val_data=Images(40)
        )
        return epoch_seconds, trainer.fit()["seconds"]

    ((seconds, elapsed),) = on_ranks(1, run)
    assert len(seconds) == 2
    assert sum(seconds) <= elapsed
    assert min(seconds) > 0
