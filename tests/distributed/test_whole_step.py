"""A loss over all outputs of a step is the same on any number of processes, and what plain PyTorch computes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    SAMPLES,
    Images,
    Points,
    config,
    conv_net,
    largest_difference,
    mlp,
    tensors_of,
)
from trainer import ConfigError, MicroBatch, Observer, Step, Task, Trainer, WeightedSum
from trainer.exact.plan import Plan

BATCH = 28
MICRO = 10  # 3 micro-batches, and 2 in an epoch's last step: then one of 3 ranks has nothing to do


class Pairs(Task):
    """Every sample against all others of the step: with a head, a temperature, a moving centre and ignored targets."""

    whole_step = True
    compares_samples = True
    metrics = ("spread",)
    directions: Mapping[str, str] = {"spread": "max"}

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.head = nn.Linear(4, 3)
        self.dropout = nn.Dropout(dropout)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("center", torch.zeros(3))

    def predict(self, model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        features = self.dropout(model(inputs))
        return {"points": self.head(features), "features": features}

    def loss_sum(self, output: dict[str, Tensor], targets: Tensor) -> WeightedSum:
        points = output["points"] - self.center
        scores = points @ points.T / self.temperature
        same = (targets.unsqueeze(1) == targets).to(scores.dtype)
        counted = targets >= 0
        losses = -(scores.log_softmax(1) * same).sum(1)[counted]
        if self.training:
            with torch.no_grad():
                self.center.lerp_(points.mean(0), 0.1)
        total = losses.sum() + 0.01 * output["features"].square().sum()
        return WeightedSum(total, counted.sum())

    def metric_sums(self, output: Any, targets: Tensor) -> dict[str, WeightedSum]:
        return {"spread": WeightedSum(output["points"].var(), 1)}


class Damaged(Points):
    """One sample cannot be read, and one makes the loss of its whole step NaN."""

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i == 3:
            raise ValueError("damaged")
        point, label = super().__getitem__(i)
        return (point * float("nan") if i == 7 else point), label


def net(kind: str) -> tuple[nn.Module, Any]:
    if kind == "norm":
        return conv_net(momentum=0.3), Images()
    return mlp(), Damaged() if kind == "damaged" else Points()


def plain(kind: str, micro_size: int = MICRO, steps: int = 8) -> dict[str, Tensor]:
    """Plain PyTorch: all micro-batches with their graph, their outputs joined, one loss, one backward."""
    model, data = net(kind)
    model, task = model.double(), Pairs().double()
    trained = [*model.parameters(), *task.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    plan = Plan(
        samples=SAMPLES,
        batch_size=BATCH,
        micro_size=micro_size,
        ranks=1,
        epochs=2,
        seed=0,
    )
    for step in itertools.islice(plan.steps(), steps):
        order = torch.from_numpy(plan.permutation(step.epoch))[step.start :]
        outputs = []
        for first, end in step.micro_batches:
            outputs.append(task.predict(model, data.points[order[first:end]]))
        whole = {key: torch.cat([o[key] for o in outputs]) for key in outputs[0]}
        total, weight = task.loss_sum(whole, data.labels[order[: step.size]])
        (total / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    return tensors_of(model, task)


class Passes(Observer):
    """Are the outputs of both passes the same bits?"""

    def __init__(self) -> None:
        self.are_equal: list[bool] = []

    def micro_batch(
        self, step: Step, batch: MicroBatch, output: Any, loss: WeightedSum
    ) -> None:
        first, end = batch.indices
        rows = slice(step.micro_batches[first][0], step.micro_batches[end - 1][1])
        assert self.trainer.whole_step is not None
        before = self.trainer.whole_step._output
        for key, tensor in output.items():
            self.are_equal.append(torch.equal(before[key][rows], tensor))


def fit(directory: Path, kind: str, dropout: float = 0.0, **changes: Any) -> Any:
    model, data = net(kind)
    changes = {"batch__size": BATCH, "batch__micro_size": MICRO} | changes
    settings = config(directory, run__resume="auto", **changes)
    passes = Passes()
    trainer = Trainer(
        settings,
        model=model,
        train_data=data,
        val_data=Points() if kind == "damaged" else data,
        task=Pairs(dropout),
        observers=[passes],
    )
    passes.trainer = trainer  # type: ignore[attr-defined]
    summary = trainer.fit()
    if kind != "damaged":  # NaN is not equal to itself
        assert all(passes.are_equal)
    facts = [summary.get(key) for key in ("best", "skipped_steps", "bad_samples")]
    return tensors_of(trainer.module, trainer.run.task), facts


def several(directory: Path) -> list[Any]:
    """Of the same processes: with norm layers, fused, and cut otherwise."""
    return [
        fit(directory / "norm", "norm"),
        fit(directory / "fused", "norm", batch__micro_size=7, batch__fuse=2),
        fit(directory / "points", "points"),
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_equals_plain_pytorch(tmp_path: Path, ranks: int) -> None:
    """Without norm layers it is the run of one micro-batch that has the whole step."""
    norm, fused, whole = plain("norm"), plain("norm", 7), plain("points", BATCH)
    for results in on_ranks(ranks, several, tmp_path):
        assert largest_difference(results[0][0], norm) < 1e-12
        assert largest_difference(results[1][0], fused) < 1e-12
        assert largest_difference(results[2][0], whole) < 1e-12


def bitwise(directory: Path, **changes: Any) -> list[Any]:
    settings = {"run__reproducibility": "bitwise"} | changes
    less = {
        "train__precision": "bf16",
        "train__non_finite": "skip",
        "data__bad_samples": "quarantine",
    }
    return [
        fit(directory / "norm", "norm", dropout=0.4, **settings),
        fit(directory / "less", "damaged", dropout=0.4, **less, **settings),
    ]


def test_bit_for_bit_on_any_processes_and_resumed(tmp_path: Path) -> None:
    """With dropout, which draws the same in both passes (`Passes`); without some samples and steps."""
    (reference,) = on_ranks(1, bitwise, tmp_path / "1")
    on_ranks(2, bitwise, tmp_path / "cut", train__max_steps=3)
    results = on_ranks(2, bitwise, tmp_path / "2")
    results += on_ranks(3, bitwise, tmp_path / "cut")
    for of_rank in results:
        for (tensors, facts), (expected, expected_facts) in zip(
            of_rank, reference, strict=True
        ):
            assert facts == expected_facts
            for name, tensor in expected.items():
                assert torch.equal(tensors[name], tensor), name
    # 4 steps an epoch, of 3 + 3 + 3 + 2 micro-batches.
    assert reference[0][0]["1.num_batches_tracked"] == 22
    assert reference[1][1][1:] == [2, 1]  # skipped once an epoch


class Unsteady(Pairs):
    """Answers otherwise in every forward, and no buffer says so."""

    calls = 0

    def predict(self, model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        points = self.head(model(inputs)) * (1 + self.calls % 5)
        return {"points": points, "features": points}


class Scalar(Pairs):
    def predict(self, model: nn.Module, inputs: Tensor) -> Any:
        return {**super().predict(model, inputs), "scale": self.temperature}


class OfModel(Pairs):
    """Its loss reaches into the model."""

    def predict(self, model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        self.hidden = [model]
        return super().predict(model, inputs)

    def loss_sum(self, output: dict[str, Tensor], targets: Tensor) -> WeightedSum:
        total, weight = super().loss_sum(output, targets)
        weights = [p for p in self.hidden[0].parameters() if p.dim() > 1]
        return WeightedSum(total + weights[0].square().sum(), weight)


def refusals(directory: Path) -> list[str]:
    messages = []
    for task in (Unsteady, Scalar, OfModel):
        settings = config(
            directory, batch__size=BATCH, batch__micro_size=MICRO, run__proof="off"
        )
        with pytest.raises(ConfigError) as error:
            data = Points()
            Trainer(settings, model=mlp(), train_data=data, task=task()).fit()
        messages.append(str(error.value))
    return messages


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_cannot_be_joined_is_refused_by_name(tmp_path: Path, ranks: int) -> None:
    for unsteady, scalar, of_model in on_ranks(ranks, refusals, tmp_path):
        assert "the second time the model gave other outputs" in unsteady
        assert "has a tensor () float64" in scalar
        assert "loss_sum uses parameters of the model itself (0.weight)" in of_model


class ByMicroBatch(Pairs):
    whole_step = False


def test_the_header_says_which_samples_are_compared(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def start(task: Task) -> None:
        settings = config(tmp_path, batch__micro_size=7, train__max_steps=1)
        Trainer(settings, model=mlp(), train_data=Points(), task=task).fit()

    on_ranks(1, start, Pairs())
    assert "over all outputs of a step at once" in " ".join(
        capfd.readouterr().out.split()
    )
    on_ranks(1, start, ByMicroBatch())
    out = " ".join(capfd.readouterr().out.split())
    assert "compares the samples of a micro-batch (7 at most) and no others" in out


def test_mixing_is_refused(tmp_path: Path) -> None:
    def build() -> str:
        settings = config(tmp_path, batch__size=BATCH, train__mix={"mixup": 0.2})
        with pytest.raises(ConfigError) as error:
            data = Images()
            Trainer(settings, model=conv_net(), train_data=data, task=Pairs())
        return str(error.value)

    (message,) = on_ranks(1, build)
    assert "whole_step" in message
