"""After the ranks' sum, a gradient lies in memory as its parameter does: a norm adds up in memory order."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Images, config
from trainer import Observer, Trainer
from trainer.core.run import Run
from trainer.exact.plan import Step

Strides = list[tuple[int, ...]]


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Those of dimensions with more than one element: any other stride says nothing."""
    return tuple(
        stride
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size > 1
    )


class Watch(Observer):
    """Counts the gradients of each step that lie in memory like their parameters."""

    def __init__(self) -> None:
        self.alike: list[int] = []

    def begin(self, run: Run) -> None:
        self.parameters = list(run.module.parameters())

    def gradient(self, step: Step) -> None:
        alike = 0
        for parameter in self.parameters:
            assert parameter.grad is not None
            alike += strides(parameter.grad) == strides(parameter)
        self.alike.append(alike)


@pytest.mark.parametrize("reproducibility", ["standard", "bitwise"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gradients_have_the_strides_of_their_parameters(
    tmp_path: Path, reproducibility: str, ranks: int
) -> None:
    """86 samples: the last step is one micro-batch, so some ranks have nothing to do."""

    def run(directory: Path) -> tuple[list[int], bool]:
        net = nn.Sequential(
            nn.Conv2d(2, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, padding=1),
            nn.Conv2d(4, 4, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        settings = config(
            directory,
            batch__micro_size=7,
            run__reproducibility=reproducibility,
            train__channels_last=True,
            train__epochs=1,
        )
        watch = Watch()
        Trainer(settings, model=net, train_data=Images(86), observers=[watch]).fit()
        is_channels_last = net[3].weight.stride()[1] == 1
        return watch.alike, is_channels_last

    for alike, is_channels_last in on_ranks(ranks, run, tmp_path):
        assert is_channels_last
        assert alike == [8] * 4
