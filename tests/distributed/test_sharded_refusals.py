"""What a user's model cannot do with `train.parallel=fsdp`: one message on every rank, which names a way out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Points, config, largest_difference
from trainer import ConfigError, Task, Trainer, WeightedSum
from trainer.exact import sharding
from trainer.exact.shards import whole


@pytest.fixture(autouse=True)
def small_layers_are_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of these models are all too small to be gathered by themselves."""
    monkeypatch.setattr(sharding, "SMALL_BYTES", 0)


class Tower(nn.Module):
    """Three blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.head = nn.Linear(6, 4)

    def forward(self, points: Tensor) -> Tensor:
        for block in self.blocks:
            points = torch.tanh(block(points))
        result: Tensor = self.head(points)
        return result


class UsesAWeightElsewhere(Tower):
    """A weight of a block in the model's own forward."""

    def forward(self, points: Tensor) -> Tensor:
        first = self.blocks[0].weight
        return super().forward(points @ first)


class Penalized(Tower):
    """The sum of squares of the blocks' weights in the output."""

    def forward(self, points: Tensor) -> Tensor:
        squares = [p.square().sum() for p in self.blocks.parameters()]
        return super().forward(points) + sum(squares)


class HasAnEmptyParameter(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0, 3))

    def forward(self, points: Tensor) -> Tensor:
        return super().forward(points) + self.nothing.sum()


class HasAnUnusedLayer(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


class PenalizedByItsLoss(Tower):
    """As `Penalized`, by a task."""


class Penalty(Task):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [model]  # not a part of the task

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        loss = nn.functional.cross_entropy(output, targets, reduction="sum")
        squares = [weight.square().sum() for weight in self._model[0].parameters()]
        return WeightedSum(loss + 0.1 * sum(squares), len(output))


REFUSED = {
    UsesAWeightElsewhere: "_no_split_modules",
    Penalized: "_no_split_modules",
    HasAnEmptyParameter: "nothing has no elements",
    PenalizedByItsLoss: "and loss_sum uses some",
    HasAnUnusedLayer: r"unused.weight, unused.bias\); freeze them",
}


def messages_of(directory: Path) -> list[str]:
    messages = []
    for kind in REFUSED:
        settings = config(
            directory / kind.__name__,
            run__proof="off",
            batch__micro_size=7,
            train__parallel="fsdp",
        )
        with pytest.raises(ConfigError) as error:
            model = kind()
            task = Penalty(model) if kind is PenalizedByItsLoss else None
            data = Points(40, False)
            Trainer(settings, model=model, task=task, train_data=data).fit()
        messages.append(str(error.value))
    return messages


def test_a_model_that_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    first, second = on_ranks(2, messages_of, tmp_path)
    assert first == second
    for message, expected in zip(first, REFUSED.values(), strict=True):
        assert message.startswith("train.")
        assert re.search(expected, message)


class NormedSteps(torch.optim.Optimizer):
    """A step of the gradient over its norm, which is a number on the host, or with `on_device` a tensor."""

    def __init__(self, params: Any, lr: float = 0.1, on_device: bool = False) -> None:
        super().__init__(params, {"lr": lr})
        self._on_device = on_device

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                norm: Any = parameter.grad.norm()
                if not self._on_device:
                    norm = float(norm)
                parameter.sub_(parameter.grad * group["lr"] / norm)


def weights_after(directory: Path, parallel: str) -> dict[str, Tensor]:
    settings = config(
        directory,
        run__proof="off",
        batch__micro_size=7,
        train__parallel=parallel,
        optimizer__name=f"{__name__}.NormedSteps",
        optimizer__momentum=None,
        optimizer__on_device=True,
    )
    trainer = Trainer(settings, model=Tower(), train_data=Points(40, False))
    trainer.fit()
    return {name: whole(p).detach() for name, p in trainer.module.named_parameters()}


def refused_and_trained(directory: Path) -> tuple[str, dict[str, Tensor]]:
    settings = config(
        directory,
        batch__micro_size=7,
        train__parallel="fsdp",
        optimizer__name=f"{__name__}.NormedSteps",
        optimizer__momentum=None,
    )
    with pytest.raises(ConfigError) as error:
        Trainer(settings, model=Tower(), train_data=Points(40, False))
    return str(error.value), weights_after(directory, "fsdp")


def test_an_optimizer_that_takes_parts_for_whole_parameters_is_refused(
    tmp_path: Path,
) -> None:
    expected = weights_after(tmp_path / "whole", "ddp")
    for message, weights in on_ranks(2, refused_and_trained, tmp_path / "parts"):
        assert message.startswith("optimizer.name: ")
        assert "works element by element" in message
        assert largest_difference(weights, expected) < 1e-12


class OwnList(Task):
    """A penalty on weights of which it made a list before training: those of before the model was shared out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = [model.get_parameter("head.weight")]

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        loss = nn.functional.cross_entropy(output, targets, reduction="sum")
        penalty = sum(weight.square().sum() for weight in self._weights)
        return WeightedSum(loss + 0.1 * penalty, len(output))


def notes_on_lists(directory: Path) -> list[str]:
    notes = []
    for has_list in (True, False):
        model = Tower()
        task = OwnList(model) if has_list else None
        settings = config(
            directory, run__proof="off", batch__micro_size=7, train__parallel="fsdp"
        )
        trainer = Trainer(
            settings, model=model, task=task, train_data=Points(40, False)
        )
        notes.append(trainer.run.sharding_note)
    return notes


def test_a_list_of_parameters_from_before_is_told(tmp_path: Path) -> None:
    for with_list, without in on_ranks(2, notes_on_lists, tmp_path):
        assert "still holds (head.weight)" in with_list
        assert not without
