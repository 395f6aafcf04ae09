"""Parameters shared out over the processes (`train.parallel=fsdp`): the same run as one process that holds them all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    Images,
    Points,
    config,
    fitted,
    largest_difference,
    mlp,
    rows_of,
)
from trainer import ConfigError, LockstepError, Task, Trainer
from trainer.config.sharded_parameters import NEEDS
from trainer.exact.shards import is_shard, local_part, whole
from trainer.exact.sharding import blocks_of
from trainer.storage.digest import digest, hexadecimal

BOUND = 1e-12


class Blocks(nn.Module):
    """A net with repeated blocks, norm layers, a buffer that forwards move, and dimensions that 2 and 3 do not divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(2, 5, 3, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.blocks = nn.ModuleList([_Block(45) for _ in range(3)])
        self.head = nn.Linear(45, 4)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.mean += images.mean()
        hidden = torch.tanh(self.norm(self.first(images))).flatten(1)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        result: Tensor = self.head(hidden)
        return result


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.dropout(torch.tanh(self.norm(self.dense(hidden))))
        return result


# 88 = 3 × 28 + 4: the last step of an epoch is one micro-batch, which leaves other ranks idle; 4 micro-batches are 2+1+1
# on three. 20 validation samples are 7 batches.
def trainer_of(directory: Path, parallel: str, **changes: Any) -> Trainer:
    settings = {
        "run__name": "run",
        "run__resume": "auto",
        "run__proof": "off",
        "train__parallel": parallel,
        "train__max_grad_norm": 0.5,
        "batch__micro_size": 7,
        "batch__eval_size": 3,
        "optimizer__name": "adamw",
        "optimizer__momentum": None,
        "optimizer__lr": 0.01,
        "optimizer__decay_norm_and_bias": False,
        "loss__class_weights": [1.0, 0.2, 3.0, 0.7],
    }
    return Trainer(
        config(directory, **(settings | changes)),
        model=Blocks(),
        train_data=Images(88),
        val_data=Images(20),
        test_data=Images(10),
    )


def results_of(trainer: Trainer) -> dict[str, Any]:
    """What a run has come to, whole, and what this rank holds of it."""
    held, total = memory_of(trainer)
    return {
        "model": whole_state(trainer),
        "evaluation": trainer.evaluate(),
        "held": held / total,
        "digest": trainer.digest(),
        "digest of whole": digest_of_whole(trainer),
    }


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    state = trainer.module.state_dict()
    return {name: whole(tensor).clone() for name, tensor in state.items()}


def digest_of_whole(trainer: Trainer) -> str:
    parameters = trainer.module.named_parameters()
    return hexadecimal(digest({name: whole(p) for name, p in parameters}))


def memory_of(trainer: Trainer) -> tuple[int, int]:
    """Elements of parameters and optimizer state that this rank holds, and of the whole."""
    tensors: list[Tensor] = list(trainer.module.parameters())
    for entries in trainer.optimizer.state.values():
        tensors += [value for value in entries.values() if value.dim()]
    held = sum(local_part(tensor).numel() for tensor in tensors)
    return held, sum(tensor.numel() for tensor in tensors)


def run(directory: Path, parallel: str, **changes: Any) -> dict[str, Any]:
    trainer = trainer_of(directory, parallel, **changes)
    trainer.fit()
    return results_of(trainer)


def runs_on_one_process(directory: Path) -> dict[str, Any]:
    run(directory / "to fsdp", "ddp", train__stop_after=5)
    return run(directory / "whole", "ddp")


def runs_with_shards(directory: Path) -> list[dict[str, Any]]:
    run(directory / "to ddp", "fsdp", train__stop_after=5)
    return [
        run(directory / "shards", "fsdp"),
        run(directory / "to fsdp", "fsdp"),
    ]


def optimizer_state(directory: Path) -> dict[str, Tensor]:
    checkpoints = directory / "run" / "checkpoints"
    last = checkpoints / (checkpoints / "last").read_text().strip()
    return load_file(last / "optimizer.safetensors")


def best_model(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "run" / "best" / "model.safetensors")


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert largest_difference(actual["model"], expected["model"]) < BOUND
    for name, value in expected["evaluation"].items():
        assert actual["evaluation"][name] == pytest.approx(value, abs=BOUND)


def assert_same_files(actual: Path, expected: Path) -> None:
    """Rows, the best model, the optimizer's state and the evaluation of the test set."""
    pairs = zip(rows_of(actual / "run"), rows_of(expected / "run"), strict=True)
    for row, other in pairs:
        # Of weights that differ in their last bits.
        row.pop("digest", None), other.pop("digest", None)
        assert row == pytest.approx(other, rel=1e-9, abs=BOUND)
    assert largest_difference(best_model(actual), best_model(expected)) < BOUND
    states = optimizer_state(actual), optimizer_state(expected)
    assert largest_difference(*states) < 1e-9
    summaries = []
    for path in (actual, expected):
        summaries.append(json.loads((path / "run" / "summary.json").read_text()))
    loss, other_loss = (summary["test/loss"] for summary in summaries)
    assert loss == pytest.approx(other_loss, rel=1e-9)


def test_equals_one_process_and_changes_places_with_ddp(tmp_path: Path) -> None:
    """AdamW, clipping, class weights, norm layers, dropout, idle ranks, accumulation, uneven evaluations, resumes."""
    (expected,) = on_ranks(1, runs_on_one_process, tmp_path)
    for shards, resumed in on_ranks(2, runs_with_shards, tmp_path):
        assert_same(shards, expected)
        assert_same(resumed, expected)
        assert shards["digest"] == shards["digest of whole"]
        # Rows are rounded up to whole ones, so a rank may hold a little more than its share.
        assert shards["held"] < 0.55
    (resumed,) = on_ranks(1, run, tmp_path / "to ddp", "ddp")
    assert_same(resumed, expected)
    for shards in on_ranks(3, run, tmp_path / "3", "fsdp"):
        assert_same(shards, expected)
        assert shards["held"] < 0.4
    for name in ("shards", "to fsdp", "to ddp", "3"):
        assert_same_files(tmp_path / name, tmp_path / "whole")
