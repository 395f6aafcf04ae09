"""What evaluating builds of a run, and what only training does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Points, config, mlp
from trainer import ConfigError, Trainer
from trainer.components.task import loss_arguments
from trainer.core.build import build_run


def evaluate(directory: Path, optimizer: str) -> tuple[bool, dict[str, float]]:
    data = Points(56, ignored=False)
    settings = config(
        directory,
        batch__micro_size=14,
        optimizer__name=optimizer,
        optimizer__momentum=None,
    )
    run = build_run(settings, model=mlp(), train_data=data, val_data=data)
    return isinstance(run.module, DistributedDataParallel), run.evaluate()


def test_evaluating_needs_neither_optimizer_nor_ddp(tmp_path: Path) -> None:
    """Its optimizer may be gone: the numbers are those of a run that can train, on one process and two."""
    reference = evaluate(tmp_path, "sgd")
    for ranks in (1, 2):
        for is_wrapped, metrics in on_ranks(
            ranks, evaluate, tmp_path, "package_that_is_gone.Optimizer"
        ):
            assert not is_wrapped
            assert metrics == pytest.approx(reference[1], rel=1e-12)
    data = Points(56, ignored=False)
    with pytest.raises(ConfigError, match="package_that_is_gone"):
        Trainer(
            config(
                tmp_path,
                optimizer__name="package_that_is_gone.Optimizer",
                optimizer__momentum=None,
            ),
            model=mlp(),
            train_data=data,
        )


def test_a_loss_given_from_python_is_in_the_config_with_its_arguments(
    tmp_path: Path,
) -> None:
    """What the run's directory describes gives the same loss again."""
    data = Points(56, ignored=True)
    loss = nn.CrossEntropyLoss(
        torch.tensor([1.0, 2.0, 0.5, 3.0]), ignore_index=-1, label_smoothing=0.1
    )
    settings = config(tmp_path, batch__micro_size=14)
    trainer = Trainer(settings, model=mlp(), train_data=data, val_data=data, task=loss)
    assert trainer.config.loss.args == {
        "weight": [1.0, 2.0, 0.5, 3.0],
        "ignore_index": -1,
        "label_smoothing": 0.1,
    }
    again = build_run(trainer.config, model=mlp(), train_data=data, val_data=data)
    assert again.evaluate() == trainer.evaluate()
    plain = build_run(
        config(tmp_path, loss__ignore_index=-1),
        model=mlp(),
        train_data=data,
        val_data=data,
    )
    assert plain.evaluate()["loss"] != trainer.evaluate()["loss"]
    assert loss_arguments(nn.HuberLoss(delta=2.0)) == {"delta": 2.0}
    assert loss_arguments(nn.MSELoss(reduction="sum")) == {}
