"""Whole runs that fuse, on several ranks, against the run on one that does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    Images,
    config,
    conv_net,
    fitted,
    largest_difference,
    state,
)
from tests.distributed.test_batch_norm import SAMPLES, SharedNorm, plain_pytorch
from trainer import ConfigError, Trainer
from trainer.core.fuse_check import choose_fuse
from trainer.core.metrics import TIMINGS
from trainer.reporting.jsonl import read_rows

Outcome = tuple[dict[str, Tensor], list[dict[str, float]], int]


def net() -> nn.Module:
    model = conv_net(momentum=0.3)
    model.insert(4, nn.Dropout(0.3))
    return model


def run(
    directory: Path,
    make: Any,
    fuse: int | str,
    samples: int = 103,
    micro: int = 4,
    **changes: Any,
) -> Outcome:
    settings = config(directory, batch__micro_size=micro, batch__fuse=fuse, **changes)
    trainer = fitted(settings, make(), train_data=Images(samples), val_data=Images(20))
    rows = [
        {k: v for k, v in r.items() if k not in (*TIMINGS, "digest")}
        for r in read_rows(directory / "run/metrics.jsonl")
    ]
    return state(trainer), rows, trainer.fuse


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """One rank, nothing fused, by `batch_norm.momentum_per`."""
    return {
        per: on_ranks(
            1, run, tmp_path_factory.mktemp(per), net, 1, batch_norm__momentum_per=per
        )[0]
        for per in ("micro_batch", "step")
    }


@pytest.mark.parametrize(
    ("ranks", "fuse", "per"),
    [
        (1, 2, "step"),
        (1, 3, "micro_batch"),
        (1, 8, "step"),
        (2, 2, "micro_batch"),
        (2, 8, "step"),
        (2, "auto", "micro_batch"),
        (3, 3, "step"),
        (3, "auto", "micro_batch"),
    ],
)
def test_equals_the_run_that_fuses_nothing(
    tmp_path: Path, alone: dict[str, Outcome], ranks: int, fuse: int | str, per: str
) -> None:
    """7 micro-batches a step, 5 in the last one, one of which is smaller; dropout; weights, buffers, every row."""
    weights, rows, _ = alone[per]
    for got, got_rows, took in on_ranks(
        ranks, run, tmp_path, net, fuse, batch_norm__momentum_per=per
    ):
        assert took == ({2: 4, 3: 3}[ranks] if fuse == "auto" else fuse)
        assert largest_difference(got, weights) < 1e-12
        for row, expected in zip(got_rows, rows, strict=True):
            assert row == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("ranks", [1, 3])
def test_layers_called_twice_instance_norm_and_idle_ranks(
    tmp_path: Path, ranks: int
) -> None:
    reference = plain_pytorch(SharedNorm(), 4)
    for got, _, _ in on_ranks(ranks, run, tmp_path, SharedNorm, 3, samples=SAMPLES):
        assert largest_difference(got, reference) < 1e-12


def test_resumed_with_another_fuse(tmp_path: Path, alone: dict[str, Outcome]) -> None:
    weights, rows, _ = alone["micro_batch"]
    on_ranks(1, run, tmp_path, net, 1, run__resume="auto", train__max_steps=3)
    for got, got_rows, _ in on_ranks(2, run, tmp_path, net, 4, run__resume="auto"):
        assert largest_difference(got, weights) < 1e-12
        assert len(got_rows) == len(rows)


@pytest.mark.parametrize("fuse", ["auto", 2])
def test_a_rank_on_which_it_fails_does_not_decide_alone(
    tmp_path: Path, fuse: int | str
) -> None:
    def choose(directory: Path) -> object:
        settings = config(directory, batch__micro_size=7, batch__fuse=fuse)
        trainer = Trainer(settings, model=conv_net(), train_data=Images())

        def check(*_: object) -> None:
            if trainer.ranks.rank == 1:
                raise ConfigError("batch.fuse", "fails here; and that is all")

        with patch("trainer.core.fuse_check._check_two_micro_batches", check):
            try:
                return choose_fuse(trainer.run)
            except ConfigError as error:
                return str(error)

    first, second = on_ranks(2, choose, tmp_path)
    assert first == second
    if fuse == "auto":
        assert first == (1, "fails here")
    else:
        assert "fails here" in first
        assert "on rank 1 of 2" in first
