"""What a user's model cannot do with `train.parallel=fsdp`: one message on every rank, which names a way out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Points, config
from trainer import ConfigError, Trainer


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


REFUSED = {
    UsesAWeightElsewhere: "_no_split_modules",
    Penalized: "_no_split_modules",
    HasAnEmptyParameter: "nothing has no elements",
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
            Trainer(settings, model=kind(), train_data=Points(40, False)).fit()
        messages.append(str(error.value))
    return messages


def test_a_model_that_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    first, second = on_ranks(2, messages_of, tmp_path)
    assert first == second
    for message, expected in zip(first, REFUSED.values(), strict=True):
        assert message.startswith("train.")
        assert re.search(expected, message)
