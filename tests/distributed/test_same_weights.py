"""Ranks whose weights have parted stop, all with one message, before anything of it is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Images, config, conv_net
from trainer import LockstepError, Observer, Trainer
from trainer.core.run import Run
from trainer.exact.plan import Step

PARTS_AT = 6  # the second step of the second epoch


class Parts(Observer):
    """Changes one element of a tensor on the last rank."""

    def __init__(self, name: str) -> None:
        self.name = name

    def begin(self, run: Run) -> None:
        self.run = run

    @torch.no_grad()
    def step(self, step: Step) -> None:
        is_last = self.run.ranks.rank == self.run.ranks.count - 1
        if step.number == PARTS_AT and is_last:
            tensor = self.run.module.state_dict()[self.name]
            tensor[-1].mul_(1 + 1e-15).add_(1e-300)


class Sums(nn.Module):
    """Keeps the sum of what this rank has seen in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += x.detach().sum()
        return x


def message(directory: Path, name: str, reproducibility: str, every: int | None) -> str:
    settings = config(
        directory,
        batch__micro_size=7,
        run__reproducibility=reproducibility,
        train__checkpoint_every=every,
    )
    data = Images()
    trainer = Trainer(
        settings,
        model=conv_net(),
        train_data=data,
        val_data=data,
        observers=[Parts(name)],
    )
    with pytest.raises(LockstepError) as caught:
        trainer.fit()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "reproducibility", "every", "last_kept"),
    [
        ("4.weight", "standard", None, "step_00000004"),
        ("1.running_var", "bitwise", None, "step_00000004"),
        ("0.bias", "bitwise", 1, "step_00000005"),
    ],
)
def test_a_difference_stops_the_run(
    tmp_path: Path, name: str, reproducibility: str, every: int | None, last_kept: str
) -> None:
    messages = on_ranks(3, message, tmp_path, name, reproducibility, every)
    assert len(set(messages)) == 1
    noticed_after = PARTS_AT if every else 8
    assert f"after step {noticed_after}, " in messages[0]
    assert f" {name} on rank 2 on " in messages[0]
    assert (tmp_path / "run/checkpoints/last").read_text().strip() == last_kept


@pytest.mark.parametrize("reproducibility", ["standard", "bitwise"])
def test_what_forwards_move_does_not_part(tmp_path: Path, reproducibility: str) -> None:
    """It follows a rule, so it is compared as the weights are."""

    def run(directory: Path) -> float:
        settings = config(
            directory, batch__micro_size=7, run__reproducibility=reproducibility
        )
        sums = Sums()
        net = nn.Sequential(sums, conv_net())
        Trainer(settings, model=net, train_data=Images(), val_data=Images()).fit()
        return float(sums.seen)

    first, second = on_ranks(2, run, tmp_path)
    assert first == second != 0


class WithTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()
        self.teacher = conv_net().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + 0.1 * self.teacher.eval()(x)


class Follows(Observer):
    """Copies running statistics into a teacher after each step, where a rank holds its share of them."""

    def begin(self, run: Run) -> None:
        self.module = run.module

    def step(self, step: Step) -> None:
        self.module.teacher.load_state_dict(self.module.net.state_dict())


def stopped(directory: Path) -> str:
    trainer = Trainer(
        config(directory, batch__micro_size=7),
        model=WithTeacher(),
        train_data=Images(),
        observers=[Follows()],
    )
    with pytest.raises(LockstepError) as caught:
        trainer.fit()
    return str(caught.value)


def test_an_observer_that_reads_a_share_is_told_how(tmp_path: Path) -> None:
    for text in on_ranks(2, stopped, tmp_path):
        assert "teacher.1.running_" in text
        assert "says `reads_statistics = True`" in text
