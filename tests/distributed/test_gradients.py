"""The whole step's gradient, against a loop that knows nothing of micro-batches or ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    IGNORED,
    Points,
    config,
    fitted,
    largest_difference,
    mlp,
    state,
)
from trainer import ConfigError, Task, Trainer
from trainer.exact.plan import Plan
from trainer.reporting.jsonl import read_rows

CLASS_WEIGHTS = [1.0, 0.2, 3.0, 0.7]


def by_hand(samples: int, epochs: int = 2, size: int = 28) -> dict[str, Tensor]:
    """The weights after plain full-batch PyTorch, in the plan's order."""
    data, model = Points(samples), mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    criterion = nn.CrossEntropyLoss(
        torch.tensor(CLASS_WEIGHTS, dtype=torch.float64), ignore_index=IGNORED
    )
    plan = Plan(
        samples=samples,
        batch_size=size,
        micro_size=size,
        ranks=1,
        epochs=epochs,
        seed=0,
    )
    for epoch in range(epochs):
        for ids in torch.from_numpy(plan.permutation(epoch)).split(size):
            optimizer.zero_grad()
            criterion(model(data.points[ids]), data.labels[ids]).backward()
            optimizer.step()
    return model.state_dict()


def weighted(
    directory: Path, samples: int, micro_size: int, **changes: Any
) -> dict[str, Tensor]:
    settings = config(
        directory,
        batch__micro_size=micro_size,
        loss__class_weights=CLASS_WEIGHTS,
        loss__ignore_index=IGNORED,
        **changes,
    )
    return state(
        fitted(settings, mlp(), train_data=Points(samples), val_data=Points(20))
    )


@pytest.mark.parametrize(
    ("micro_size", "ranks"), [(28, 1), (7, 1), (4, 1), (7, 2), (4, 2), (7, 3), (4, 3)]
)
def test_equals_the_full_batch_loop(
    tmp_path: Path, micro_size: int, ranks: int
) -> None:
    """M = 1, 4, 7; a last step of 19 samples; class weights and ignored targets; 2 epochs."""
    for weights in on_ranks(ranks, weighted, tmp_path, 103, micro_size):
        assert largest_difference(weights, by_hand(103)) < 1e-12


def test_a_rank_with_nothing_to_do_takes_part(tmp_path: Path) -> None:
    """86 = 3 × 28 + 2: the last step is one micro-batch, for three ranks."""
    for weights in on_ranks(3, weighted, tmp_path, 86, 7):
        assert largest_difference(weights, by_hand(86)) < 1e-12


def test_smoothing_clipping_and_adamw_do_not_see_the_ranks(tmp_path: Path) -> None:
    def run(directory: Path, micro_size: int) -> dict[str, Tensor]:
        settings = config(
            directory,
            batch__micro_size=micro_size,
            loss__label_smoothing=0.1,
            optimizer__name="adamw",
            optimizer__momentum=None,
            train__max_grad_norm=0.05,
        )
        return state(
            fitted(
                settings,
                mlp(),
                train_data=Points(103, ignored=False),
                val_data=Points(20, False),
            )
        )

    (reference,) = on_ranks(1, run, tmp_path / "whole", 28)
    for weights in on_ranks(3, run, tmp_path / "cut", 7):
        assert largest_difference(weights, reference) < 1e-12


