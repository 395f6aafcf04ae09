"""Settings of a run hold while it runs and are put back, so that runs in one process do not see each other."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Images, config, conv_net
from trainer import LockstepError, Observer, Trainer
from trainer.exact.determinism import run_settings
from trainer.exact.plan import Step
from trainer.exact.tf32 import tf32_in_use
from trainer.reporting.jsonl import read_rows


def settings() -> dict[str, Any]:
    """All that a bitwise run changes in its process."""
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "threads": torch.get_num_threads(),
        "benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.backends.cudnn.deterministic,
        "tf32": tf32_in_use(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("CUBLAS", "TORCH"))
        },
    }


class Spy(Observer):
    def __init__(self, fail: bool) -> None:
        self.settings: list[dict[str, Any]] = []
        self._fail = fail

    def step(self, step: Step) -> None:
        self.settings.append(settings())
        if self._fail:
            raise LockstepError("as asked")


def fit(
    directory: Path, reproducibility: str, *, fail: bool = False
) -> tuple[list[dict[str, Any]], str]:
    spy = Spy(fail)
    data = Images(56)
    trainer = Trainer(
        config(
            directory,
            run__reproducibility=reproducibility,
            batch__micro_size=14,
            train__precision="fp32",
        ),
        model=conv_net(),
        train_data=data,
        val_data=data,
        observers=[spy],
    )
    if fail:
        with pytest.raises(LockstepError, match="as asked"):
            trainer.fit()
        return spy.settings, ""
    return spy.settings, trainer.fit()["weights_sha256"]


@pytest.mark.parametrize("fail", [False, True])
def test_a_bitwise_run_leaves_its_process_as_it_was(tmp_path: Path, fail: bool) -> None:
    def run(directory: Path) -> None:
        torch.set_num_threads(2)
        before = settings()
        during, _ = fit(directory / "bitwise", "bitwise", fail=fail)
        assert during[0] == before | {
            "algorithms": True,
            "threads": 1,
            "deterministic": True,
            "fill": False,
            "environment": before["environment"]
            | {
                "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
                "TORCHINDUCTOR_DETERMINISTIC": "1",
            },
        }
        assert settings() == before
        during, _ = fit(directory / "standard", "standard")
        assert during[0] == before

    on_ranks(1, run, tmp_path)


def test_two_runs_in_one_process_do_not_see_each_other(tmp_path: Path) -> None:
    """In either order, and made before either is trained, each ends as it does alone."""

    def weights(directory: Path, *order: str) -> dict[str, str]:
        return {
            name: fit(directory / f"{place}-{name}", name)[1]
            for place, name in enumerate(order)
        }

    alone = {
        name: on_ranks(1, weights, tmp_path / name, name)[0][name]
        for name in ("standard", "bitwise")
    }
    for order in (("standard", "bitwise"), ("bitwise", "standard")):
        assert on_ranks(1, weights, tmp_path / "-".join(order), *order) == [alone]


def test_what_the_caller_draws_does_not_depend_on_a_run_before(tmp_path: Path) -> None:
    def draws(directory: Path, trained: bool) -> tuple[float, float, float]:
        torch.manual_seed(4)
        random.seed(4)
        np.random.seed(4)
        if trained:
            fit(directory, "standard")
            torch.manual_seed(4)  # conv_net seeds it
        return float(torch.rand(())), random.random(), float(np.random.rand())

    assert on_ranks(1, draws, tmp_path, True) == on_ranks(1, draws, tmp_path, False)


def test_settings_within_settings_are_put_back_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when a caller evaluates one run while another one trains."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    outside = settings()
    with run_settings(bitwise=True, compiled=False):
        bitwise = settings()
        draw = torch.rand(1)
        with run_settings(bitwise=False, compiled=False):
            torch.rand(5)
        with run_settings(bitwise=True, compiled=False):
            assert settings() == bitwise
            torch.manual_seed(1)
        assert settings() == bitwise
        after = torch.rand(1)
    assert settings() == outside
    assert bitwise != outside
    with run_settings(bitwise=False, compiled=False):
        assert torch.equal(torch.rand(1), draw)
        assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_outside_fit_gives_what_the_run_logged_and_changes_nothing(
    tmp_path: Path, workers: int
) -> None:
    def evaluate(directory: Path) -> None:
        data = Images(56)
        trainer = Trainer(
            config(
                directory,
                run__reproducibility="bitwise",
                batch__micro_size=14,
                batch_norm__recalibrate=2,
                batch_norm__recalibrate_at="evaluation",
                data__workers=workers,
            ),
            model=nn.Sequential(nn.Dropout(0.5), conv_net()),
            train_data=data,
            val_data=data,
        )
        untrained = trainer.evaluate()
        assert trainer.evaluate() == untrained
        trainer.fit()
        logged = read_rows(directory / "run" / "metrics.jsonl")[-1]
        assert logged["val/loss"] != untrained["loss"]
        before = settings()
        for training in (True, False):
            trainer.module.train(training)
            generators = torch.get_rng_state()
            assert trainer.evaluate()["loss"] == logged["val/loss"]
            assert trainer.module.training == training
            assert all(
                module.training == training for module in trainer.module.modules()
            )
            assert torch.equal(torch.get_rng_state(), generators)
        assert settings() == before
        trainer.end_loading()

    on_ranks(1, evaluate, tmp_path)
