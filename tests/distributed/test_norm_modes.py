"""Norm layers that somebody else keeps in eval mode, against one process that runs the micro-batches in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    CLASSES,
    Images,
    config,
    largest_difference,
    state,
)
from trainer import ConfigError, LockstepError, Observer, Trainer
from trainer.core.run import Run
from trainer.exact.plan import Plan, Step

# 3 × 28 + 2: with micro-batches of 7, two ranks of three have nothing to do in a last step.
SAMPLES = 86
MICRO = 7


def block(norm: nn.Module, inputs: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, 4, 3, padding=1), norm, nn.Tanh())


class Net(nn.Module):
    """A block whose norm is in question, one with a norm that trains, and a head."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.body = block(norm(4)), block(nn.BatchNorm2d(4), 4)
        self.head = nn.Linear(100, CLASSES)
        for buffer_name, buffer in self.stem[1].named_buffers():
            if buffer_name.startswith("running_"):
                # Statistics that a model arrives with are far from those of its first batch.
                buffer.copy_(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).flatten(1))


class OwnTrain(Net):
    """The commonest recipe of fine-tuning: the model's own `train` keeps a part of it in eval mode."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.stem.eval()
        return self


class AllEval(Net):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


class Distilled(Net):
    """A teacher within the model, which the model puts in eval mode as it uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Net()
        self.teacher.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher.eval()
            soft = self.teacher(x)
        return super().forward(x) + soft


class UncountedNorm(nn.BatchNorm2d):
    """A forward of its own that calls torch's function and counts nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )


class NormOfOnesOwn(UncountedNorm):
    """As timm's."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return nn.functional.relu(super().forward(x))


class ReplacingNorm(nn.BatchNorm2d):
    """Its running mean becomes another tensor in each forward."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.running_mean = self.running_mean.clone()
        return out


def net_with_instance_norm() -> Net:
    return Net(lambda width: nn.InstanceNorm2d(width, track_running_stats=True))


class EvalInstance(Net):
    def __init__(self) -> None:
        super().__init__(
            lambda width: nn.InstanceNorm2d(width, track_running_stats=True)
        )

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.stem.eval()
        return self


class TwiceCalled(Net):
    """An instance norm, whose counter does not count, called twice."""

    def __init__(self) -> None:
        super().__init__(
            lambda width: nn.InstanceNorm2d(width, track_running_stats=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.body(self.stem[1](x)).flatten(1))


class FromEpoch1(Observer):
    """Puts a part of the model in another mode when an epoch begins."""

    def __init__(self, mode: bool) -> None:
        self.mode = mode

    def begin(self, run: Run) -> None:
        self.module = run.module

    def step(self, step: Step) -> None:
        if step.epoch == 0 and step.last_in_epoch:
            self.module.stem.train(self.mode)


def loop(
    make: Callable[[], nn.Module],
    change: bool | None = None,
    loss_of: Callable[[], nn.Module] | None = None,
) -> dict[str, Tensor]:
    """Two epochs of gradient accumulation in one process, as anybody writes it."""
    data, model = Images(SAMPLES), make().double().train()
    loss = None if loss_of is None else loss_of().double()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9
    )
    plan = Plan(
        samples=SAMPLES, batch_size=28, micro_size=MICRO, ranks=1, epochs=2, seed=0
    )
    for step in plan.steps():
        order = torch.from_numpy(plan.permutation(step.epoch))[
            step.start : step.start + step.size
        ]
        for start, stop in step.micro_batches:
            ids = order[start:stop]
            output, labels = model(data.points[ids]), data.labels[ids]
            if loss is None:
                total = nn.functional.cross_entropy(output, labels, reduction="sum")
            else:
                total, _ = loss.loss_sum(output, labels)  # type: ignore[operator]
            (total / step.size).backward()
        optimizer.step()
        optimizer.zero_grad()
        if change is not None and step.epoch == 0 and step.last_in_epoch:
            model.stem.train(change)  # type: ignore[union-attr]
    return model.state_dict()


def run(
    directory: Path,
    make: Callable[[], nn.Module],
    change: bool | None = None,
    loss_of: Callable[[], nn.Module] | None = None,
    **changes: Any,
) -> dict[str, Tensor]:
    settings = config(directory, batch__micro_size=MICRO, **changes)
    trainer = Trainer(
        settings,
        model=make(),
        train_data=Images(SAMPLES),
        val_data=Images(20),
        observers=[] if change is None else [FromEpoch1(change)],
        task=None if loss_of is None else loss_of(),
    )
    trainer.fit()
    return state(trainer)


class EvalAtFirst(Net):
    """In eval mode until somebody says otherwise."""

    def train(self, mode: bool = True) -> nn.Module:
        was = self.stem.training and hasattr(self, "began")
        super().train(mode)
        self.began = True
        if mode and not was:
            self.stem.eval()
        return self


NETS: dict[str, Callable[[], nn.Module]] = {
    "own train": OwnTrain,
    "all in eval": AllEval,
    "teacher": Distilled,
    "own norm": lambda: Net(NormOfOnesOwn),
    "uncounted": lambda: Net(UncountedNorm),
    "instance": net_with_instance_norm,
    "eval instance": EvalInstance,
    "called twice": TwiceCalled,
    "torchvision": lambda: Net(FrozenBatchNorm2d),
}


def run_all(directory: Path) -> dict[str, dict[str, Tensor]]:
    return {name: run(directory / name, make) for name, make in NETS.items()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_layers_that_others_keep_in_eval_mode(tmp_path: Path, ranks: int) -> None:
    references = {name: loop(make) for name, make in NETS.items()}
    for results in on_ranks(ranks, run_all, tmp_path):
        for name, reference in references.items():
            assert largest_difference(results[name], reference) < 1e-12, name


class Skipping(Net):
    """A block that some micro-batches leave out, as layer drop does."""

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0, 0, 0] > 0:
            return super().forward(x)
        return self.head(self.body[0](self.stem(x)).flatten(1))


class Attacked(Net):
    """Adversarial training: the attack sees the model in eval mode, the update in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self.eval()
        with torch.no_grad():
            x = x + 0.01 * super().forward(x).mean()
        self.train()
        return super().forward(x)


