"""Buffers that a forward moves, against a plain loop that keeps the documented rule.

Every micro-batch starts from the step's first buffers, and the step ends with what its last micro-batch left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    CLASSES,
    Points,
    config,
    largest_difference,
)
from trainer import (
    ConfigError,
    Observer,
    Run,
    Step,
    Task,
    Trainer,
    WeightedSum,
)
from trainer.exact.plan import Plan

SAMPLES = 86  # 3 × 28 + 2: two ranks of three have nothing to do in a last step
MICRO = 7


class Tracking(nn.Module):
    """What people keep in buffers: a mean by hand, a codebook, a counter, a flag; some of them replaced."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = parametrizations.spectral_norm(nn.Linear(6, 8))
        self.second = nn.utils.spectral_norm(nn.Linear(8, CLASSES))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("codes", torch.randn(5, 8))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("is_ready", torch.zeros((), dtype=torch.bool))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.register_buffer("fixed", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - self.mean
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
            self.count += 1
            self.is_ready.fill_(True)
            self.hidden = self.hidden * 0.9 + x.detach()[:3, 0].sum()
        h = torch.tanh(self.first(centred))
        nearest = torch.cdist(h.detach(), self.codes).argmin(1)
        h = h + 0.1 * self.codes[nearest] + 1e-3 * self.hidden.sum()
        if self.training:
            used = F.one_hot(nearest, 5).to(h.dtype)
            self.codes = 0.9 * self.codes + 0.1 * used.T @ h.detach()
        return self.second(h) * self.fixed.mean() * (1 + 0.01 * self.count)


class HandNorm(nn.Module):
    """torch's function on buffers of one's own, which it writes without marking them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(6, CLASSES)
        self.register_buffer("seen_mean", torch.zeros(6))
        self.register_buffer("seen_var", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        F.batch_norm(x, self.seen_mean, self.seen_var, training=self.training)
        return self.linear((x - self.seen_mean) / (self.seen_var + 1e-5).sqrt())


class MovingLoss(Task):
    """A loss with a running scale."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        losses = F.cross_entropy(output, targets, reduction="none")
        losses = losses / self.scale.clone()
        if self.training:
            self.scale.lerp_(losses.detach().mean(), 0.2)
        return WeightedSum(losses.sum(), len(targets))


def plain(
    make: Callable[[], nn.Module], make_loss: Callable[[], Any] = MovingLoss
) -> dict[str, Tensor]:
    """Two epochs in one process, with the rule written out."""
    data = Points(SAMPLES, ignored=False)
    model, loss = make().double().train(), make_loss().double().train()
    model.to(torch.float64)
    optimizer = torch.optim.SGD(
        [*model.parameters(), *loss.parameters()], lr=0.1, momentum=0.9
    )
    plan = Plan(
        samples=SAMPLES, batch_size=28, micro_size=MICRO, ranks=1, epochs=2, seed=0
    )
    owners = [
        (module, key)
        for root in (model, loss)
        for module in root.modules()
        for key in module._buffers
    ]
    for step in plan.steps():
        start = [module._buffers[key].clone() for module, key in owners]  # type: ignore[union-attr]
        order = torch.from_numpy(plan.permutation(step.epoch))[step.start :]
        for first, end in step.micro_batches:
            for (module, key), value in zip(owners, start, strict=True):
                module._buffers[key] = value.clone()
            ids = order[first:end]
            total, _ = loss.loss_sum(model(data.points[ids]), data.labels[ids])
            (total / step.size).backward()
        optimizer.step()
        optimizer.zero_grad()
    return everything(model, loss)


def everything(model: nn.Module, loss: nn.Module) -> dict[str, Tensor]:
    tensors = {}
    for prefix, root in (("", model), ("loss/", loss)):
        for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
            tensors[prefix + name] = tensor.detach().double().clone()
    return tensors


def run(
    directory: Path,
    make: Callable[[], nn.Module],
    make_loss: Callable[[], Any] = MovingLoss,
    observers: Sequence[Observer] = (),
    **changes: Any,
) -> dict[str, Tensor]:
    settings = config(directory, batch__micro_size=MICRO, run__resume="auto", **changes)
    data = Points(SAMPLES, ignored=False)
    trainer = Trainer(
        settings,
        model=make(),
        train_data=data,
        val_data=data,
        task=make_loss(),
        observers=observers,
    )
    trainer.fit()
    return everything(trainer.module, trainer.run.task)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("make", [Tracking, HandNorm])
def test_the_rule(tmp_path: Path, ranks: int, make: Callable[[], nn.Module]) -> None:
    reference = plain(make)
    for result in on_ranks(ranks, run, tmp_path, make):
        assert largest_difference(result, reference) < 1e-12


def test_bitwise_through_a_stop_on_other_processes(tmp_path: Path) -> None:
    """Buffers of the model that no `state_dict` has, and those of the loss, are in the checkpoint, too."""
    changes = {"run__reproducibility": "bitwise"}
    (reference,) = on_ranks(1, run, tmp_path / "1", Tracking, **changes)
    assert largest_difference(reference, plain(Tracking)) < 1e-12
    for stop, ranks in ((3, 2), (5, 1)):
        on_ranks(
            ranks, run, tmp_path / "cut", Tracking, train__max_steps=stop, **changes
        )
    for result in on_ranks(3, run, tmp_path / "cut", Tracking, **changes):
        assert all(torch.equal(result[name], reference[name]) for name in reference)


@pytest.mark.parametrize("mode", ["standard", "bitwise"])
def test_resumed_on_several_processes(tmp_path: Path, mode: str) -> None:
    """The first step after a resume starts every micro-batch from the buffers of the checkpoint."""
    changes = {"run__reproducibility": mode}
    for stop in (1, 3):
        on_ranks(2, run, tmp_path, Tracking, train__stop_after=stop, **changes)
    reference = plain(Tracking)
    for result in on_ranks(2, run, tmp_path, Tracking, **changes):
        assert largest_difference(result, reference) < 1e-12


class Replacing(Observer):
    """Puts another tensor in a buffer's place after each step, on every rank alike."""

    def begin(self, run: Run) -> None:
        self.module = run.module

    def step(self, step: Step) -> None:
        self.module.mean = self.module.mean.detach() * 0.5


def test_a_buffer_replaced_between_steps(tmp_path: Path) -> None:
    states = []
    for ranks in (1, 2):
        results = on_ranks(
            ranks, run, tmp_path / str(ranks), Tracking, observers=[Replacing()]
        )
        states += results
    for result in states[1:]:
        assert largest_difference(result, states[0]) < 1e-12


def test_two_micro_batches_in_one_forward_are_refused_or_right(tmp_path: Path) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.first = parametrizations.spectral_norm(nn.Linear(6, 8))
            self.second = nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    def refused(directory: Path) -> str:
        try:
            run(directory, Tracking, batch__fuse=2)
        except ConfigError as error:
            return str(error)
        return ""

    (message,) = on_ranks(1, refused, tmp_path / "refused")
    assert "batch.fuse" in message
    assert "mean" in message
    fixed = nn.CrossEntropyLoss
    (reference,) = on_ranks(1, run, tmp_path / "1", Normed, fixed)
    (fused,) = on_ranks(1, run, tmp_path / "4", Normed, fixed, batch__fuse=4)
    assert largest_difference(fused, reference) < 1e-12


class Growing(nn.Module):
    """A memory that grows, and a table that is made anew for longer inputs."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(6, CLASSES)
        self.register_buffer("memory", torch.zeros(0), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.memory) < len(x):
            self.memory = torch.zeros(len(x), dtype=x.dtype)
        return self.linear(x)


def test_a_buffer_of_another_shape(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='buffer "memory" changes its shape'):
        run(tmp_path / "saved", lambda: Growing(True), nn.CrossEntropyLoss)
    run(tmp_path / "made", lambda: Growing(False), nn.CrossEntropyLoss)


class Late(nn.Module):
    """Moves a buffer once its weights have changed: from the second step on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(6, CLASSES)
        self.register_buffer("late", torch.zeros(()))
        self.register_buffer("start", self.linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not torch.equal(self.linear.bias, self.start):
            self.late += x.detach().sum()
        return self.linear(x)


def test_a_buffer_that_moves_later_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "standard", Late, nn.CrossEntropyLoss)
    assert "forward moves late, which it left alone" in " ".join(
        capsys.readouterr().out.split()
    )
    with pytest.raises(ConfigError, match="forward moves late"):
        run(
            tmp_path / "bitwise",
            Late,
            nn.CrossEntropyLoss,
            run__reproducibility="bitwise",
        )


def test_an_evaluation_leaves_buffers_as_they_are(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, CLASSES)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x)

    result = run(tmp_path, Counting, nn.CrossEntropyLoss)
    assert result["calls"] == 8  # of the training steps alone
