"""What checkpoints keep besides weights and optimizer state, and what observers read of running statistics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    CLASSES,
    Images,
    Points,
    config,
    conv_net,
    largest_difference,
    mlp,
    state,
)
from tests.distributed.test_norm_modes import Net
from trainer import ConfigError, Observer, Trainer
from trainer.core.run import Run
from trainer.exact.plan import Step

SAMPLES, MICRO = 86, 7


class Averaged(Observer):
    """An averaged model as torch has it, which copies the model's buffers at each update."""

    def begin(self, run: Run) -> None:
        self.module = run.module
        self.average = AveragedModel(
            run.module, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True
        )

    def step(self, step: Step) -> None:
        self.average.update_parameters(self.module)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        self.average.load_state_dict(state["average"])


class Reading(Observer):
    """Reads a running mean after each step, and keeps no state."""

    reads_statistics = True

    def begin(self, run: Run) -> None:
        self.module, self.total = run.module, 0.0

    def step(self, step: Step) -> None:
        self.total += float(self.module[1].running_mean.sum())


def observed(directory: Path) -> tuple[dict[str, Tensor], float]:
    settings = config(directory, batch__micro_size=MICRO)
    average, reading = Averaged(), Reading()
    trainer = Trainer(
        settings,
        model=conv_net(momentum=0.3),
        train_data=Images(SAMPLES),
        val_data=Images(20),
        observers=[average, reading],
    )
    trainer.fit()
    return average.average.state_dict(), reading.total


def test_observers_find_the_true_statistics(tmp_path: Path) -> None:
    ((reference, total),) = on_ranks(1, observed, tmp_path / "1")
    for result, other in on_ranks(3, observed, tmp_path / "3"):
        assert largest_difference(result, reference) < 1e-12
        assert other == pytest.approx(total, rel=1e-12)


class ToEval(Observer):
    """Puts a part of the model into eval mode once, in its first epoch."""

    def begin(self, run: Run) -> None:
        self.module = run.module

    def step(self, step: Step) -> None:
        if step.number == 2:
            self.module.stem.eval()


def fine_tuned(directory: Path, **changes: Any) -> dict[str, Tensor]:
    settings = config(directory, batch__micro_size=MICRO, run__resume="auto", **changes)
    trainer = Trainer(
        settings,
        model=Net(),
        train_data=Images(SAMPLES),
        val_data=Images(20),
        observers=[ToEval()],
    )
    trainer.fit()
    assert not trainer.module.stem.training  # type: ignore[union-attr]
    return state(trainer)


@pytest.mark.parametrize("recalibrate", [0, 2])
def test_a_mode_survives_evaluation_recalibration_and_a_stop(
    tmp_path: Path, recalibrate: int
) -> None:
    changes = {"batch_norm__recalibrate": recalibrate}
    (reference,) = on_ranks(1, fine_tuned, tmp_path / "1", **changes)
    on_ranks(2, fine_tuned, tmp_path / "cut", train__max_steps=5, **changes)
    for result in on_ranks(3, fine_tuned, tmp_path / "cut", **changes):
        assert largest_difference(result, reference) < 1e-12


class Scheduled(nn.Module):
    """Keeps what no tensor can hold, as `get_extra_state` is for, and computes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.forwards = mlp(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += self.training
        return self.net(x) / (1 + self.forwards)

    def get_extra_state(self) -> dict[str, int]:
        return {"forwards": self.forwards}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.forwards = state["forwards"]


class Counting(torch.optim.SGD):
    """By hand: its rate falls with a number of its own, which its `state_dict` has."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.t = 0

    def step(self, closure: Any = None) -> None:
        self.t += 1
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(parameter.grad, alpha=group["lr"] / self.t)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"t": self.t}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.t = state_dict["t"]
        super().load_state_dict(
            {name: value for name, value in state_dict.items() if name != "t"}
        )


def stateful(directory: Path, **changes: Any) -> dict[str, Tensor]:
    settings = config(
        directory,
        batch__micro_size=28,
        run__resume="auto",
        optimizer__name=f"{__name__}.Counting",
        optimizer__momentum=None,
        **changes,
    )
    data = Points(84, ignored=False)
    trainer = Trainer(settings, model=Scheduled(), train_data=data, val_data=data)
    trainer.fit()
    return {
        name: tensor
        for name, tensor in trainer.module.state_dict().items()
        if isinstance(tensor, Tensor)
    }


def test_extra_state_of_model_and_optimizer_travels(tmp_path: Path) -> None:
    (reference,) = on_ranks(1, stateful, tmp_path / "1")
    on_ranks(1, stateful, tmp_path / "cut", train__max_steps=3)
    (resumed,) = on_ranks(1, stateful, tmp_path / "cut")
    assert all(torch.equal(resumed[name], reference[name]) for name in reference)


def test_a_run_without_such_state_has_no_such_files(tmp_path: Path) -> None:
    data = Points(SAMPLES, ignored=False)
    trainer = Trainer(
        config(tmp_path, batch__micro_size=MICRO, loss__class_weights=[1.0] * CLASSES),
        model=mlp(),
        train_data=data,
        val_data=data,
    )
    trainer.fit()
    checkpoints = tmp_path / "run" / "checkpoints"
    newest = checkpoints / (checkpoints / "last").read_text().strip()
    assert not [path for path in newest.iterdir() if "further" in path.name]
    assert "stateful" not in json.loads((newest / "state.json").read_text())
    assert not (tmp_path / "run" / "best" / "further.json").exists()


def test_the_name_is_taken(tmp_path: Path) -> None:
    make: Callable[[], nn.Module] = mlp
    with pytest.raises(ConfigError, match=r"stateful\.Further: .*choose another name"):
        Trainer(
            config(tmp_path),
            model=make(),
            train_data=Points(SAMPLES),
            stateful={"Further": mlp()},
        )
