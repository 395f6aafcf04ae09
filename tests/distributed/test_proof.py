"""Draws from `random` and NumPy in a forward do not depend on the ranks, and a finding of one rank is all ranks'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests import unruly
from tests.distributed.ranks import on_ranks
from tests.distributed.small import Points, config, mlp
from trainer import Observer, Trainer
from trainer.exact.plan import Step


class BeginLater(Observer):
    """Lets a layer drop begin with the third step."""

    def begin(self, run: Any) -> None:
        self.module = run.module

    def step(self, step: Step) -> None:
        self.module.begin = step.number >= 2


def new_trainer(
    directory: Path, model: nn.Module, data: Any = None, **changes: Any
) -> Trainer:
    settings = {"batch__micro_size": 7, "train__max_steps": 6, **changes}
    observers = [BeginLater()] if isinstance(model, unruly.LayerDropLater) else []
    return Trainer(
        config(directory, **settings),
        model=model,
        train_data=data or Points(ignored=False),
        observers=observers,
    )


def weights(directory: Path, model: Any, mode: str) -> str:
    trainer = new_trainer(directory, model(), run__reproducibility=mode)
    summary = trainer.fit()
    assert summary["proof"]["findings"] == []
    return str(summary["weights_sha256"])


@pytest.mark.parametrize(
    "model", [unruly.DrawsFromNumPy, unruly.DrawsFromPython, unruly.LayerDropLater]
)
def test_draws_on_the_host_are_keyed(tmp_path: Path, model: Any) -> None:
    hashes = set()
    for count in (1, 2, 3):
        of_ranks = on_ranks(count, weights, tmp_path / str(count), model, "bitwise")
        hashes |= set(of_ranks)
    assert len(hashes) == 1


def prove_with_late_noise(directory: Path) -> tuple[list[str], str]:
    data = unruly.LateNoise()
    trainer = new_trainer(directory, mlp(), data, loss__ignore_index=-1)
    plan = trainer.plan
    step = plan.step(0)
    data.noisy = set(plan.sample_ids(step, *step.ranks[1]).tolist())
    trainer.prove()
    [finding] = trainer.proof.findings
    return trainer.proof.checks, finding.what


def test_a_finding_of_one_rank_is_that_of_all(tmp_path: Path) -> None:
    first, second = on_ranks(2, prove_with_late_noise, tmp_path)
    assert first == second
    assert "another input each time" in first[1]


def refusal(directory: Path) -> str:
    trainer = new_trainer(
        directory, unruly.NoisyLayer(), run__reproducibility="bitwise"
    )
    try:
        trainer.fit()
    except Exception as error:
        return f"{type(error).__name__} {error}"
    return ""


def test_all_ranks_refuse_alike(tmp_path: Path) -> None:
    first, second = on_ranks(2, refusal, tmp_path)
    assert first == second
    assert first.startswith("ConfigError run.reproducibility: bitwise cannot hold")
