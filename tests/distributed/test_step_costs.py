"""What a step does beside the model's own work, counted: a machine that is busy with other things does not matter."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import trainer
from tests.distributed.ranks import on_ranks
from tests.distributed.small import config
from trainer import Trainer
from trainer.data.datasets import ImageArrays
from trainer.exact.plan import Step

PACKAGE = str(Path(trainer.__file__).parent)
QUIET_STEP = 7  # no row, no epoch's end
IDLE_STEP = 9  # the epoch's last, of one micro-batch
ALL_REDUCE = distributed.all_reduce.__wrapped__.__code__  # type: ignore[attr-defined]


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(16, 8, bias=False),
        torch.nn.BatchNorm1d(8),
        torch.nn.ReLU(),
        torch.nn.Linear(8, 4),
    )


class Counted(Trainer):
    """Counts, in each step: calls of the package's own functions, DDP's forwards, and sums over the ranks."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.counts: dict[int, dict[str, int]] = {}

    def train_step(self, step: Step) -> None:
        count = self.counts[step.number] = {"calls": 0, "forwards": 0, "sums": 0}

        def see(frame: FrameType, event: str, _: Any) -> None:
            if event != "call":
                return
            code = frame.f_code
            if code.co_filename.startswith(PACKAGE):
                count["calls"] += 1
            elif code is DistributedDataParallel.forward.__code__:
                count["forwards"] += 1
            elif code is ALL_REDUCE:
                count["sums"] += 1

        sys.setprofile(see)
        super().train_step(step)
        # What follows a quiet step belongs to it: the next step takes over.
        if step.number == IDLE_STEP:
            sys.setprofile(None)


def counts(directory: Path, micro_size: int) -> dict[int, dict[str, int]]:
    images = torch.randint(256, (8 * 16 + 2, 1, 4, 4), dtype=torch.uint8)
    data = ImageArrays(images, torch.arange(len(images)) % 4)
    settings = config(
        directory / str(micro_size),
        batch__size=16,
        batch__micro_size=micro_size,
        train__log_every=50,
        train__epochs=1,
        best__metric="train/loss",
    )
    run = Counted(settings, model=net(), train_data=data)
    try:
        run.fit()
    finally:
        sys.setprofile(None)
    return run.counts


def test_calls_of_a_step(tmp_path: Path) -> None:
    """Upper bounds with room for a few more: a call takes up to half a microsecond."""
    whole, cut = (counts(tmp_path, size)[QUIET_STEP]["calls"] for size in (16, 4))
    a_micro_batch = (cut - whole) / 3
    assert a_micro_batch <= 32
    assert whole - a_micro_batch <= 44


def test_exchanges_of_a_step(tmp_path: Path) -> None:
    for of_rank in on_ranks(2, counts, tmp_path, 2):
        quiet, idle = of_rank[QUIET_STEP], of_rank[IDLE_STEP]
        # Four micro-batches of this rank: gradients are exchanged in the last, and nothing else is.
        assert quiet["forwards"] == 1
        # Without DDP: all gradients at once, and how many ranks have each.
        assert idle["forwards"] == 0
        assert idle["sums"] == 1
