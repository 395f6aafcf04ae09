"""A step runs the operations of a plain PyTorch loop and a few more, counted, not timed."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from tests.distributed.small import config
from tests.operations import Operations
from tests.test_pretended_gpu import in_a_fork
from trainer import Trainer
from trainer.data.datasets import ImageArrays

MICRO_SIZE = 4
# Two look-ups in the data set, the loss's scale and its multiplication, and what is kept of it for the log; less the
# raw loop's division of the loss.
MORE_OF_A_MICRO_BATCH = 4
MORE_OF_A_STEP = 4  # such as whether its loss and gradient are finite

pytestmark = pytest.mark.filterwarnings("ignore")


def no_norm(channels: int) -> nn.Module:
    return nn.Identity()


def resnet(norm: Any) -> nn.Module:
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10, norm_layer=norm)


def of_a_raw_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: int
) -> Counter[str]:
    images, labels = torch.rand(MICRO_SIZE, 3, 32, 32), torch.arange(MICRO_SIZE)
    criterion = nn.CrossEntropyLoss()
    for _ in range(3):
        with Operations() as operations:
            for _ in range(micro_batches):
                loss = criterion(model(images), labels)
                (loss / micro_batches).backward()
            optimizer.step()
            optimizer.zero_grad()
    return operations.counts


def of_a_step(trainer: Trainer) -> Counter[str]:
    with trainer.run.settings():
        trainer.start()
        for index in range(3):
            with Operations() as operations:
                trainer.train_step(trainer.plan.step(index))
        trainer.end_loading()
    return operations.counts


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, no_norm])
@in_a_fork
def test_a_step_is_the_raw_loops(tmp_path: Path, norm: Any, micro_batches: int) -> None:
    images = torch.randint(256, (MICRO_SIZE * micro_batches * 4, 3, 32, 32))
    data = ImageArrays(images.to(torch.uint8), torch.randint(10, (len(images),)))
    settings = config(
        tmp_path,
        batch__size=MICRO_SIZE * micro_batches,
        batch__micro_size=MICRO_SIZE,
        train__precision="fp32",
        train__log_every=None,
        best__metric="train/loss",
    )
    model = resnet(norm)
    raw_model = copy.deepcopy(model)
    trainer = Trainer(settings, model=model, train_data=data)
    raw_optimizer = torch.optim.SGD(
        raw_model.parameters(),
        lr=0.1,
        momentum=0.9,
        foreach=trainer.optimizer.defaults["foreach"],
        fused=trainer.optimizer.defaults["fused"],
    )
    ours = of_a_step(trainer)
    theirs = of_a_raw_step(raw_model, raw_optimizer, micro_batches)
    more = MORE_OF_A_STEP + MORE_OF_A_MICRO_BATCH * micro_batches
    assert ours.total() <= theirs.total() + more, ours - theirs
