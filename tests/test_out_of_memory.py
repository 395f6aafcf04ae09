"""Memory that runs out in training is one message, and what the message advises is the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    Images,
    config,
    conv_net,
    largest_difference,
    state,
)
from trainer import LockstepError, Trainer
from trainer.core.out_of_memory import explain_out_of_memory

MICRO = 4


class LateOutOfMemory(nn.Module):
    """A net that runs out of memory in a forward of more than `most` samples, after some of them."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.body, self.most, self.forwards = conv_net(), most, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += self.training
        if self.training and self.forwards > 8 and len(x) > self.most:
            raise torch.OutOfMemoryError("simulated: tried to allocate 2 GiB\nmore")
        return self.body(x)  # type: ignore[no-any-return]


def test_a_run_out_of_memory_goes_on_with_less_at_once(tmp_path: Path) -> None:
    """Memory that runs out in training is one message; what it advises is the undisturbed run."""

    def train(name: str, most: int, **changes: Any) -> Any:
        settings = config(
            tmp_path / name,
            batch__micro_size=MICRO,
            train__checkpoint_every=1,
            **changes,
        )
        trainer = Trainer(
            settings,
            model=LateOutOfMemory(most),
            train_data=Images(),
            val_data=Images(20),
        )
        try:
            trainer.fit()
        except LockstepError as error:
            return str(error), trainer.progress.step
        return state(trainer)

    def compare() -> tuple[str, int, float]:
        message, step = train("a", 2 * MICRO, batch__fuse=4)
        less = train("a", 2 * MICRO, batch__fuse=2, run__resume="auto")
        return message, step, largest_difference(less, train("b", 1000, batch__fuse=1))

    ((message, step, difference),) = on_ranks(1, compare)
    assert step > 0
    assert f"ran out of memory in step {step + 1} or after it (simulated: tr" in message
    assert "batch.fuse=2 run.resume=auto goes on" in message
    assert "more" not in message.split("(simulated")[1].split(")")[0]
    assert difference < 1e-12


def test_out_of_memory_with_one_micro_batch_in_a_forward(tmp_path: Path) -> None:
    def explain(error: RuntimeError) -> str:
        trainer = Trainer(
            config(tmp_path), model=conv_net(), train_data=Images(), val_data=Images(20)
        )
        return str(explain_out_of_memory(error, trainer.run, 1, 7))

    mps = RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)")
    (message,) = on_ranks(1, explain, mps)
    assert "batch.micro_size" in message
    assert on_ranks(1, explain, RuntimeError("odd")) == ["None"]
