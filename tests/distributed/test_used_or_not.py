"""A layer that is used or not by the pixels of a micro-batch: no rank decides alone what its gradient is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    Points,
    config,
    fitted,
    largest_difference,
    mlp,
    state,
)
from trainer import ConfigError, Task, Trainer
from trainer.exact.completion import complete_backward
from trainer.exact.plan import Plan
from trainer.process import launcher

SAMPLES = 86  # the last of 4 steps has 2 samples: one micro-batch
THRESHOLD = -0.3
EPOCHS = 4
SEED = 6  # such that each pattern below occurs


def is_used(points: Tensor) -> bool:
    return bool(points[0, 0] < THRESHOLD)


class Sometimes(nn.Module):
    """The second head is used by micro-batches with a low first input only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.always, self.sometimes = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.always(x)
        return out + self.sometimes(x) if is_used(x) else out


def train(directory: Path, micro_size: int, **changes: Any) -> dict[str, Tensor]:
    # With momentum and decay, a gradient of zeros and none at all are different steps.
    settings = config(
        directory,
        batch__micro_size=micro_size,
        run__seed=SEED,
        optimizer__weight_decay=0.1,
        train__epochs=EPOCHS,
        **changes,
    )
    data = Points(SAMPLES, ignored=False)
    return state(fitted(settings, Sometimes(), train_data=data, val_data=data))


def ranks_that_use_it(micro_size: int, ranks: int) -> list[list[bool]]:
    """For each step, which ranks' micro-batches use the second head."""
    plan = Plan(
        samples=SAMPLES,
        batch_size=28,
        micro_size=micro_size,
        ranks=ranks,
        epochs=EPOCHS,
        seed=SEED,
    )
    points = Points(SAMPLES).points
    steps = []
    for step in plan.steps():
        used = []
        for first, end in step.ranks:
            batches = [points[plan.sample_ids(step, v)] for v in range(first, end)]
            used.append(any(map(is_used, batches)))
        steps.append(used)
    return steps


@pytest.mark.parametrize(
    ("micro_size", "reproducibility", "may_be_unused_at_first"),
    [
        (14, "standard", False),
        (14, "bitwise", False),
        (5, "standard", False),
        (5, "standard", True),
        (5, "bitwise", False),
    ],
)
def test_the_ranks_agree_on_what_was_used(
    tmp_path: Path, micro_size: int, reproducibility: str, may_be_unused_at_first: bool
) -> None:
    """With steps that leave a rank idle, which are run without DDP."""
    patterns = ranks_that_use_it(micro_size, ranks=2)
    assert any(patterns[0])
    assert not all(patterns[0])
    assert [True, False] in patterns
    assert [False, False] in patterns
    arguments: dict[str, Any] = {
        "run__reproducibility": reproducibility,
        "train__find_unused_parameters": may_be_unused_at_first,
        "micro_size": micro_size,
    }
    (reference,) = on_ranks(1, train, tmp_path / "1", **arguments)
    bound = 0.0 if reproducibility == "bitwise" else 1e-12
    for weights in on_ranks(2, train, tmp_path / "2", **arguments):
        assert largest_difference(weights, reference) <= bound


def test_names_in_place_of_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DDP gives them under TORCH_DISTRIBUTED_DEBUG."""
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "INFO")
    (reference,) = on_ranks(1, train, tmp_path / "1", 14)
    for weights in on_ranks(2, train, tmp_path / "2", 14):
        assert largest_difference(weights, reference) < 1e-12


def test_a_complaint_that_names_no_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "trainer.exact.completion._what_is_missing", lambda model: "something is wrong"
    )
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="DDP does not say which; set it to bitwise"):
        complete_backward(model, dict(model.named_parameters()))


class Mixed(Task):
    """Counts targets as a tensor on rank 1, and as a number on rank 0."""

    def loss_sum(self, output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | int]:
        loss = nn.functional.cross_entropy(output, targets, reduction="sum")
        weight = len(targets)
        return loss, torch.tensor(float(weight)) if launcher.rank() == 1 else weight


def test_weights_of_two_kinds_are_refused(tmp_path: Path) -> None:
    """In a loop of one's own, which tries nothing out before its first step."""

    def run(directory: Path) -> str:
        trainer = Trainer(
            config(directory, batch__micro_size=14),
            model=mlp(),
            train_data=Points(56, ignored=False),
            task=Mixed(),
        )
        trainer.start()
        with pytest.raises(ConfigError) as caught:
            trainer.train_step(trainer.plan.step(0))
        trainer.end_loading()
        return str(caught.value)

    for message in on_ranks(2, run, tmp_path):
        assert "its weight is a tensor in one micro-batch" in message
