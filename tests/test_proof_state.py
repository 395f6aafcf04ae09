"""The proof names what a forward changes outside the run's order, and what is in no checkpoint."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.distributed.small import CLASSES, Points, config
from trainer import Task, Trainer, WeightedSum
from trainer.core.proof.finding import Finding


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Right(Base):
    """Moves what may move, and keeps a map for somebody to look at."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.body = parametrizations.spectral_norm(nn.Linear(6, 6))
        self.old = nn.utils.spectral_norm(nn.Linear(6, 6))
        self.split = nn.utils.weight_norm(nn.Linear(6, 6))
        self.register_buffer("mean", torch.zeros(6), persistent=False)
        self.map: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x - self.mean)
        self.mean = self.mean * 0.9 + 0.1 * x.detach().mean(0)
        self.map = self.old(self.split(self.body(x))).softmax(1)
        return super().forward(x * self.map)


class Counter(Base):
    """Counts its forwards; nothing shows of it until the tenth."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (2 if self.calls > 10 else 1)


class InList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(float(x.detach().sum()))
        return super().forward(x)


class Momentum(Base):
    """A teacher that follows within the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(6, CLASSES).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.teacher.weight.lerp_(self.linear.weight.detach(), 0.1)
        return super().forward(x)


class Copied(Base):
    """A momentum encoder as most begin: a copy, to which following does nothing before the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = deepcopy(self.linear).requires_grad_(False)

    @torch.no_grad()
    def follow(self) -> None:
        for mine, its in zip(
            self.teacher.parameters(), self.linear.parameters(), strict=True
        ):
            mine.lerp_(its, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.follow()
        return super().forward(x) + 0.1 * self.teacher(x)


class Clipped(Base):
    """A critic that keeps its weights small by itself."""

    def forward(self, x: Tensor) -> Tensor:
        self.linear.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class CountingLoss(Task):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        self.calls += 1
        return WeightedSum(
            F.cross_entropy(output, targets, reduction="sum"), len(targets)
        )


class Closed:
    """Holds a number where no checkpoint finds it."""

    __slots__ = ("t",)

    def __init__(self) -> None:
        self.t = 0


class Hidden(torch.optim.SGD):
    """Its rate falls with a number in an object of its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.clock = Closed()

    def step(self, closure: Any = None) -> None:
        self.clock.t += 1
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(parameter.grad, alpha=group["lr"] / self.clock.t)


def findings(
    directory: Path, model: nn.Module, task: Task | None = None, **changes: Any
) -> list[Finding]:
    data = Points(ignored=False)
    settings = config(directory, batch__micro_size=7, **changes)
    trainer = Trainer(settings, model=model, train_data=data, task=task)
    before = {n: t.clone() for n, t in trainer.module.state_dict().items()}
    trainer.prove()
    assert "moved" in trainer.proof.checks or trainer.proof.findings
    for name, tensor in trainer.module.state_dict().items():
        assert torch.equal(tensor, before[name]), "the proof leaves no trace"
    return trainer.proof.findings


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
def test_what_is_in_order_passes(tmp_path: Path) -> None:
    data = Points(ignored=False)
    settings = config(tmp_path, batch__micro_size=7)
    trainer = Trainer(settings, model=Right(), train_data=data)
    trainer.prove()
    assert trainer.proof.findings == []
    assert trainer.proof.skipped == []


@pytest.mark.parametrize(
    ("model", "task", "what"),
    [
        (Counter, None, "a training forward keeps calls,"),
        (InList, None, "a training forward keeps seen,"),
        (Momentum, None, "writes parameters: teacher.weight"),
        (Copied, None, "writes parameters: teacher.weight"),
        (Clipped, None, "writes parameters: linear.weight"),
        (Base, CountingLoss, "keeps loss/calls,"),
    ],
)
def test_what_moves_by_itself_is_named(
    tmp_path: Path, model: Any, task: Any, what: str
) -> None:
    [finding] = findings(tmp_path, model(), task and task())
    assert finding.check == "moved"
    assert what in finding.what


def test_what_is_in_no_checkpoint_is_named(tmp_path: Path) -> None:
    [finding] = findings(
        tmp_path,
        Base(),
        optimizer__name=f"{__name__}.Hidden",
        optimizer__momentum=None,
    )
    assert finding.check == "rebuild"
    assert "the step after a checkpoint is another one" in finding.what
