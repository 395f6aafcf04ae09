"""Running statistics, against one process that runs the micro-batches in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    CLASSES,
    Images,
    config,
    conv_net,
    fitted,
    largest_difference,
    state,
)
from trainer import ConfigError, Trainer
from trainer.config.model_sections import BatchNormConfig
from trainer.exact.batch_norm import norm_layers
from trainer.exact.plan import Plan
from trainer.exact.running_statistics import StatisticsShare
from trainer.process.ranks import Ranks
from trainer.storage import checkpoint

# 3 × 28 + 2: with micro-batches of 7, two ranks of three have nothing to do in a last step.
SAMPLES = 86


class SharedNorm(nn.Module):
    """One BatchNorm layer called twice in a forward, and an InstanceNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = (
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
        )
        self.norm, self.instance = (
            nn.BatchNorm2d(4, momentum=0.2),
            nn.InstanceNorm2d(4, track_running_stats=True),
        )
        self.head = nn.Linear(100, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        x = self.instance(torch.tanh(self.norm(self.second(x))))
        return self.head(x.flatten(1))


def plain_pytorch(
    model: nn.Module, micro_size: int, momentum_per_step: bool = False
) -> dict[str, Tensor]:
    """Two epochs of gradient accumulation in one process, as anybody writes it."""
    data = Images(SAMPLES)
    model = model.double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plan = Plan(
        samples=SAMPLES, batch_size=28, micro_size=micro_size, ranks=1, epochs=2, seed=0
    )
    base = [layer.momentum for layer in norm_layers(model)]
    for step in plan.steps():
        order = torch.from_numpy(plan.permutation(step.epoch))[
            step.start : step.start + step.size
        ]
        for layer, momentum in zip(norm_layers(model), base, strict=True):
            if momentum_per_step:
                layer.momentum = 1 - (1 - momentum) ** (1 / len(step.micro_batches))
        for start, stop in step.micro_batches:
            ids = order[start:stop]
            loss = nn.functional.cross_entropy(
                model(data.points[ids]), data.labels[ids], reduction="sum"
            )
            (loss / step.size).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def train(
    directory: Path, make: Any, micro_size: int, **changes: Any
) -> dict[str, Tensor]:
    settings = config(directory, batch__micro_size=micro_size, **changes)
    return state(
        fitted(settings, make(), train_data=Images(SAMPLES), val_data=Images(20))
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("per", ["micro_batch", "step"])
def test_buffers_are_those_of_one_process_in_order(
    tmp_path: Path, ranks: int, per: str
) -> None:
    reference = plain_pytorch(conv_net(momentum=0.3), 7, per == "step")
    assert reference["1.num_batches_tracked"] == 2 * (3 * 4 + 1)
    for buffers in on_ranks(
        ranks,
        train,
        tmp_path,
        lambda: conv_net(momentum=0.3),
        7,
        batch_norm__momentum_per=per,
    ):
        assert largest_difference(buffers, reference) < 1e-12


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resumed_where_ranks_have_nothing_to_do(tmp_path: Path, stop: int) -> None:
    """The short step comes first or early after resuming: no layer's calls are known on two of the ranks, and DDP,
    which agrees on its buckets in the second forward, must not be asked to by one rank alone."""
    reference = plain_pytorch(conv_net(momentum=0.3), 7)
    changes = {"run__resume": "auto", "train__max_steps": stop}
    on_ranks(1, train, tmp_path, lambda: conv_net(momentum=0.3), 7, **changes)
    for buffers in on_ranks(
        3, train, tmp_path, lambda: conv_net(momentum=0.3), 7, run__resume="auto"
    ):
        assert largest_difference(buffers, reference) < 1e-12


@pytest.mark.parametrize("ranks", [2, 3])
def test_layers_called_twice_and_instance_norm(tmp_path: Path, ranks: int) -> None:
    reference = plain_pytorch(SharedNorm(), 7)
    for buffers in on_ranks(ranks, train, tmp_path, SharedNorm, 7):
        assert largest_difference(buffers, reference) < 1e-12


def test_a_step_ages_the_statistics_alike_however_it_is_cut(tmp_path: Path) -> None:
    """With momentum_per=step, what a step leaves of the statistics before it does not depend on M."""

    def remainder_of_start(directory: Path, micro_size: int) -> Tensor:
        model = conv_net()
        model[1].running_mean.fill_(1e9)  # so far off that only its remainder is seen
        settings = config(
            directory,
            batch__micro_size=micro_size,
            batch_norm__momentum_per="step",
            train__max_steps=3,
        )
        trainer = fitted(
            settings, model, train_data=Images(SAMPLES), val_data=Images(20)
        )
        return trainer.module.state_dict()["1.running_mean"]

    for micro_size in (28, 7, 4):
        (remainder,) = on_ranks(
            1, remainder_of_start, tmp_path / str(micro_size), micro_size
        )
        assert torch.allclose(
            remainder, torch.tensor(1e9 * 0.9**3, dtype=torch.float64), rtol=1e-7
        )


# 28 samples in 4 micro-batches, or 3 × 2.
@pytest.mark.parametrize(("ranks", "cuts"), [(1, 4), (2, 2), (3, 2)])
def test_with_sync_the_micro_batches_of_all_ranks_at_once_are_one_update(
    ranks: int, cuts: int
) -> None:
    def momentum() -> float:
        model = conv_net(momentum=0.3)
        section = BatchNormConfig(mode="sync", momentum_per="step")
        plan = Plan(
            samples=28,
            batch_size=28,
            micro_size=7,
            ranks=ranks,
            epochs=1,
            seed=0,
            equal_ranks=True,
        )
        StatisticsShare(model, section, Ranks("fp64")).begin(plan.step(0))
        return float(model[1].momentum)

    for spread in on_ranks(ranks, momentum):
        assert (1 - spread) ** cuts == pytest.approx(0.7, rel=1e-12)


def test_frozen_layers_stay_as_they_were(tmp_path: Path) -> None:
    def run(directory: Path) -> tuple[dict[str, Tensor], bool]:
        model = conv_net()
        model[1].running_mean.fill_(0.25)
        settings = config(directory, batch__micro_size=7, batch_norm__mode="frozen")
        trainer = fitted(
            settings, model, train_data=Images(SAMPLES), val_data=Images(20)
        )
        trainer.module.train()
        return state(trainer), trainer.module[1].training

    after, training = on_ranks(2, run, tmp_path)[0]
    assert not training
    before = conv_net().double().state_dict()
    for name in ("1.weight", "1.bias", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(after[name], before[name])
    assert torch.equal(
        after["1.running_mean"], torch.full((4,), 0.25, dtype=torch.float64)
    )
    assert not torch.equal(after["0.weight"], before["0.weight"])


def test_recalibration_gives_the_statistics_of_all_samples(tmp_path: Path) -> None:
    """The first layer's inputs do not depend on normalisation, so its population is known exactly."""

    def run(directory: Path) -> tuple[dict[str, Tensor], int]:
        settings = config(
            directory,
            batch__micro_size=7,
            batch_norm__recalibrate=100,
            train__epochs=1,
            optimizer__lr=0.0,
        )
        trainer = fitted(
            settings, conv_net(), train_data=Images(SAMPLES), val_data=Images(20)
        )
        return state(trainer), int(trainer.module[1].num_batches_tracked)

    with torch.no_grad():
        inputs = (
            conv_net()[0].double()(Images(SAMPLES).points).transpose(0, 1).flatten(1)
        )
    for ranks in (1, 3):
        for after, counter in on_ranks(ranks, run, tmp_path / str(ranks)):
            assert torch.allclose(
                after["1.running_mean"], inputs.mean(1), rtol=1e-12, atol=1e-14
            )
            assert torch.allclose(after["1.running_var"], inputs.var(1), rtol=1e-12)
            assert counter == 13  # recalibration is no training


def test_cumulative_momentum_and_sync_on_the_cpu_are_refused(tmp_path: Path) -> None:
    def refused(directory: Path, momentum: float | None, mode: str) -> str:
        settings = config(directory, batch__micro_size=7, batch_norm__mode=mode)
        with pytest.raises(ConfigError) as caught:
            Trainer(
                settings,
                model=conv_net(momentum=momentum),
                train_data=Images(),
                val_data=Images(),
            )
        return str(caught.value)

    for message in on_ranks(2, refused, tmp_path, None, "micro"):
        assert "batch_norm.momentum" in message
    for message in on_ranks(2, refused, tmp_path, 0.1, "sync"):
        assert "GPU" in message
        assert "batch_norm.mode=micro" in message


def test_the_configs_momentum_counts(tmp_path: Path) -> None:
    reference = plain_pytorch(conv_net(momentum=0.3), 7)
    for buffers in on_ranks(2, train, tmp_path, conv_net, 7, batch_norm__momentum=0.3):
        assert largest_difference(buffers, reference) < 1e-12


def test_recalibration_at_the_end_leaves_no_trace_in_the_run(tmp_path: Path) -> None:
    """The run's own statistics are in its last checkpoint, the population's in the model it ends with."""

    def run(directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        settings = config(
            directory,
            batch__micro_size=7,
            batch_norm__recalibrate=100,
            batch_norm__recalibrate_at="end",
            optimizer__lr=0.0,
        )
        trainer = fitted(
            settings, conv_net(), train_data=Images(SAMPLES), val_data=Images(20)
        )
        return state(trainer), checkpoint.load(
            directory / "run" / "checkpoints" / "step_00000008"
        ).model

    with torch.no_grad():
        inputs = (
            conv_net()[0].double()(Images(SAMPLES).points).transpose(0, 1).flatten(1)
        )
    for after, saved in on_ranks(2, run, tmp_path):
        assert torch.allclose(after["1.running_var"], inputs.var(1), rtol=1e-12)
        assert not torch.allclose(saved["1.running_var"], inputs.var(1), rtol=1e-3)
