"""`train.cuda_graphs` with graphs on the CPU: the bits of eager, or eager with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    CLASSES,
    HASHES,
    Images,
    Points,
    config,
    header_of,
    mlp,
    rows_of,
)
from tests.recorded_graphs import GraphsOnCpu, graphs_on_cpu
from trainer import Config, ConfigError, Observer, Trainer
from trainer.core.no_effect import keys_without_effect

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Convolution, BatchNorm, dropout, and a buffer that follows the inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(36, CLASSES),
        )
        self.register_buffer("mean", torch.zeros(()))
        self.mean: Tensor

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(images.mean().detach(), alpha=0.1)
        result: Tensor = self.layers(images) + self.mean
        return result


def run(
    directory: Path, model: nn.Module, data: Any, *, graphs: bool, **changes: Any
) -> tuple[dict[str, Any], Trainer, list[str]]:
    """What a run logs and ends with, its trainer, and the notes of its console."""
    settings: dict[str, Any] = {
        "run__name": "graphs" if graphs else "eager",
        "run__proof": "off",
        "train__cuda_graphs": graphs,
        "train__epochs": 3,
        "batch__micro_size": 7,
    }
    notes: list[str] = []
    trainer = Trainer(
        config(directory, **(settings | changes)), model=model, train_data=data
    )
    if trainer.graphs is not None:
        report = trainer.graphs.report
        trainer.graphs.report = lambda note: report(notes.append)  # type: ignore[method-assign]
    summary = trainer.fit()
    result: dict[str, Any] = {name: summary[name] for name in HASHES}
    result["rows"] = rows_of(directory / str(settings["run__name"]))
    return result, trainer, notes


SAME: list[dict[str, Any]] = [
    # Steps of 28 samples in four micro-batches, and a last one of 19 in three, of 7, 6 and 6.
    {},
    {"batch__micro_size": 28},
    {"train__precision": "bf16", "train__max_grad_norm": 0.1},
    {"run__reproducibility": "bitwise", "batch_norm__momentum_per": "step"},
    {"train__non_finite": "skip", "optimizer__name": "adamw", "optimizer__momentum": None},
    {"train__channels_last": True, "ema__decay": 0.9},
]


@pytest.mark.parametrize("changes", SAME, ids=str)
def test_replays_have_the_bits_of_eager(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    expected, _, _ = run(tmp_path, Net(), Images(), graphs=False, **changes)
    with graphs_on_cpu() as graphs:
        result, trainer, notes = run(tmp_path, Net(), Images(), graphs=True, **changes)
    assert result == expected
    assert trainer.graphs is not None
    assert not trainer.graphs.reason
    assert trainer.graphs.replays > 0
    assert graphs.recordings >= 1
    assert len(notes) == 1
    assert "are replayed from step" in notes[0]