class HalfUnused(nn.Module):
    """The second head is used by micro-batches that hold a negative first input only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.always, self.sometimes = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.always(x)
        return out + self.sometimes(x) if x[0, 0] < 0 else out


def test_parameters_without_a_gradient(tmp_path: Path) -> None:
    def run(directory: Path) -> dict[str, Tensor]:
        settings = config(
            directory,
            batch__micro_size=7,
            train__find_unused_parameters=True,
            train__epochs=1,
        )
        data = Points(103, ignored=False)
        return state(fitted(settings, HalfUnused(), train_data=data, val_data=data))

    (reference,) = on_ranks(1, run, tmp_path / "1")
    for weights in on_ranks(3, run, tmp_path / "3"):
        assert largest_difference(weights, reference) < 1e-12


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_unused_parameter_is_refused_on_any_number_of_ranks(
    tmp_path: Path, ranks: int
) -> None:
    def run(directory: Path) -> str:
        model = mlp()
        model.register_parameter("forgotten", nn.Parameter(torch.zeros(3)))
        data = Points(56, ignored=False)
        trainer = Trainer(
            config(directory, batch__micro_size=14),
            model=model,
            train_data=data,
            val_data=data,
        )
        with pytest.raises(ConfigError) as caught:
            trainer.fit()
        return str(caught.value)

    for message in on_ranks(ranks, run, tmp_path):
        assert "train.find_unused_parameters" in message
        assert "forgotten" in message


class SumOfSquares(Task):
    """A user's own task: weighted regression."""

    metrics = ("error",)

    def loss_sum(self, output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        weight = 1.0 + targets.double()
        return (weight * (output.sum(1) - targets) ** 2).sum(), weight.sum()

    def metric_sums(
        self, output: Tensor, targets: Tensor
    ) -> dict[str, tuple[Tensor, int]]:
        return {"error": ((output.sum(1) - targets).abs().sum(), len(targets))}


def test_the_logged_loss_is_the_loss_of_the_step(tmp_path: Path) -> None:
    """Every row's train/loss and train/error, against the formula over the step's samples at its weights."""

    def run(directory: Path, micro_size: int) -> list[dict[str, float]]:
        data = Points(103, ignored=False)
        settings = config(
            directory, batch__micro_size=micro_size, train__epochs=1, optimizer__lr=0.0
        )
        fitted(settings, mlp(), train_data=data, val_data=data, task=SumOfSquares())
        return [
            row
            for row in read_rows(directory / "run" / "metrics.jsonl")
            if "train/loss" in row
        ]

    data, model = Points(103, ignored=False), mlp().double()
    plan = Plan(samples=103, batch_size=28, micro_size=28, ranks=1, epochs=1, seed=0)
    for ranks in (1, 3):
        rows = on_ranks(ranks, run, tmp_path / str(ranks), 7)[0]
        for row, ids in zip(
            rows, torch.from_numpy(plan.permutation(0)).split(28), strict=True
        ):
            output, targets = model(data.points[ids]), data.labels[ids]
            total, weight = SumOfSquares().loss_sum(output, targets)
            assert row["train/loss"] == pytest.approx(
                float((total / weight).detach()), rel=1e-13
            )
            error = SumOfSquares().metric_sums(output, targets)["error"]
            assert row["train/error"] == pytest.approx(
                float((error[0] / error[1]).detach()), rel=1e-13
            )


def test_one_fp32_step_from_equal_state(tmp_path: Path) -> None:
    """The standard level's bound: relative gradient error ≤ 1e-5 across rank counts, in fp32."""

    def run(directory: Path, micro_size: int) -> dict[str, Tensor]:
        settings = config(
            directory,
            batch__micro_size=micro_size,
            train__precision="fp32",
            train__max_steps=1,
        )
        model, data = mlp(), Points(103, ignored=False)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = fitted(settings, model, train_data=data, val_data=data)
        return {
            name: (before[name] - p.detach()) / 0.1
            for name, p in trainer.module.named_parameters()
        }

    (reference,) = on_ranks(1, run, tmp_path / "1", 4)
    for ranks in (2, 3, 4):
        for gradient in on_ranks(ranks, run, tmp_path / str(ranks), 4):
            error = torch.cat(
                [(gradient[n] - reference[n]).flatten() for n in reference]
            ).norm()
            assert (
                error / torch.cat([g.flatten() for g in reference.values()]).norm()
                < 1e-5
            )


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_logged_norm_is_that_of_the_whole_steps_gradient(
    tmp_path: Path, ranks: int
) -> None:
    def run(directory: Path) -> float:
        settings = config(directory, batch__micro_size=7, train__max_steps=1)
        data = Points(103, ignored=False)
        fitted(settings, mlp(), train_data=data, val_data=data)
        return read_rows(directory / "run" / "metrics.jsonl")[0]["grad_norm"]

    data, model = Points(103, ignored=False), mlp().double()
    ids = Plan(
        samples=103, batch_size=28, micro_size=28, ranks=1, epochs=1, seed=0
    ).permutation(0)[:28]
    nn.functional.cross_entropy(model(data.points[ids]), data.labels[ids]).backward()
    norm = torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    ).norm()
    assert on_ranks(ranks, run, tmp_path)[0] == pytest.approx(float(norm), rel=1e-12)


def test_a_step_without_targets_changes_nothing(tmp_path: Path) -> None:
    def run(directory: Path) -> dict[str, Tensor]:
        data = Points(28)
        data.labels[:] = IGNORED
        settings = config(
            directory,
            batch__micro_size=7,
            loss__ignore_index=IGNORED,
            train__log_every=99,
        )
        trainer = Trainer(settings, model=mlp(), train_data=data, val_data=Points(20))
        trainer.start()
        trainer.train_step(trainer.plan.step(0))
        return state(trainer)

    for weights in on_ranks(2, run, tmp_path):
        assert largest_difference(weights, mlp().double().state_dict()) == 0


class Rows(nn.Module):
    """An embedding whose gradient is sparse, and which does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(4, 4))

    def forward(self, points: Tensor) -> Tensor:
        indices = (points > 0).long()
        return nn.functional.embedding(indices, self.rows, sparse=True).sum(1)


def train_on_sparse_gradients(directory: Path, mode: str) -> str:
    settings = config(
        directory,
        batch__micro_size=7,
        optimizer__momentum=0.0,
        run__reproducibility=mode,
    )
    try:
        Trainer(settings, model=Rows(), train_data=Points(ignored=False)).fit()
    except ConfigError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("mode", ["standard", "bitwise"])
def test_sparse_gradients_are_refused_on_several_ranks(
    tmp_path: Path, mode: str
) -> None:
    for message in on_ranks(2, train_on_sparse_gradients, tmp_path, mode):
        assert 'the gradient of "rows" is sparse' in message
    assert on_ranks(1, train_on_sparse_gradients, tmp_path, mode) == ["trained"]
