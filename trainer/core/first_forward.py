"""Before training: do the model, its loss, its metrics and the data fit together?

One forward of a few samples, which leaves no trace. Every rank runs the same samples, so all of them find the same:
what a loss divides by, and the first mistake, which one of them reports.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from trainer.core.forward import Forward
from trainer.core.metrics import Meter
from trainer.core.proof.state import without_trace
from trainer.core.run import Run
from trainer.errors import ConfigError
from trainer.exact.shards import is_shard

FEW = 4  # samples: what does not fit does not fit for four


def check_first_forward(run: Run) -> None:
    """Raise `ConfigError` or `DataError` where the first samples, the model and the task do not fit together."""
    try:
        _run_few(run)
    except ConfigError as error:
        if error.key != "model.name" or not run.dtypes_note:
            raise
        raise ConfigError(
            error.key,
            f"{error.message}. {run.dtypes_note}: let such a layer take its input in the dtype of its weights, by "
            f"x.to(self.weight.dtype)",
        ) from error


def _run_few(run: Run) -> None:
    ids = run.plan.sample_ids(run.plan.step(0), 0)
    try:
        _run(run, ids[:FEW])
    except Exception:
        if len(ids) <= FEW:
            raise
        # A model or a loss may be made for micro-batches of their own size.
        _run(run, ids)


def _run(run: Run, ids: Any) -> None:
    # One of its own: these samples are fewer than a micro-batch's, and the run's remembers what its own weigh.
    seed = run.config.run.seed
    forward = Forward(run.task, run.precision, run.ranks.device, seed)
    run.module.train()
    with without_trace(run), _eager(run):
        batch = run.train_loader.peek(ids)
        output, loss = forward(run.module, batch, run.plan.step(0))
        _refuse_shard(loss.total)
        run.forward.expect_weights_like(loss.weight)
        meter = Meter(run.task, run.ranks)
        meter.add(batch, output, loss)
        meter.flush()


def _refuse_shard(total: Tensor) -> None:
    if is_shard(total):
        raise ConfigError(
            "train.parallel",
            "fsdp leaves each rank a part of a parameter outside of the model's forward, and loss_sum uses some; let "
            "the block that has them compute it in its forward, or use ddp",
        )


def _eager(run: Run) -> AbstractContextManager[object]:
    """Compiling for these few samples would take long, and could change what is compiled for the run."""
    is_compiled = run.config.train.compile
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