class OneRankInEval(Observer):
    def begin(self, run: Run) -> None:
        if run.ranks.rank == 1:
            run.module.stem.eval()


def refused(directory: Path, make: Callable[[], nn.Module], mode: str) -> str:
    try:
        run(directory, make, run__reproducibility=mode)
    except LockstepError as error:
        return str(error)
    except RuntimeError:  # the other rank has ended
        return ""
    return "trained"


@pytest.mark.parametrize("mode", ["standard", "bitwise"])
def test_what_ranks_cannot_know_of_one_another_is_refused_by_name(
    tmp_path: Path, mode: str
) -> None:
    messages = on_ranks(2, refused, tmp_path / "1", Skipping, mode)
    assert 'norm layer "body.1" is called more often' in "".join(messages)
    messages = on_ranks(2, refused, tmp_path / "3", lambda: Net(ReplacingNorm), mode)
    assert 'norm layer "stem.1" replaces' in "".join(messages)


class SharingNet(Net):
    """Two layers that keep their statistics in the same buffers."""

    def __init__(self) -> None:
        super().__init__()
        first, second = self.stem[1], self.body[1]
        assert isinstance(first, nn.BatchNorm2d)
        assert isinstance(second, nn.BatchNorm2d)
        second.running_mean = first.running_mean


def converted() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(Net())  # type: ignore[no-untyped-call,no-any-return]


def refused_each(
    directory: Path, makers: list[Callable[[], nn.Module]], mode: str
) -> list[str]:
    return [refused(directory, make, mode) for make in makers]


@pytest.mark.parametrize("mode", ["standard", "bitwise"])
def test_layers_whose_statistics_are_not_their_own_are_refused_by_name(
    tmp_path: Path, mode: str
) -> None:
    messages = on_ranks(2, refused_each, tmp_path, [SharingNet, converted], mode)
    for of_sharing, of_converted in messages:
        assert 'norm layers "stem.1" and "body.1" share' in of_sharing
        assert 'layer "stem.1" of the model is a SyncBatchNorm already' in of_converted


def test_a_layer_that_is_trained_and_read_needs_bitwise(tmp_path: Path) -> None:
    for message in on_ranks(2, refused, tmp_path / "2", Attacked, "standard"):
        assert 'norm layer "stem.1" is called in training and in eval mode' in message
    (reference,) = on_ranks(
        1, run, tmp_path / "b1", Attacked, run__reproducibility="bitwise"
    )
    for result in on_ranks(
        2, run, tmp_path / "b2", Attacked, run__reproducibility="bitwise"
    ):
        assert all(torch.equal(result[name], reference[name]) for name in reference)


def test_another_mode_on_another_rank_is_refused(tmp_path: Path) -> None:
    def begin(directory: Path) -> str:
        settings = config(directory, batch__micro_size=MICRO)
        data = Images(SAMPLES)
        observers: list[Observer] = [OneRankInEval()]
        try:
            Trainer(settings, model=Net(), train_data=data, observers=observers).fit()
        except ConfigError as error:
            return str(error)
        return ""

    for message in on_ranks(2, begin, tmp_path):
        assert '"stem.1" is in training mode on some ranks' in message


@pytest.mark.parametrize("make", [OwnTrain, Distilled, TwiceCalled])
def test_bitwise_is_the_same_and_right(
    tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    reference = loop(make)
    results = []
    for ranks in (1, 3):
        results += on_ranks(
            ranks, run, tmp_path / str(ranks), make, run__reproducibility="bitwise"
        )
    assert largest_difference(results[0], reference) < 1e-12
    for result in results:
        assert all(torch.equal(result[name], results[0][name]) for name in reference)


@pytest.mark.parametrize("to", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_mode_that_changes_at_an_epoch(tmp_path: Path, ranks: int, to: bool) -> None:
    """Also where an evaluation puts the whole model into eval mode and back in between."""
    make = EvalAtFirst if to else Net
    reference = loop(make, change=to)
    for result in on_ranks(ranks, run, tmp_path, make, change=to):
        assert largest_difference(result, reference) < 1e-12
