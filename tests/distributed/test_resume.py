"""Stopping and going on, mid-epoch and on other ranks, equals not stopping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Images, config, conv_net, fitted, largest_difference, state
from trainer import ConfigError
from trainer.metrics import TIMINGS
from trainer.tracking.jsonl import read_rows


def net() -> nn.Module:
    """BatchNorm and dropout: buffers, counters and keyed draws must all go on."""
    model = conv_net()
    model.insert(4, nn.Dropout(0.3))
    return model


def run(directory: Path, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    settings = config(
        directory,
        batch__micro_size=7,
        run__resume="auto",
        optimizer__weight_decay=1e-3,
        train__epochs=3,
        schedule__name="plateau",
        schedule__patience=0,
        **changes,
    )
    trainer = fitted(settings, net(), train_data=Images(103), val_data=Images(50))
    return state(trainer), trainer.optimizer.state_dict()["state"]


def rows(directory: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in r.items() if k not in TIMINGS} for r in read_rows(directory / "run" / "metrics.jsonl")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    directory = tmp_path_factory.mktemp("straight")
    ((weights, optimizer),) = on_ranks(1, run, directory)
    return directory, weights, optimizer


@pytest.mark.parametrize("stops", [[(1, 6), (2, 12)], [(2, 1), (1, 4), (3, 12)], [(3, 7), (1, 8), (2, 12)]])
def test_resumed_runs_end_alike(tmp_path: Path, straight: Any, stops: list[tuple[int, int]]) -> None:
    """Runs cut at other steps, each part on another number of ranks: weights, buffers, momenta and every row."""
    directory, weights, optimizer = straight
    for ranks, step in stops:
        results = on_ranks(ranks, run, tmp_path, train__max_steps=step, train__log_every=4)
    for got, got_optimizer in results:
        assert largest_difference(got, weights) < 1e-12
        for index, held in optimizer.items():
            assert largest_difference(got_optimizer[index], held) < 1e-12
    expected = on_ranks(1, run, tmp_path / "expected", train__log_every=4) and rows(tmp_path / "expected")
    assert len(rows(tmp_path)) == len(expected)
    for row, due in zip(rows(tmp_path), expected, strict=True):
        assert row == pytest.approx(due, rel=1e-10)
    best = [json.loads((d / "run" / "best" / "metrics.json").read_text()) for d in (tmp_path, directory)]
    assert best[0]["step"] == best[1]["step"]
    assert best[0]["val/loss"] == pytest.approx(best[1]["val/loss"], rel=1e-10)


def test_a_changed_key_is_refused_by_name(tmp_path: Path) -> None:
    def changed(directory: Path, **changes: Any) -> str:
        try:
            run(directory, **changes)
        except ConfigError as error:
            return str(error)
        return "accepted"

    on_ranks(1, run, tmp_path, train__max_steps=2)
    for message in on_ranks(2, changed, tmp_path, train__max_steps=3, optimizer__lr=0.2):
        assert message.startswith("optimizer.lr: ")
        assert "0.1" in message
        assert "run.resume_changes=allow" in message
    changes = {"train__max_steps": 3, "optimizer__lr": 0.2, "run__resume_changes": "allow"}
    assert on_ranks(2, changed, tmp_path, **changes) == ["accepted", "accepted"]
    assert on_ranks(1, changed, tmp_path, train__max_steps=4, optimizer__lr=0.2, data__workers=1) == ["accepted"]
